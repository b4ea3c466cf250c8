"""I3 at run time: two ranks with different plans stop with the same error before the first batch.

In each case, rank 1 has other settings or data.
"""

import pytest

OPTIONS = {"commonit_metric": "task", "gradient_accumulation_steps": 2, "commonit_balance_lengths": False}
RUN = {"world_size": 2, "group_sizes": [9, 9], "options": OPTIONS, "limit_s": 30}
ORDER = "order of samples"
CASES = {
    "seed": ({"seed": 8}, None, ["data seed", ORDER]),
    "metric": ({"commonit_metric": "length", "commonit_num_groups": 3}, None, ["commonit_metric"]),
    "every other option": (
        {
            "commonit_purity": "micro",
            "commonit_remainder": "drop",
            "commonit_weights": {"g000": 2, "g001": 1},
            "commonit_balance_lengths": True,
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 1,
        },
        None,
        [
            "commonit_weights",
            "commonit_balance_lengths",
            "per_device_train_batch_size",
            "commonit_purity",
            "commonit_remainder",
            "gradient_accumulation_steps",
            "token lengths",
            ORDER,
        ],
    ),
    "tokens of the data": ({}, "tokens", ["tokens of rows"]),
}
DIFFERENT_GROUPS = {
    "grouping options": ({"commonit_min_group_size": 10}, None),
    "groups of the data": ({}, "groups"),
    "order of the data": ({}, "order"),
    "fewer rows": ({}, "fewer rows"),
}


def assert_both_stop(answer, directory, names):
    differing = ", ".join(names)
    stop_with(
        f"The ranks would train different batches: rank 1 differs from rank 0 in {differing}. Give", answer, directory
    )


def stop_with(error, answer, directory):
    assert answer["codes"] == [1, 1] and not answer["hung"], answer
    assert all(f"ValueError: {error}" in output for output in answer["output"]), answer["output"]
    for log in directory.glob("*.jsonl"):
        assert '"ids"' not in log.read_text(encoding="utf-8"), "a batch was trained"


@pytest.mark.parametrize("case", CASES)
def test_ranks_with_different_plans_stop(server, tmp_path, case):
    options, data, names = CASES[case]
    differs = {"rank_options": {"1": options}, "data": {"1": data} if data else {}}
    assert_both_stop(server.do(**RUN, name="run", dir=str(tmp_path), **differs), tmp_path, names)


@pytest.mark.parametrize("case", DIFFERENT_GROUPS)
def test_ranks_with_different_groups_stop(server, tmp_path, case):
    options, data = DIFFERENT_GROUPS[case]
    differs = {"rank_options": {"1": options}, "data": {"1": data} if data else {}}
    answer = server.do(**RUN, name="run", dir=str(tmp_path), **differs)
    stop_with("commonit_metric='task': rows or grouping options of rank 1 differ", answer, tmp_path)


@pytest.mark.parametrize("packing", [False, True])
def test_all_ranks_stop_when_one_disables_commonit(server, tmp_path, packing):
    """Such a rank skips the collectives that compare plans and, with packing, group the rows."""
    run = {**RUN, "options": {**OPTIONS, "packing": packing, "max_length": 64}, "name": "run", "dir": str(tmp_path)}
    answer = server.do(**run, rank_options={"1": {"commonit_metric": "none"}})
    assert_both_stop(answer, tmp_path, ["commonit_metric"])
