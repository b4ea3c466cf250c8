"""CommonIT in TRL: `CommonITSFTTrainer`, which is `SFTTrainer` with `CommonITMixin`.

TRL's own here: the forms of its rows, and packing, which happens while it prepares them. So the groups are fitted in
the middle of the preparation, and each group is packed alone.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from trl import SFTConfig, SFTTrainer, pack_dataset

from commonit_trl.config import CommonITArguments
from commonit_trl.grouping.dropped import NO_TRAINED_TOKEN
from commonit_trl.grouping.fit import Grouping, fit_grouping
from commonit_trl.grouping.tracing import TracedRows, split_row_numbers, truncation_reason, with_row_numbers
from commonit_trl.rows import Rows
from commonit_trl.sanitize import sanitize
from commonit_trl.trainer.mixin import CommonITMixin


@dataclass(kw_only=True)
class CommonITSFTConfig(CommonITArguments, SFTConfig):
    """`SFTConfig` with the `commonit_*` options; `HfArgumentParser` and `TrlParser` read it."""


@dataclass(frozen=True, kw_only=True)
class PreparedRows:
    """Training rows prepared by TRL, not packed, without the rows that training cannot use."""

    dataset: Dataset
    numbers: NDArray[np.int64]
    """(rows,) row number of each in the raw dataset."""
    rows: Rows
    traced: tuple[TracedRows, ...]
    """The rows that training cannot use."""


class CommonITSFTTrainer(CommonITMixin, SFTTrainer):
    """TRL's `SFTTrainer` with group-pure batches; takes what `SFTTrainer` takes, and a `CommonITSFTConfig`.

    With `packing=True` each group is packed alone, by TRL's strategies; a step then holds packs of one group.
    """

    _commonit_raw_dataset: Dataset | None = None  # while the parent, as it is constructed, prepares the training set
    _commonit_prepared: tuple[Grouping, NDArray[np.integer[Any]]] | None = None

    def commonit_check(self, options: Any, dataset: Any) -> None:
        super().commonit_check(options, dataset)
        self._commonit_raw_dataset = dataset

    def commonit_group(self) -> tuple[Grouping, NDArray[np.integer[Any]]]:
        return self._commonit_prepared or super().commonit_group()

    def commonit_rows(self, dataset: Dataset) -> Rows:
        return sft_rows(self, dataset, self.args)

    # A private name of TRL: packing happens in it, after which rows cannot be told apart, so it is the only place to
    # group before packing. tests/unit/test_platform.py fails when TRL changes its signature.
    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """Prepare as TRL does; group the training set, and with packing pack each group alone."""
        prepare = super()._prepare_dataset
        if self._commonit_raw_dataset is None or dataset is not self._commonit_raw_dataset:
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        self._commonit_raw_dataset = None  # the same object may be given for evaluation as well

        def unpacked(raw: Dataset, max_length: int | None, name: str) -> Dataset:
            kept = copy.copy(args)
            kept.max_length = max_length
            kept.use_liger_kernel = False  # with it, TRL 1.9 drops the columns that grouping reads
            return prepare(raw, processing_class, kept, False, formatting_func, name)

        prepared = prepare_rows(self, dataset, args, packing, unpacked, dataset_name)
        if not len(prepared.dataset):
            return prepared.dataset
        grouping = fit_grouping(args, prepared.rows, prepared.traced)
        if not packing:
            self._commonit_prepared = grouping, grouping.group_ids
            return prepared.dataset
        packs, pack_groups = pack_by_group(prepared.dataset, grouping.group_ids, grouping.names, args)
        self._commonit_prepared = grouping, pack_groups
        return packs

    def commonit_is_packed(self, dataset: Dataset) -> bool:
        packing = self.args.packing if self.args.eval_packing is None else self.args.eval_packing
        return packing and set(dataset.column_names) <= {"input_ids", "labels", "seq_lengths"}


def prepare_rows(
    trainer: Any,
    raw: Dataset,
    args: Any,
    packing: bool,
    prepare: Callable[[Dataset, int | None, str], Dataset],
    name: str = "train",
) -> PreparedRows:
    """Prepare the training rows without packing, and trace the rows that training cannot use.

    Args:
        trainer: an `SFTTrainer`, whose tokenizer and chat template are used.
        prepare: prepares (raw rows, max_length, name for progress bars) as TRL does without packing.

    Raises:
        ValueError: with `packing=True` and no `max_length`.
    """
    if packing and args.max_length is None:
        raise ValueError("packing=True: max_length, the tokens of a pack, is not set. Set max_length.")
    max_length = None if packing else args.max_length  # packing truncates rows itself
    cut_at = args.max_length if packing and args.packing_strategy == "bfd" else None
    dataset, numbers = split_row_numbers(prepare(with_row_numbers(raw), max_length, name))
    rows, traced = sft_rows(trainer, dataset, args, max_length=cut_at), []
    missing = np.setdiff1d(np.arange(len(raw)), numbers)
    if len(missing):
        untruncated = prepare(raw.select(missing), None, f"dropped {name}")
        # Rows without a label to train on are dropped even so; then their group is read from the raw rows.
        whole = untruncated if len(untruncated) == len(missing) else raw.select(missing)
        traced.append(
            TracedRows(reason=truncation_reason(max_length), numbers=missing, rows=sft_rows(trainer, whole, args))
        )
    trained = rows.trained_counts() > 0
    if not trained.all():
        untrained = np.flatnonzero(~trained)
        whole = sft_rows(trainer, dataset.select(untrained), args)  # before packing truncates them
        traced.append(TracedRows(reason=NO_TRAINED_TOKEN, numbers=numbers[untrained], rows=whole))
        kept = np.flatnonzero(trained)
        dataset, numbers, rows = dataset.select(kept), numbers[kept], rows.select(kept)
    return PreparedRows(dataset=dataset, numbers=numbers, rows=rows, traced=tuple(traced))


def sft_rows(trainer: Any, dataset: Dataset, args: Any, max_length: int | None = None) -> Rows:
    """Return prepared rows as the groupers read them.

    Args:
        trainer: an `SFTTrainer`.
        max_length: cut token counts off here, for rows that packing truncates.
    """
    return Rows(
        dataset,
        trainer._tokenizer,
        max_length=max_length,
        keep_end=max_length is None and args.truncation_mode == "keep_end",  # packing cuts rows at their end
        text_field=args.dataset_text_field,
        chat_template=trainer.chat_template,
    )


def pack_by_group(
    prepared: Dataset, group_ids: NDArray[np.integer[Any]], names: list[str], args: Any
) -> tuple[Dataset, NDArray[np.int64]]:
    """Pack each group alone.

    Returns:
        The packs, and the (packs,) group of each.
    """
    rows = prepared.select_columns(["input_ids", "labels"])
    groups, packs = np.unique(group_ids), []
    with PartialState().main_process_first():  # as TRL does: the other ranks read what the first one cached
        for group in groups:
            members = rows.select(np.flatnonzero(group_ids == group))
            packs.append(_pack(members, args, f"Packing {sanitize(names[group])}"))
    return concatenate_datasets(packs), np.repeat(groups, [len(pack) for pack in packs])


def _pack(rows: Dataset, args: Any, description: str) -> Dataset:
    # In one process: `pack_dataset` packs the share of each process alone, and most groups are small.
    options: dict[str, Any] = {"desc": description}
    if args.packing_strategy != "wrapped":
        return pack_dataset(rows, args.max_length, args.packing_strategy, options)
    # TRL 1.9's own takes the tokens of other rows wherever a batch is a slice of a longer table.
    options |= {"batched": True, "fn_kwargs": {"max_length": args.max_length}}
    return rows.with_format("arrow").map(_wrap, **options).with_format(None)


def _wrap(rows: pa.Table, max_length: int) -> pa.Table:
    """The tokens of `rows` one after the other, cut every `max_length`."""
    columns = {}
    for name in rows.column_names:
        lists = rows[name].combine_chunks()
        tokens = lists.flatten()  # unlike `values`, only those of this slice
        offsets = pa.array([*range(0, len(tokens), max_length), len(tokens)], lists.offsets.type)
        columns[name] = type(lists).from_arrays(offsets, tokens)
    return pa.table(columns)
