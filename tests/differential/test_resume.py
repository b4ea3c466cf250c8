"""I4: a run of any trainer that resumes in the middle of its second epoch trains what an uninterrupted run trains.

The inputs of the model and of `compute_loss`, the gradients, the logged metrics and the final weights are equal, bit
for bit, with dropout on: all kinds of trainer in one process, the preference trainers on two ranks.
"""

import pytest
import torch
from helpers.kinds import KINDS, Run, counts, dataset, differences, load, train
from helpers.launch import WORKER, start

EPOCHS, STEPS_PER_EPOCH, SAVED = 2, 6, 8
RESUMED = {"num_train_epochs": EPOCHS, "save_strategy": "steps", "save_steps": SAVED, "dropout": 0.1}
# transformers saves their weights under names that it does not load at a resume, with and without CommonIT.
NOT_RELOADED = ("sft-moe", "sft-vision", "vit-classes")
PREFERENCES = ("dpo", "dpo-precomputed", "reward", "kto", "orpo", "cpo")


@pytest.fixture(autouse=True)
def one_thread_and_own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "kind", [pytest.param(KINDS[name], id=name, marks=() if name == "sft" else pytest.mark.slow) for name in KINDS]
)
def test_i4_a_resumed_run_trains_the_remaining_batches(kind, tmp_path) -> None:
    if kind.form == "images":
        pytest.importorskip("PIL")
    whole = train(kind.make(tmp_path / "whole", "task", **RESUMED))
    resumed = train(
        kind.make(tmp_path / "resumed", "task", **RESUMED), resume=tmp_path / "whole" / "out" / f"checkpoint-{SAVED}"
    )
    assert set(counts(whole.rows).values()) == {EPOCHS}
    if kind.name in NOT_RELOADED:
        assert resumed.rows == whole.rows[SAVED:]
        return
    found = unlike_the_rest_of(whole, resumed)
    assert not found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, list[Run]]:
    """The runs `<kind>` and `<kind>-resumed` of `PREFERENCES`: name -> run of each rank."""
    directory, runs = tmp_path_factory.mktemp("ranks"), []
    for kind in PREFERENCES:
        rows = f"{kind}.jsonl"
        dataset(KINDS[kind].form).to_json(directory / rows)
        run = {"kind": kind, "metric": "task", "rows": rows, "options": {**RESUMED, "gradient_accumulation_steps": 2}}
        runs.append({"name": kind, **run})
        runs.append({"name": f"{kind}-resumed", "resume": f"{kind}/out/checkpoint-{SAVED}", **run})
    done = start(WORKER.with_name("rank_worker.py"), runs, directory, world_size=2)
    assert done.returncode == 0, done.stderr[-2000:]
    return {run["name"]: [load(directory / f"{run['name']}.rank{rank}.pt") for rank in (0, 1)] for run in runs}


@pytest.mark.parametrize("kind", PREFERENCES)
def test_i4_two_ranks_resume_at_the_remaining_batches(kind, two_ranks) -> None:
    whole, resumed = two_ranks[kind], two_ranks[f"{kind}-resumed"]
    assert min(counts(whole[0].rows + whole[1].rows).values()) >= EPOCHS
    for rank in (0, 1):
        found = unlike_the_rest_of(whole[rank], resumed[rank])
        assert not found


def unlike_the_rest_of(whole: Run, resumed: Run) -> list[str]:
    """List the differences of a resumed run from the same steps of the whole run."""
    assert len(whole.steps) == EPOCHS * STEPS_PER_EPOCH
    rest = {name: getattr(whole, name)[SAVED:] for name in ("steps", "losses", "updates")}
    found = [path for name in rest for path in differences(rest[name], getattr(resumed, name), name)]
    logs = (list(map(comparable, run.logs[SAVED:-1])) for run in (whole, resumed))  # the last has means of the run
    return found + differences(*logs, "logs") + differences(whole.weights, resumed.weights, "weights")


def comparable(entry: dict[str, float]) -> dict[str, float]:
    """Leave out TRL's count of trained tokens, which restarts with each resume."""
    return {name: value for name, value in sorted(entry.items()) if name != "num_tokens"}
