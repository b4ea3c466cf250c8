"""Task labels through Axolotl's data preparation: from the raw rows to a column of the prepared dataset.

Axolotl tokenises with `remove_columns=` all raw columns, may split a row in several (completion) or drop some, then
merges, shuffles, de-duplicates, filters, splits and caches. A column that a strategy's `tokenize_prompt` returns
survives all of that, so: (1) before an entry of `datasets:` is tokenised, its rows get a label column; (2) the strategy
is wrapped so that each tokenised row carries its raw row's label on; (3) de-duplication does not look at it, so the
rows are those that Axolotl would keep without it; (4) rows with labels are cached apart from those without, which
Axolotl's own packing would not take; (5) what is read from a cache must have these labels: the column's name says where
they come from.

Axolotl has no hook there, so `replace_in_axolotl` puts functions of this module in the place of those of
`axolotl.utils.data`; they pass on what a recipe without `commonit_metric: task` asks for.
`tests/axolotl/test_axolotl_platform.py` fails when one of them changes. Cost: one pass over the label column.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import axolotl.utils.data.sft as sft
import axolotl.utils.data.shared as shared
import axolotl.utils.data.wrappers as wrappers
from datasets import Dataset

from axolotl_plugin.args import read_options
from commonit_trl.cli.data import entry_labels
from commonit_trl.config import CommonITArguments
from commonit_trl.grouping import resolve_task_columns
from commonit_trl.rows import Rows

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
        (sft, "try_load_from_hub"),
    )
}
_ORIGINAL = {name: function for (_, name), function in _REPLACED.items()}


def replace_in_axolotl() -> None:
    """Make Axolotl's data preparation carry the labels of recipes with `commonit_metric: task`."""
    for module, name in _REPLACED:
        setattr(module, name, globals()[name])


class TaskLabels:
    """The task labels of a recipe.

    They are those of `commonit_task_column`. Without it, the entries of `datasets:` are the tasks; a single entry is
    read by its first column of `commonit_trl.config.DEFAULT_TASK_COLUMNS`.

    Attributes:
        column: of the prepared dataset: `commonit_task[<where the labels come from>]`.
    """

    def __init__(self, options: CommonITArguments, cfg: Any) -> None:
        self.options = options
        entries = _expand(cfg.datasets)
        self.entries_are_tasks = options.commonit_task_column is None and len(entries) > 1
        self.label_of_entry: dict[str, str] = {}
        for group in (_expand(cfg.test_datasets), entries):
            self.label_of_entry |= zip(group, entry_labels(list(group.values())), strict=True)
        source = "datasets" if self.entries_are_tasks else "+".join(options.commonit_task_column or ["default"])
        self.column = f"{COLUMN_PREFIX}{source}]"

    @classmethod
    def of_recipe(cls, cfg: Any) -> "TaskLabels | None":
        """None for a recipe that asks for none: Axolotl may see several in a process."""
        return cls(read_options(cfg), cfg) if cfg.get("commonit_metric") == "task" else None

    def of_rows(self, dataset: Dataset, entry: Any) -> list[str]:
        """(rows,) the label of each raw row of an entry, empty where it has none."""
        if self.entries_are_tasks:
            return [self.label_of_entry[_key(entry)]] * len(dataset)
        try:
            columns = resolve_task_columns(self.options, dataset.column_names)
            return [label or "" for label in Rows(dataset).labels(columns)]
        except ValueError as error:
            raise ValueError(f"datasets: path={entry.path!r}: {error}") from error

    def check(self, prepared: Dataset, place: str, recipe: str) -> None:
        """Refuse prepared rows that do not have these labels."""
        if self.column not in prepared.column_names:
            others = label_columns(prepared)
            was = f"with other task labels ({', '.join(others)})" if others else "without task labels"
            raise ValueError(
                f"commonit_metric='task' needs the task of each row ({self.column}), and the prepared dataset in "
                f"{place} was made {was}: make it again with `axolotl preprocess {recipe}`."
            )


def label_columns(dataset: Any) -> list[str]:
    """The columns of task labels, of one recipe or another."""
    return [name for name in dataset.column_names or () if name.startswith(COLUMN_PREFIX)]


# --- in the place of Axolotl's functions of these names ---------------------------------------------------------------


def get_dataset_wrapper(
    dataset_config: Any,
    tokenizer: Any,
    cfg: Any,
    dataset_base_type: str | None,
    dataset: Any,
    dataset_prompt_style: str | None = None,
    processor: Any = None,
) -> tuple[Any, Any]:
    """Axolotl's, of an entry's raw rows with their labels."""
    task = TaskLabels.of_recipe(cfg)
    arguments = (dataset_prompt_style, processor)
    if task is None:
        return _ORIGINAL["get_dataset_wrapper"](dataset_config, tokenizer, cfg, dataset_base_type, dataset, *arguments)
    labels = task.of_rows(dataset, dataset_config)
    if wrappers._is_dataset_already_tokenized(dataset) and not task.entries_are_tasks:
        # Such rows keep their columns, and the collators of packed rows read all of them.
        dataset = dataset.remove_columns(resolve_task_columns(task.options, dataset.column_names))
    labelled = dataset.add_column(task.column, labels)
    wrapped, prompter = _ORIGINAL["get_dataset_wrapper"](
        dataset_config, tokenizer, cfg, dataset_base_type, labelled, *arguments
    )
    if task.column not in wrapped.column_names:
        if not task.entries_are_tasks:
            raise ValueError(
                f"datasets: type={dataset_config.type!r} makes rows in which a raw row's task cannot be told, so "
                "commonit_metric='task' has no labels there: give each task an entry of its own in datasets: and "
                "remove commonit_task_column, or use commonit_metric='length' or 'embedding'."
            )
        wrapped = wrapped.add_column(task.column, labels[:1] * len(wrapped))
    return wrapped, prompter


def wrap_dataset_for_tokenized_prompt(prompt_tokenizer: Any, dataset: Any, **kwargs: Any) -> Any:
    """Axolotl's, with a strategy that carries the labels."""
    for column in label_columns(dataset):
        prompt_tokenizer = _LabelledStrategy(prompt_tokenizer, column)
    return _ORIGINAL["wrap_dataset_for_tokenized_prompt"](prompt_tokenizer, dataset, **kwargs)


def deduplicate_and_log_datasets(
    dataset: Any, other_dataset: Any = None, dataset_name: str | None = "train", other_name: str | None = "eval"
) -> tuple[Any, Any]:
    """Axolotl's, which compares rows without their labels: of equal rows, the first keeps its task."""
    other = None if other_dataset is None else _WithoutLabels(other_dataset)
    return _ORIGINAL["deduplicate_and_log_datasets"](_WithoutLabels(dataset), other, dataset_name, other_name)


def generate_dataset_hash_from_config(cfg: Any, cfg_datasets: list, tokenizer_name: str) -> str:
    """Axolotl's, another one for rows with labels."""
    suffix = "" if TaskLabels.of_recipe(cfg) is None else CACHE_SUFFIX
    return _ORIGINAL["generate_dataset_hash_from_config"](cfg, cfg_datasets, tokenizer_name) + suffix


def load_preprocessed_dataset(cfg: Any, dataset_hash: str) -> Any:
    """Axolotl's; refuses rows without these labels, also where there are no others."""
    task, load = TaskLabels.of_recipe(cfg), _ORIGINAL["load_preprocessed_dataset"]
    if task is None:
        return load(cfg, dataset_hash)
    for name in (dataset_hash, dataset_hash.removesuffix(CACHE_SUFFIX)):
        prepared = load(cfg, name)
        if prepared is not None:
            task.check(prepared, str(shared.get_prepared_dataset_path(cfg, name)), cfg.axolotl_config_path)
            return prepared
    return None


def try_load_from_hub(cfg: Any, dataset_hash: str, split: str) -> Any:
    """Axolotl's; refuses rows without these labels, and does not see them where they are made again."""
    task = TaskLabels.of_recipe(cfg)
    prepared = _ORIGINAL["try_load_from_hub"](cfg, dataset_hash, split)
    if task is not None and prepared is not None:
        if cfg.is_preprocess and task.column not in prepared.column_names:
            return None
        task.check(prepared, f"{cfg.push_dataset_to_hub} ({dataset_hash})", cfg.axolotl_config_path)
    return prepared


# ----------------------------------------------------------------------------------------------------------------------


def _expand(entries: Sequence[Any] | None) -> dict[str, Any]:
    """The entries of a `datasets:`, one for each of their names, by a key that tells them apart."""
    return {_key(entry): entry for entry in shared.datasets_with_name_generator(entries or [])}


def _key(entry: Mapping[str, Any]) -> str:
    known = {name: value for name, value in entry.items() if not name.startswith("shards")}  # shards are one entry
    return json.dumps(known, sort_keys=True, default=str)


class _LabelledStrategy:
    """A prompt tokenizing strategy whose rows keep the label column of the raw rows."""

    def __init__(self, strategy: Any, column: str) -> None:
        self.strategy = strategy
        self.column = column

    def __getattr__(self, name: str) -> Any:
        if name == "strategy":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.strategy, name)

    def tokenize_prompt(self, prompt: Mapping[str, Any]) -> dict[str, Any]:
        raw = dict(prompt)
        label = raw.pop(self.column)
        if not self.strategy.supports_batched:
            return {**self.strategy.tokenize_prompt(raw), self.column: label}
        # A strategy that takes several rows may make more or fewer of them, so each goes in alone.
        tokenized: dict[str, list[Any]] = {}
        for place, row_label in enumerate(label):
            row = self.strategy.tokenize_prompt({name: [values[place]] for name, values in raw.items()})
            made = len(next(iter(row.values()), ()))
            for name, values in {**row, self.column: [row_label] * made}.items():
                tokenized.setdefault(name, []).extend(values)
        return tokenized


class _WithoutLabels:
    """A dataset as de-duplication reads it."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.dataset.remove_columns(label_columns(self.dataset)))

    def select(self, indices: Sequence[int]) -> Dataset:
        return self.dataset.select(indices)
