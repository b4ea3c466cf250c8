"""I3 is checked while it trains: two ranks that would not train the same plan both stop, with the same line, before the
first batch; the second rank is the one that has something else."""

import pytest

OPTIONS = {"commonit_metric": "task", "gradient_accumulation_steps": 2, "commonit_balance_lengths": False}
RUN = {"world_size": 2, "group_sizes": [9, 9], "options": OPTIONS, "limit_s": 30}
ORDER = "order of samples"
CASES = {
    "seed": ({"seed": 8}, None, ["data seed", ORDER]),
    "metric": ({"commonit_metric": "length", "commonit_num_groups": 3}, None, ["commonit_metric"]),
    "number of groups": (
        {"commonit_min_group_size": 10},
        None,
        ["number of groups", "names of groups", "assignment of rows to groups", ORDER],
    ),
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
            "commonit_purity",
            "commonit_remainder",
            "commonit_weights",
            "commonit_balance_lengths",
            "per-device batch size",
            "gradient accumulation steps",
            "token lengths",
            ORDER,
        ],
    ),
    "tokens of the data": ({}, "tokens", ["tokens of rows"]),
    "groups of the data": ({}, "groups", ["assignment of rows to groups", ORDER]),
    "order of the data": ({}, "order", ["assignment of rows to groups", "tokens of rows", ORDER]),
    "fewer rows": ({}, "fewer rows", ["rows", "assignment of rows to groups", "tokens of rows", ORDER]),
}


def assert_both_stop(answer, directory, names):
    assert answer["codes"] == [1, 1] and not answer["hung"], answer
    error = f"The ranks would train different batches: rank 1 differs from rank 0 in {', '.join(names)}. Give"
    assert all(f"ValueError: {error}" in said for said in answer["said"]), answer["said"]
    for log in directory.glob("*.jsonl"):
        assert '"ids"' not in log.read_text(encoding="utf-8"), "a batch was trained"


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_disagree_stop(server, tmp_path, case):
    options, data, names = CASES[case]
    differs = {"rank_options": {"1": options}, "data": {"1": data} if data else {}}
    assert_both_stop(server.do(**RUN, name="run", dir=str(tmp_path), **differs), tmp_path, names)


@pytest.mark.parametrize("packing", [False, True])
def test_a_rank_without_groups(server, tmp_path, packing):
    """It has no part in what the other one waits for: to compare plans, and with packing already to group the rows."""
    run = {**RUN, "options": {**OPTIONS, "packing": packing, "max_length": 64}, "name": "run", "dir": str(tmp_path)}
    answer = server.do(**run, rank_options={"1": {"commonit_metric": "none"}})
    assert_both_stop(answer, tmp_path, ["commonit_metric"])


def test_a_cache_of_other_groups(server, tmp_path):
    """One rank has a cache of its own, in which the entry of these rows holds the groups of others."""
    caches = {}
    for name, data in (("these", {}), ("others", {"0": "groups"})):
        run = {**RUN, "name": name, "dir": str(tmp_path / name), "world_size": 1, "data": data}
        (tmp_path / name).mkdir()
        assert server.do(**run)["codes"] == [0]
        caches[name] = next(path for path in (tmp_path / name / f"{name}-cache").iterdir() if path.is_dir())
    stale = caches["others"].rename(caches["others"].with_name(caches["these"].name))
    directory = tmp_path / "run"
    directory.mkdir()
    differs = {"rank_options": {"1": {"commonit_cache_dir": str(stale.parent)}}}
    answer = server.do(**RUN, name="run", dir=str(directory), **differs)
    assert_both_stop(answer, directory, ["assignment of rows to groups", ORDER])
