"""Carry task labels through Axolotl's data preparation, and count the rows that it drops.

Axolotl tokenises with `remove_columns=` all raw columns, may split a row in several (completion) or drop it, then
merges, shuffles, de-duplicates, filters, splits and caches. A column that a strategy's `tokenize_prompt` returns
survives all of that. With `commonit_metric: task`:

1. The raw rows of an entry of `datasets:` get a label column before they are tokenised.
2. A wrapped strategy copies each raw row's label to its tokenised rows.
3. De-duplication ignores the labels, so it keeps the rows that Axolotl keeps without them.
4. Labelled rows have their own cache folder, because Axolotl's packing fails on the label column.
5. Cached rows must have the label column of this recipe; the column's name holds the source of the labels.

With every metric, `axolotl_plugin.dropped` counts the rows of the training set that preparation drops.

Axolotl has no hook for this, so `replace_in_axolotl` replaces functions of `axolotl.utils.data` with functions of this
module, which call the originals. `tests/axolotl/test_axolotl_platform.py` fails when an original changes. Cost: one
pass over the label column.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import axolotl.utils.data.sft as sft
import axolotl.utils.data.shared as shared
import axolotl.utils.data.wrappers as wrappers
from axolotl.utils.logging import get_logger
from datasets import Dataset

from axolotl_plugin.args import read_options
from axolotl_plugin.dropped import PreparationCount
from commonit_trl.cli.data import entry_labels
from commonit_trl.config import DEFAULT_TASK_COLUMNS, CommonITArguments
from commonit_trl.grouping import resolve_task_columns
from commonit_trl.grouping.task import NO_LABEL
from commonit_trl.rows import Rows

LOG = get_logger(__name__)

COLUMN_PREFIX = "commonit_task["
CACHE_SUFFIX = "-commonit-task"

_REPLACED = {
    (module, name): getattr(module, name)
    for module, name in (
        (sft, "get_dataset_wrapper"),
        (wrappers, "wrap_dataset_for_tokenized_prompt"),
        (sft, "deduplicate_and_log_datasets"),
        (shared, "deduplicate_and_log_datasets"),
        (sft, "generate_dataset_hash_from_config"),
        (sft, "load_preprocessed_dataset"),
        (sft, "save_preprocessed_dataset"),
        (sft, "try_load_from_hub"),
    )
}
_ORIGINAL = {name: function for (_, name), function in _REPLACED.items()}
_count = PreparationCount()  # of the dataset in preparation; Axolotl prepares one at a time


def replace_in_axolotl() -> None:
    """Replace the functions of Axolotl's data preparation that drop labels or rows."""
    for module, name in _REPLACED:
        setattr(module, name, globals()[name])


class TaskLabels:
    """The task labels of a recipe.

    The labels come from `commonit_task_column`. Without it, each entry of `datasets:` is a task; a single entry has the
    labels of its first column among `commonit_trl.config.DEFAULT_TASK_COLUMNS`.

    Attributes:
        column: name in the prepared dataset, `commonit_task[<source of the labels>]`.
    """

    def __init__(self, options: CommonITArguments, cfg: Any) -> None:
        self.options = options
        entries, tests = _expand(cfg.datasets), _expand(cfg.test_datasets)
        self.entries_are_tasks = options.commonit_task_column is None and len(entries) > 1
        self.label_of_entry = _entry_names(cfg)
        self.only_tests = tests.keys() - entries.keys()
        source = "datasets" if self.entries_are_tasks else "+".join(options.commonit_task_column or ["default"])
        self.column = f"{COLUMN_PREFIX}{source}]"

    @classmethod
    def of_recipe(cls, cfg: Any) -> "TaskLabels | None":
        """Return the labels of a recipe, or None without `commonit_metric: task`."""
        return cls(read_options(cfg), cfg) if cfg.get("commonit_metric") == "task" else None

    def of_rows(self, dataset: Dataset, entry: Any) -> list[str]:
        """Read the label of each raw row of an entry.

        A test set without labels only lacks evaluation losses by group, so it causes a warning, not an error.

        Returns:
            (rows,) labels, empty where a row has none.

        Raises:
            ValueError: if an entry of `datasets:` lacks the label column or it has unsupported values.
        """
        if self.entries_are_tasks:
            return [self.label_of_entry[_key(entry)]] * len(dataset)
        try:
            columns = resolve_task_columns(self.options, dataset.column_names)
            return [label or "" for label in Rows(dataset).labels(columns)]
        except ValueError as error:
            if _key(entry) not in self.only_tests:
                raise ValueError(f"datasets: path={entry.path!r}: {error}") from error
            self.warn_of_test_set(entry, str(error))
            return [""] * len(dataset)

    def warn_of_test_set(self, entry: Any, problem: str) -> None:
        """Warn that the rows of a test set have no task label."""
        LOG.warning(
            "test_datasets: path=%r: %s Its rows have no task label and count in no group's evaluation loss; give the "
            "test set the label column of the training data.",
            entry.path,
            problem,
        )

    def warn_of_unseen_entries(self) -> None:
        """Warn about test sets whose entry name is not a task of the training data."""
        tasks = {label for key, label in self.label_of_entry.items() if key not in self.only_tests}
        unseen = sorted({self.label_of_entry[key] for key in self.only_tests} - tasks)
        if self.entries_are_tasks and unseen:
            LOG.warning(
                "test_datasets: %s: no entry of datasets: has this name, so the rows share one evaluation group for "
                "unseen tasks. Name the test files like the training files (%s), or set commonit_task_column.",
                ", ".join(map(repr, unseen)),
                ", ".join(map(repr, sorted(tasks))),
            )

    def check(self, prepared: Dataset, source: str, recipe: str) -> None:
        """Refuse prepared rows without the labels of this recipe."""
        if self.column not in prepared.column_names:
            others = label_columns(prepared)
            was = f"with other task labels ({', '.join(others)})" if others else "without task labels"
            raise ValueError(
                f"commonit_metric='task' needs the task of each row ({self.column}), and the prepared dataset in "
                f"{source} was made {was}: make it again with `axolotl preprocess {recipe}`."
            )


def label_columns(dataset: Any) -> list[str]:
    """Return the label columns of a dataset, of any recipe."""
    return [name for name in dataset.column_names or () if name.startswith(COLUMN_PREFIX)]


# --- replacements for Axolotl's functions of the same names -----------------------------------------------------------


def get_dataset_wrapper(
    dataset_config: Any,
    tokenizer: Any,
    cfg: Any,
    dataset_base_type: str | None,
    dataset: Any,
    dataset_prompt_style: str | None = None,
    processor: Any = None,
) -> tuple[Any, Any]:
    """Tokenise an entry with Axolotl's function, carry its labels and count the rows that it drops."""
    task = TaskLabels.of_recipe(cfg)

    def tokenize(raw: Any) -> tuple[Any, Any]:
        return _ORIGINAL["get_dataset_wrapper"](
            dataset_config, tokenizer, cfg, dataset_base_type, raw, dataset_prompt_style, processor
        )

    if task is None:
        wrapped, prompter = tokenize(dataset)
        if _is_on(cfg):
            name = _entry_names(cfg)[_key(dataset_config)]
            _count.add_entry([name] * len(dataset), wrapped, [name] * len(wrapped), cfg)
        return wrapped, prompter
    labels = task.of_rows(dataset, dataset_config)
    if wrappers._is_dataset_already_tokenized(dataset) and not task.entries_are_tasks:
        # Such rows keep their columns, and collators of packed rows read all columns as numbers.
        read = task.options.commonit_task_column or DEFAULT_TASK_COLUMNS
        dataset = dataset.remove_columns([name for name in read if name in dataset.column_names])
    wrapped, prompter = tokenize(dataset.add_column(task.column, labels))
    if task.column not in wrapped.column_names:
        problem = f"type={dataset_config.type!r} makes rows that cannot be traced to a raw row and its task."
        if task.entries_are_tasks:
            made = labels[:1] * len(wrapped)
        elif _key(dataset_config) in task.only_tests:
            task.warn_of_test_set(dataset_config, problem)
            made = [""] * len(wrapped)
        else:
            raise ValueError(
                f"datasets: {problem} commonit_metric='task' has no labels there: give each task an entry of its own "
                "in datasets: and remove commonit_task_column, or use commonit_metric='length' or 'embedding'."
            )
        wrapped = wrapped.add_column(task.column, made)
    _count.add_entry([label or NO_LABEL for label in labels], wrapped, _groups(wrapped, task), cfg)
    return wrapped, prompter


def wrap_dataset_for_tokenized_prompt(prompt_tokenizer: Any, dataset: Any, **kwargs: Any) -> Any:
    """Tokenise with Axolotl's function and a strategy that carries the labels."""
    for column in label_columns(dataset):
        prompt_tokenizer = _LabelledStrategy(prompt_tokenizer, column)
    return _ORIGINAL["wrap_dataset_for_tokenized_prompt"](prompt_tokenizer, dataset, **kwargs)


def deduplicate_and_log_datasets(
    dataset: Any, other_dataset: Any = None, dataset_name: str | None = "train", other_name: str | None = "eval"
) -> tuple[Any, Any]:
    """De-duplicate with Axolotl's function, ignoring labels: the first of equal rows remains, with its task."""
    other = None if other_dataset is None else _WithoutLabels(other_dataset)
    return _ORIGINAL["deduplicate_and_log_datasets"](_WithoutLabels(dataset), other, dataset_name, other_name)


def generate_dataset_hash_from_config(cfg: Any, cfg_datasets: list, tokenizer_name: str) -> str:
    """Return Axolotl's cache key, with a suffix for labelled rows."""
    suffix = "" if TaskLabels.of_recipe(cfg) is None else CACHE_SUFFIX
    return _ORIGINAL["generate_dataset_hash_from_config"](cfg, cfg_datasets, tokenizer_name) + suffix


def load_preprocessed_dataset(cfg: Any, dataset_hash: str) -> Any:
    """Load cached rows with Axolotl's function; refuse rows without the labels of this recipe.

    Rows cached without labels are refused too, because preparing them again could take hours.
    """
    global _count
    task, load = TaskLabels.of_recipe(cfg), _ORIGINAL["load_preprocessed_dataset"]
    _count = PreparationCount()
    if task is None:
        return load(cfg, dataset_hash)
    for name in (dataset_hash, dataset_hash.removesuffix(CACHE_SUFFIX)):
        prepared = load(cfg, name)
        if prepared is not None:
            task.check(prepared, str(shared.get_prepared_dataset_path(cfg, name)), cfg.axolotl_config_path)
            return prepared
    return None


def save_preprocessed_dataset(cfg: Any, dataset: Any, dataset_hash: str, split: str) -> None:
    """Save prepared rows with Axolotl's function; store the counts of dropped rows with training rows."""
    if split == "train" and _is_on(cfg):
        task = TaskLabels.of_recipe(cfg)
        _count.finish(dataset, None if task is None else _groups(dataset, task), cfg)
    _ORIGINAL["save_preprocessed_dataset"](cfg, dataset, dataset_hash, split)


def try_load_from_hub(cfg: Any, dataset_hash: str, split: str) -> Any:
    """Load rows from the hub with Axolotl's function; refuse rows without the labels of this recipe.

    `axolotl preprocess` ignores such rows and prepares the dataset again.
    """
    task = TaskLabels.of_recipe(cfg)
    prepared = _ORIGINAL["try_load_from_hub"](cfg, dataset_hash, split)
    if task is not None and prepared is not None:
        if cfg.is_preprocess and task.column not in prepared.column_names:
            return None
        task.check(prepared, f"{cfg.push_dataset_to_hub} ({dataset_hash})", cfg.axolotl_config_path)
    return prepared


# ----------------------------------------------------------------------------------------------------------------------


def _is_on(cfg: Any) -> bool:
    return cfg.get("commonit_metric") not in (None, "none")


def _groups(prepared: Dataset, task: TaskLabels) -> list[str]:
    """Return the (rows,) group names of labelled rows."""
    return [label or NO_LABEL for label in Rows(prepared).labels([task.column])]


def _entry_names(cfg: Any) -> dict[str, str]:
    """Return the name of each entry of `datasets:` and `test_datasets:` by its key."""
    names: dict[str, str] = {}
    for group in (_expand(cfg.test_datasets), _expand(cfg.datasets)):
        names |= zip(group, entry_labels(list(group.values())), strict=True)
    return names


def _expand(entries: Sequence[Any] | None) -> dict[str, Any]:
    """Return the entries of `datasets:` by key, one per name of an entry."""
    return {_key(entry): entry for entry in shared.datasets_with_name_generator(entries or [])}


def _key(entry: Mapping[str, Any]) -> str:
    known = {
        name: value for name, value in entry.items() if not name.startswith("shards")
    }  # all shards belong to one entry
    return json.dumps(known, sort_keys=True, default=str)


class _LabelledStrategy:
    """A prompt tokenizing strategy that copies the label column of raw rows to their tokenised rows."""

    def __init__(self, strategy: Any, column: str) -> None:
        self.strategy = strategy
        self.column = column

    def __getattr__(self, name: str) -> Any:
        if name == "strategy":  # during unpickling
            raise AttributeError(name)
        return getattr(self.strategy, name)

    def tokenize_prompt(self, prompt: Mapping[str, Any]) -> dict[str, Any]:
        raw = dict(prompt)
        label = raw.pop(self.column)
        if not self.strategy.supports_batched:
            return {**self.strategy.tokenize_prompt(raw), self.column: label}
        # A batched strategy may change the number of rows, so tokenise each row alone.
        tokenized: dict[str, list[Any]] = {}
        for number, row_label in enumerate(label):
            row = self.strategy.tokenize_prompt({name: [values[number]] for name, values in raw.items()})
            made = len(next(iter(row.values()), ()))
            for name, values in {**row, self.column: [row_label] * made}.items():
                tokenized.setdefault(name, []).extend(values)
        return tokenized


class _WithoutLabels:
    """A dataset that yields rows without labels."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.dataset.remove_columns(label_columns(self.dataset)))

    def select(self, indices: Sequence[int]) -> Dataset:
        return self.dataset.select(indices)
