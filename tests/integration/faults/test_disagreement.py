"""I3 at run time: when rank 1 has other settings or data, both ranks stop with the same error before a batch."""

import pytest
from helpers.launch import WORKER, start

OPTIONS = {"commonit_metric": "task", "gradient_accumulation_steps": 2, "commonit_balance_lengths": False}
PLANS = "The ranks would train different batches: rank 1 differs from rank 0 in {}. Give"
GROUPS = "commonit_metric='task': rows or grouping options of rank 1 differ"
EVERY_OTHER_OPTION = {
    "commonit_purity": "micro",
    "commonit_remainder": "drop",
    "commonit_weights": {"g000": 2, "g001": 1},
    "commonit_balance_lengths": True,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 1,
}
DIFFERENT = (
    "commonit_weights, commonit_balance_lengths, per_device_train_batch_size, commonit_purity, commonit_remainder, "
    "gradient_accumulation_steps, token lengths, order of samples"
)
CASES = {  # options of rank 1, the change of its data (see train_worker.py), the error
    "seed": ({"seed": 8}, None, PLANS.format("data seed, order of samples")),
    "metric": ({"commonit_metric": "length", "commonit_num_groups": 3}, None, PLANS.format("commonit_metric")),
    "every other option": (EVERY_OTHER_OPTION, None, PLANS.format(DIFFERENT)),
    "tokens of the data": ({}, "tokens", PLANS.format("tokens of rows")),
    "grouping options": ({"commonit_min_group_size": 10}, None, GROUPS),
    "groups of the data": ({}, "groups", GROUPS),
    "order of the data": ({}, "order", GROUPS),
    "fewer rows": ({}, "fewer rows", GROUPS),
    # This rank skips the collectives that compare plans and, with packing, group the rows.
    "baseline": ({"commonit_metric": "none"}, None, PLANS.format("commonit_metric")),
    "packed baseline": ({"commonit_metric": "none"}, None, PLANS.format("commonit_metric")),
}


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_stop(tmp_path, case):
    options, data, error = CASES[case]
    run = {"name": "run", "dir": str(tmp_path), "group_sizes": [9, 9], "options": OPTIONS}
    if case == "packed baseline":
        run["options"] = {**OPTIONS, "packing": True, "max_length": 64}
    run |= {"rank_options": {"1": options}, "data": {"1": data} if data else {}}
    ended = start(WORKER, [run], tmp_path, 2, together=False)
    assert ended.codes == [1, 1], ended.stderr
    assert ended.stderr.count(f"ValueError: {error}") == 2, ended.stderr
    assert not list(tmp_path.glob("*.ids.*")), "a batch was trained"
