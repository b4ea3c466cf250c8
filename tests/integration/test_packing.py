"""Packing: each group is packed alone, as TRL would pack its rows alone, and no token is lost.

The tokens of each group have their own range, so that the group of a pack can be read from its tokens.
"""

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from helpers.trainers import groups_of_steps, make_trainer, train, without_run_times
from trl import SFTTrainer

from commonit_trl import CommonITSFTTrainer

STRATEGIES = ["bfd", "bfd_split", "wrapped"]
MAX_LENGTH = 32
TOKENS_OF_A_GROUP = 60
SIZES = [1300, 150, 40]  # more than 1000 rows, because TRL packs in map batches of 1000


def packed_rows(group_sizes=SIZES, ordered=False, seed=0):
    """Tokenised rows of 4 to 15 tokens, a few longer than `MAX_LENGTH`, with a masked start."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(group_sizes)), group_sizes)
    rows = []
    for group in groups if ordered else rng.permutation(groups):
        length = int(rng.integers(4, 16)) if rng.random() < 0.98 else int(rng.integers(33, 80))
        tokens = rng.integers(0, TOKENS_OF_A_GROUP, length) + group * TOKENS_OF_A_GROUP
        rows.append({"input_ids": tokens.tolist(), "labels": [-100, -100, *tokens[2:].tolist()], "task": f"g{group}"})
    return Dataset.from_list(rows)


def group_of(row):
    groups = {token // TOKENS_OF_A_GROUP for token in row.tokens}
    assert len(groups) == 1, f"a pack holds {groups}"
    return groups.pop()


def train_packed(directory, rows, strategy, **arguments):
    options = {"packing": True, "packing_strategy": strategy, "max_length": MAX_LENGTH}
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    return train(directory, rows, **{**options, **sizes, **arguments})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_group_is_packed_as_trl_packs_it_alone(tmp_path, strategy):
    """Rows and labels are those that `SFTTrainer` trains when it is given one group after the other."""
    rows = packed_rows()
    _, seen = train_packed(tmp_path / "ours", rows, strategy)
    assert set(groups_of_steps(seen, group_of)) == {0, 1, 2}
    expected = Counter()
    for task in ("g0", "g1", "g2"):
        members = rows.select(np.flatnonzero(np.array(rows["task"]) == task))
        _, parent_seen = train_packed(tmp_path / task, members, strategy, trainer_class=SFTTrainer)
        expected += parent_seen.rows
    assert seen.rows == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_token_is_lost(tmp_path, strategy):
    """I2: every token is trained once, also of rows ordered by group; only `bfd` cuts rows at `max_length`."""
    rows = packed_rows([1300, 150, 1], ordered=True)
    _, seen = train_packed(tmp_path, rows, strategy, gradient_accumulation_steps=1)
    assert set(groups_of_steps(seen, group_of)) == {0, 1, 2}
    cut = MAX_LENGTH if strategy == "bfd" else None
    expected = Counter(token for tokens in rows["input_ids"] for token in tokens[:cut])
    assert Counter(token for row in seen.rows.elements() for token in row.tokens) == expected


@pytest.mark.parametrize(("strategy", "option"), [("bfd", "shuffle_dataset"), ("wrapped", "padding_free")])
def test_options_keep_packs_pure(tmp_path, strategy, option):
    rows = packed_rows([60, 50])
    _, seen = train_packed(tmp_path, rows, strategy, **{option: True})
    groups_of_steps(seen, group_of)
    cut = MAX_LENGTH if strategy == "bfd" else None
    assert sum(len(row.tokens) for row in seen.rows.elements()) == sum(len(ids[:cut]) for ids in rows["input_ids"])


@pytest.mark.parametrize(("strategy", "bins"), [("bfd", {0, 1}), ("bfd_split", {0, 1, 2}), ("wrapped", {0, 1, 2})])
def test_length_is_measured_before_packing(tmp_path, strategy, bins):
    """Metric `length` bins rows, not packs; those that `bfd` will cut are measured as cut."""
    rows = packed_rows([200])
    options = {"commonit_metric": "length", "commonit_length_edges": [10, 33], "commonit_length_of": "total"}
    trainer, seen = train_packed(tmp_path, rows, strategy, **options)
    assert set(trainer.commonit_group_ids) == bins
    if strategy == "bfd":  # its rows are still whole in the packs
        steps = groups_of_steps(seen, lambda row: len(row.tokens) >= 10)
        assert set(steps) == {False, True}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packed_evaluation_is_the_parents(tmp_path, strategy):
    """A packed evaluation set has no groups, so there are the parent's metrics only."""
    options = {"packing": True, "packing_strategy": strategy, "max_length": MAX_LENGTH}
    metrics = []
    for trainer_class in (CommonITSFTTrainer, SFTTrainer):
        options["extra"] = {"eval_dataset": packed_rows([20, 20], seed=1)}
        directory = tmp_path / trainer_class.__name__
        trainer = make_trainer(directory, packed_rows([20, 20]), trainer_class=trainer_class, **options)
        metrics.append(without_run_times(trainer.evaluate()))
    assert metrics[0] == metrics[1]


def test_unpacked_evaluation_of_packed_training(tmp_path):
    extra = {"eval_dataset": packed_rows([20, 20], seed=1)}
    trainer, _ = train_packed(tmp_path, packed_rows([20, 20]), "bfd", extra=extra, eval_packing=False)
    assert {"eval_g0_loss", "eval_g1_loss"} <= set(trainer.evaluate())


def test_packing_needs_max_length(tmp_path):
    with pytest.raises(ValueError, match="packing=True: max_length"):
        train_packed(tmp_path, packed_rows([20]), "bfd", max_length=None)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packs_do_not_depend_on_the_number_of_processes(tmp_path, strategy):
    packs = []
    for processes in (None, 2):
        options = {"packing": True, "packing_strategy": strategy, "max_length": MAX_LENGTH}
        trainer = make_trainer(tmp_path / str(processes), packed_rows([60, 20]), dataset_num_proc=processes, **options)
        packs.append(trainer.train_dataset["input_ids"][:])
    assert packs[0] == packs[1]
