"""Carry columns of raw rows through Axolotl's data preparation, and count the rows that it drops.

Axolotl tokenises with `remove_columns=` all raw columns, may split a row in several (completion) or drop it, then
merges, shuffles, de-duplicates, filters, splits and caches. A column that a strategy's `tokenize_prompt` returns
survives all of that. With the metrics `task` and `column`, and with `commonit_embedding_column`:

1. The labels, numbers or vectors of the raw rows of an entry of `datasets:` are read, and the rows are numbered.
2. A wrapped strategy copies each raw row's number to its tokenised rows.
3. Tokenised rows get the values of their raw rows, as columns named after the source, such as `commonit_task[topic]`.
4. De-duplication ignores these columns, so it keeps the rows that Axolotl keeps without them.
5. Rows with such columns have their own cache folder, because Axolotl's packing fails on them.
6. Cached rows must have the columns of this recipe.

With every metric, `axolotl_plugin.dropped` counts the rows of the training set that preparation drops.

Axolotl has no hook for this, so `replace_in_axolotl` replaces functions of `axolotl.utils.data` with functions of this
module, which call the originals. `tests/axolotl/test_axolotl_platform.py` fails when an original changes. Cost: one
pass over the carried columns, which stay in memory until Axolotl saves the prepared rows.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import axolotl.utils.data.sft as sft
import axolotl.utils.data.shared as shared
import axolotl.utils.data.wrappers as wrappers
import numpy as np
import pyarrow as pa
from axolotl.utils.logging import get_logger
from datasets import Dataset

from axolotl_plugin.args import read_options
from axolotl_plugin.dropped import PreparationCount
from commonit_trl.cli.data import entry_labels
from commonit_trl.config import DEFAULT_TASK_COLUMNS, CommonITArguments, parts_of
from commonit_trl.grouping.registry import existing_column, resolve_task_columns
from commonit_trl.grouping.task import NO_LABEL, with_task_file
from commonit_trl.rows import Rows

LOG = get_logger(__name__)

ROW_COLUMN = "commonit_row"
_CARRIED = re.compile(r"commonit_(task|column|embedding)\[(.*)\]", re.DOTALL)
_VECTORS = pa.large_list(pa.float32())
_OPTIONS = {"column": "commonit_column", "embedding": "commonit_embedding_column"}
_TOKENS = ("input_ids", "attention_mask", "labels")
_SHARDS = ("shards", "preprocess_shards")

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
    """Replace the functions of Axolotl's data preparation that drop columns or rows."""
    for module, name in _REPLACED:
        setattr(module, name, globals()[name])


class CarriedColumns:
    """The columns of raw rows that a recipe groups by.

    Task labels come from `commonit_task_column` or `commonit_task_file`. Without them, each entry of `datasets:` is a
    task; a single entry has the labels of its first column among `commonit_trl.config.DEFAULT_TASK_COLUMNS`.

    Attributes:
        names: `task`, `column` or `embedding` -> name in the prepared dataset, `commonit_task[<source of the labels>]`.

    Raises:
        ValueError: for a task file with more than one entry, and a column that tokens have the name of.
    """

    def __init__(self, options: CommonITArguments, cfg: Any) -> None:
        self.options = options
        entries, tests = _expand(cfg.datasets), _expand(cfg.test_datasets)
        self.label_of_entry = _entry_names(cfg)
        self.only_tests = tests.keys() - entries.keys()
        by_task, file = "task" in parts_of(options.commonit_metric), options.commonit_task_file
        self.entries_are_tasks = by_task and options.commonit_task_column is None and file is None and len(entries) > 1
        sharded = any(name.startswith(_SHARDS) for entry in entries.values() for name, value in entry.items() if value)
        if file is not None and (len(entries) > 1 or sharded):
            raise ValueError(
                f"commonit_task_file={file!r}: it numbers the rows of one whole entry of datasets:, which has "
                f"{'shards' if sharded else len(entries)}. Join the entries, or set commonit_task_column."
            )
        self.names = {}
        for part, option in _OPTIONS.items():
            source = getattr(options, option)
            if source in _TOKENS:
                raise ValueError(f"{option}={source!r}: Axolotl gives its tokens this name. Rename the column.")
            if source is not None:
                self.names[part] = f"commonit_{part}[{source}]"
        if by_task:
            self.names["task"] = f"commonit_task[{self._source_of_tasks()}]"

    @classmethod
    def of_recipe(cls, cfg: Any) -> "CarriedColumns | None":
        """Return the carried columns of a recipe, which may be none; None if CommonIT is off."""
        return cls(read_options(cfg), cfg) if cfg.get("commonit_metric") not in (None, "none") else None

    @property
    def cache_suffix(self) -> str:
        return "".join(f"-commonit-{part}" for part in sorted(self.names))

    def task_options(self) -> dict[str, Any]:
        """Return the options that name the task of a prepared row."""
        if "task" not in self.names:
            return {}
        return {"commonit_task_column": [self.names["task"]], "commonit_task_file": None}

    def read(self, dataset: Dataset, entry: Any) -> dict[str, pa.Array]:
        """Read the values of the raw rows of an entry.

        A test set without them only lacks evaluation losses by group, so it causes a warning, not an error.

        Returns:
            Name in the prepared dataset -> (rows,) values. A label is empty where a row has none.

        Raises:
            ValueError: if an entry of `datasets:` lacks a column or it has unsupported values.
        """
        values = {}
        for part, name in self.names.items():
            try:
                values[name] = self._read(part, dataset, entry)
            except ValueError as error:
                if _key(entry) not in self.only_tests:
                    raise ValueError(f"datasets: path={entry.path!r}: {error}") from error
                self.warn_of_test_set(entry, str(error))
                values[name] = _missing(part, len(dataset))
        return values

    def _read(self, part: str, dataset: Dataset, entry: Any) -> pa.Array:
        options, rows = self.options, Rows(dataset)
        if part in _OPTIONS:
            column = existing_column(_OPTIONS[part], getattr(options, _OPTIONS[part]), rows.columns)
            if part == "column":
                return pa.array(rows.numbers(column))
            return pa.concat_arrays([_missing(part, 0), *map(_lists, rows.vector_chunks(column))])
        if self.entries_are_tasks:
            return pa.repeat(self.label_of_entry[_key(entry)], len(dataset))
        if options.commonit_task_file is not None:
            if _key(entry) in self.only_tests:
                raise ValueError(f"commonit_task_file={options.commonit_task_file!r} names the training rows only.")
            dataset = with_task_file(dataset, options.commonit_task_file)
        columns = resolve_task_columns(options, dataset.column_names)
        return pa.array([label or "" for label in Rows(dataset).labels(columns)], pa.string())

    def without_sources(self, tokenized: Dataset) -> Dataset:
        """Return rows that were tokenised before without the columns that were read.

        Such rows keep their columns, and collators of packed rows read all columns as numbers.
        """
        options = self.options
        sources = {options.commonit_column, options.commonit_embedding_column}
        if "task" in self.names and not self.entries_are_tasks:
            sources |= {*(options.commonit_task_column or DEFAULT_TASK_COLUMNS)}
        return tokenized.remove_columns([name for name in tokenized.column_names if name in sources])

    def attach(self, tokenized: Dataset, values: dict[str, pa.Array], entry: Any) -> Dataset:
        """Replace the row numbers of tokenised rows by the values of these raw rows.

        Args:
            tokenized: rows with `ROW_COLUMN`.
            values: as `read` returns them.

        Raises:
            ValueError: if the rows of an entry of `datasets:` have no numbers.
        """
        if ROW_COLUMN in tokenized.column_names:
            numbers = pa.array(tokenized.with_format("numpy")[ROW_COLUMN][:], pa.int64())
            tokenized = tokenized.remove_columns(ROW_COLUMN)
            values = {name: column.take(numbers) for name, column in values.items()}
        elif self.entries_are_tasks and len(values) == 1:
            values = {name: pa.repeat(column[0], len(tokenized)) for name, column in values.items()}
        else:
            problem = f"type={entry.type!r} makes rows that cannot be traced to a raw row."
            if _key(entry) not in self.only_tests:
                raise ValueError(
                    f"datasets: {problem} commonit_metric={self.options.commonit_metric!r} has no values there: give "
                    "each task an entry of its own in datasets: and remove commonit_task_column, or use "
                    "commonit_metric='length' or 'embedding'."
                )
            self.warn_of_test_set(entry, problem)
            values = {name: _missing(part, len(tokenized)) for part, name in self.names.items()}
        for name, column in values.items():
            tokenized = tokenized.add_column(name, column)
        return tokenized

    def labels(self, rows: Dataset) -> list[str] | None:
        """Return the (rows,) task labels of prepared rows, None if the metric does not read them."""
        if "task" not in self.names:
            return None
        return [label or NO_LABEL for label in Rows(rows).labels([self.names["task"]])]

    def groups(self, rows: Dataset, entry: Any) -> list[str]:
        """Return the (rows,) task labels of the prepared rows of an entry, else the entry's name."""
        labels = self.labels(rows)
        return [self.label_of_entry[_key(entry)]] * len(rows) if labels is None else labels

    def warn_of_test_set(self, entry: Any, problem: str) -> None:
        """Warn that the rows of a test set have no group."""
        LOG.warning(
            "test_datasets: path=%r: %s Its rows count in no group's evaluation loss; give the test set the columns of "
            "the training data.",
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
        """Refuse prepared rows without the columns of this recipe."""
        missing = sorted({*self.names.values()} - {*prepared.column_names})
        if missing:
            made = f"with {', '.join(carried_columns(prepared))}" if carried_columns(prepared) else "without"
            raise ValueError(
                f"commonit_metric={self.options.commonit_metric!r} needs {', '.join(missing)} of each row, and the "
                f"prepared dataset in {source} was made {made}: make it again with `axolotl preprocess {recipe}`."
            )

    def _source_of_tasks(self) -> str:
        columns, file = self.options.commonit_task_column, self.options.commonit_task_file
        if file is None:
            return "datasets" if self.entries_are_tasks else "+".join(columns or ["default"])
        try:
            content = Path(file).read_bytes()
        except OSError as error:
            raise ValueError(f"commonit_task_file={file!r} cannot be read ({error.strerror}). Name a file.") from error
        return f"{Path(file).name} {hashlib.blake2b(content, digest_size=4).hexdigest()}"


def carried_columns(dataset: Any) -> list[str]:
    """Return the carried columns of a dataset, of any recipe."""
    return [name for name in dataset.column_names or () if _CARRIED.fullmatch(name)]


def with_source_names(dataset: Dataset) -> Dataset:
    """Return prepared rows whose numbers and vectors have the names of their raw columns; groups are named by them."""
    found = {name: match for name in dataset.column_names if (match := _CARRIED.fullmatch(name))}
    names = {name: match[2] for name, match in found.items() if match[1] != "task"}
    replaced = [name for name in names.values() if name in dataset.column_names]  # of packing: length, position_ids
    return dataset.remove_columns(replaced).rename_columns(names)


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
    """Tokenise an entry with Axolotl's function, carry its columns and count the rows that it drops."""
    carried = CarriedColumns.of_recipe(cfg)

    def tokenize(raw: Any) -> tuple[Any, Any]:
        return _ORIGINAL["get_dataset_wrapper"](
            dataset_config, tokenizer, cfg, dataset_base_type, raw, dataset_prompt_style, processor
        )

    if carried is None:
        return tokenize(dataset)
    values = carried.read(dataset, dataset_config)
    raw = dataset
    if values:
        if wrappers._is_dataset_already_tokenized(dataset):
            raw = carried.without_sources(dataset)
        raw = raw.add_column(ROW_COLUMN, np.arange(len(dataset)))
    wrapped, prompter = tokenize(raw)
    if values:
        wrapped = carried.attach(wrapped, values, dataset_config)
    raw_groups = carried.groups(Dataset.from_dict(values) if values else dataset, dataset_config)
    _count.add_entry(raw_groups, wrapped, carried.groups(wrapped, dataset_config), cfg)
    return wrapped, prompter


def wrap_dataset_for_tokenized_prompt(prompt_tokenizer: Any, dataset: Any, **kwargs: Any) -> Any:
    """Tokenise with Axolotl's function and a strategy that carries the row numbers."""
    if ROW_COLUMN in (dataset.column_names or ()):
        prompt_tokenizer = _NumberedStrategy(prompt_tokenizer)
    return _ORIGINAL["wrap_dataset_for_tokenized_prompt"](prompt_tokenizer, dataset, **kwargs)


def deduplicate_and_log_datasets(
    dataset: Any, other_dataset: Any = None, dataset_name: str | None = "train", other_name: str | None = "eval"
) -> tuple[Any, Any]:
    """De-duplicate with Axolotl's function, without carried columns: the first of equal rows remains, with its own."""
    other = None if other_dataset is None else _WithoutCarried(other_dataset)
    return _ORIGINAL["deduplicate_and_log_datasets"](_WithoutCarried(dataset), other, dataset_name, other_name)


def generate_dataset_hash_from_config(cfg: Any, cfg_datasets: list, tokenizer_name: str) -> str:
    """Return Axolotl's cache key, with a suffix for rows with carried columns."""
    carried = CarriedColumns.of_recipe(cfg)
    suffix = "" if carried is None else carried.cache_suffix
    return _ORIGINAL["generate_dataset_hash_from_config"](cfg, cfg_datasets, tokenizer_name) + suffix


def load_preprocessed_dataset(cfg: Any, dataset_hash: str) -> Any:
    """Load cached rows with Axolotl's function; refuse rows without the carried columns of this recipe.

    Rows cached without any are refused too, because preparing them again could take hours.
    """
    global _count
    carried, load = CarriedColumns.of_recipe(cfg), _ORIGINAL["load_preprocessed_dataset"]
    _count = PreparationCount()
    if carried is None:
        return load(cfg, dataset_hash)
    for name in dict.fromkeys((dataset_hash, dataset_hash.removesuffix(carried.cache_suffix))):
        prepared = load(cfg, name)
        if prepared is not None:
            carried.check(prepared, str(shared.get_prepared_dataset_path(cfg, name)), cfg.axolotl_config_path)
            return prepared
    return None


def save_preprocessed_dataset(cfg: Any, dataset: Any, dataset_hash: str, split: str) -> None:
    """Save prepared rows with Axolotl's function; store the counts of dropped rows with training rows."""
    carried = CarriedColumns.of_recipe(cfg)
    if split == "train" and carried is not None:
        _count.finish(dataset, carried.labels(dataset), cfg)
    _ORIGINAL["save_preprocessed_dataset"](cfg, dataset, dataset_hash, split)


def try_load_from_hub(cfg: Any, dataset_hash: str, split: str) -> Any:
    """Load rows from the hub with Axolotl's function; refuse rows without the carried columns of this recipe.

    `axolotl preprocess` ignores such rows and prepares the dataset again.
    """
    carried = CarriedColumns.of_recipe(cfg)
    prepared = _ORIGINAL["try_load_from_hub"](cfg, dataset_hash, split)
    if carried is not None and prepared is not None:
        if cfg.is_preprocess and not {*carried.names.values()} <= {*prepared.column_names}:
            return None
        carried.check(prepared, f"{cfg.push_dataset_to_hub} ({dataset_hash})", cfg.axolotl_config_path)
    return prepared


# ----------------------------------------------------------------------------------------------------------------------


def _missing(part: str, count: int) -> pa.Array:
    """Return the (count,) values of rows that have none."""
    values = {"task": pa.scalar(""), "column": pa.scalar(np.nan)}
    return pa.repeat(values[part], count) if part in values else pa.nulls(count, _VECTORS)


def _lists(vectors: Any) -> pa.Array:
    """Return (rows, dimensions) vectors as one list per row."""
    offsets = np.arange(len(vectors) + 1) * vectors.shape[1]
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(vectors.ravel()))


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


class _NumberedStrategy:
    """A prompt tokenizing strategy that copies the numbers of raw rows to their tokenised rows."""

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy

    def __getattr__(self, name: str) -> Any:
        if name == "strategy":  # during unpickling
            raise AttributeError(name)
        return getattr(self.strategy, name)

    def tokenize_prompt(self, prompt: Mapping[str, Any]) -> dict[str, Any]:
        raw = dict(prompt)
        number = raw.pop(ROW_COLUMN)
        if not self.strategy.supports_batched:
            return {**self.strategy.tokenize_prompt(raw), ROW_COLUMN: number}
        # A batched strategy may change the number of rows, so tokenise each row alone.
        tokenized: dict[str, list[Any]] = {}
        for index, row_number in enumerate(number):
            row = self.strategy.tokenize_prompt({name: [values[index]] for name, values in raw.items()})
            made = len(next(iter(row.values()), ()))
            for name, values in {**row, ROW_COLUMN: [row_number] * made}.items():
                tokenized.setdefault(name, []).extend(values)
        return tokenized


class _WithoutCarried:
    """A dataset that yields rows without carried columns."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.dataset.remove_columns(carried_columns(self.dataset)))

    def select(self, indices: Sequence[int]) -> Dataset:
        return self.dataset.select(indices)
