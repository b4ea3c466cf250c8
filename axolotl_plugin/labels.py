"""Task labels through Axolotl's data preparation: from the raw rows to a column of the prepared dataset.

Axolotl tokenises with `remove_columns=` all raw columns, may split a row in several (completion) or drop some, then
merges, shuffles, de-duplicates, filters, splits and caches. A column that a strategy's `tokenize_prompt` returns
survives all of that, so: (1) before an entry of `datasets:` is tokenised, its rows get a label column; (2) the strategy
is wrapped so that each tokenised row carries its raw row's label on; (3) de-duplication does not look at it, so the
rows are those that Axolotl would keep without it; (4) a prepared dataset that is read from disk or the hub must have
it. The column's name says where the labels come from: a cache made with others is not taken for this one.

Axolotl has no hook there, so `TaskLabels.carry` replaces functions in `axolotl.utils.data`, all in this module;
`tests/axolotl/test_platform.py` fails when one of them changes. Cost: one pass over the label column.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import axolotl.utils.data.sft as sft
import axolotl.utils.data.shared as shared
import axolotl.utils.data.wrappers as wrappers
from datasets import Dataset

from commonit_trl.config import CommonITArguments
from commonit_trl.grouping import resolve_task_columns
from commonit_trl.sft import entry_labels
from commonit_trl.text import Rows

_REPLACED = {
    (module, name): getattr(module, name)
    for module, name in (
        (sft, "get_dataset_wrapper"),
        (wrappers, "wrap_dataset_for_tokenized_prompt"),
        (sft, "deduplicate_and_log_datasets"),
        (shared, "deduplicate_and_log_datasets"),
        (sft, "load_preprocessed_dataset"),
        (sft, "try_load_from_hub"),
    )
}
_ORIGINAL = {name: function for (_, name), function in _REPLACED.items()}


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
        self.column = f"commonit_task[{source}]"

    def carry(self) -> None:
        """Make Axolotl's data preparation carry the labels, until `restore_axolotl`."""
        for module, name in _REPLACED:
            setattr(module, name, getattr(self, name))

    # --- in the place of Axolotl's functions of these names -----------------------------------------------------------

    def get_dataset_wrapper(self, dataset_config: Any, *, dataset: Dataset, **arguments: Any) -> tuple[Any, Any]:
        """Axolotl's, of an entry's raw rows with their labels."""
        labels = self._labels(dataset, dataset_config)
        if "input_ids" in dataset.column_names and not self.entries_are_tasks:
            # Rows that are tokenised already keep their columns, and the collators of packed rows read all of them.
            dataset = dataset.remove_columns(resolve_task_columns(self.options, dataset.column_names))
        labelled = dataset.add_column(self.column, labels)
        wrapped, prompter = _ORIGINAL["get_dataset_wrapper"](
            dataset_config=dataset_config, dataset=labelled, **arguments
        )
        if self.column not in wrapped.column_names:
            if not self.entries_are_tasks:
                raise ValueError(
                    f"datasets: type={dataset_config.type!r} makes rows in which a raw row's task cannot be told, so "
                    "commonit_metric='task' has no labels there: give each task an entry of its own in datasets: and "
                    "remove commonit_task_column, or use commonit_metric='length' or 'embedding'."
                )
            wrapped = wrapped.add_column(self.column, labels[:1] * len(wrapped))
        return wrapped, prompter

    def wrap_dataset_for_tokenized_prompt(self, prompt_tokenizer: Any, dataset: Dataset, **arguments: Any) -> Dataset:
        """Axolotl's, with a strategy that carries the labels."""
        strategy = _LabelledStrategy(prompt_tokenizer, self.column)
        return _ORIGINAL["wrap_dataset_for_tokenized_prompt"](strategy, dataset, **arguments)

    def deduplicate_and_log_datasets(
        self, dataset: Dataset, other_dataset: Dataset | None = None, **arguments: Any
    ) -> tuple[Dataset, Dataset | None]:
        """Axolotl's, which compares rows without their labels: of equal rows, the first keeps its task."""
        other = None if other_dataset is None else _WithoutColumn(other_dataset, self.column)
        return _ORIGINAL["deduplicate_and_log_datasets"](_WithoutColumn(dataset, self.column), other, **arguments)

    def load_preprocessed_dataset(self, cfg: Any, dataset_hash: str) -> Dataset | None:
        """Axolotl's; refuses rows without these labels."""
        prepared = _ORIGINAL["load_preprocessed_dataset"](cfg, dataset_hash)
        return self._checked(prepared, str(shared.get_prepared_dataset_path(cfg, dataset_hash)), cfg)

    def try_load_from_hub(self, cfg: Any, dataset_hash: str, split: str) -> Dataset | None:
        """Axolotl's; refuses rows without these labels."""
        prepared = _ORIGINAL["try_load_from_hub"](cfg, dataset_hash, split)
        return self._checked(prepared, f"{cfg.push_dataset_to_hub} (version {dataset_hash})", cfg)

    # ------------------------------------------------------------------------------------------------------------------

    def _labels(self, dataset: Dataset, entry: Any) -> list[str]:
        """(rows,) the label of each raw row, empty where it has none."""
        if self.entries_are_tasks:
            return [self.label_of_entry[_key(entry)]] * len(dataset)
        try:
            columns = resolve_task_columns(self.options, dataset.column_names)
        except ValueError as error:
            raise ValueError(f"datasets: path={entry.path!r}: {error}") from error
        return [label or "" for label in Rows(dataset).labels(columns)]

    def _checked(self, prepared: Dataset | None, place: str, cfg: Any) -> Dataset | None:
        if prepared is not None and self.column not in prepared.column_names:
            others = [name for name in prepared.column_names if name.startswith("commonit_task[")]
            was = f"with other task labels ({', '.join(others)})" if others else "without task labels"
            raise ValueError(
                f"commonit_metric='task' needs the task of each row ({self.column}), and the prepared dataset in "
                f"{place} was made {was}: make it again with `axolotl preprocess {cfg.axolotl_config_path}`."
            )
        return prepared


def restore_axolotl() -> None:
    """Take back what `TaskLabels.carry` did."""
    for (module, name), original in _REPLACED.items():
        setattr(module, name, original)


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


class _WithoutColumn:
    """A dataset as de-duplication reads it, without one of its columns."""

    def __init__(self, dataset: Dataset, column: str) -> None:
        self.dataset = dataset
        self.column = column

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        present = {self.column} & set(self.dataset.column_names)
        return iter(self.dataset.remove_columns(list(present)))

    def select(self, indices: Sequence[int]) -> Dataset:
        return self.dataset.select(indices)
