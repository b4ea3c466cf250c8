"""CommonIT in TRL: `CommonITSFTTrainer`, which is `SFTTrainer` with `CommonITMixin`.

What is TRL's own here: the forms of its rows, and packing, which happens while it prepares them, so that the groups are
fitted in the middle of that and each is packed alone.
"""

import contextlib
import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from trl import SFTConfig, SFTTrainer, pack_dataset

from commonit_trl.config import CommonITArguments
from commonit_trl.rows import Rows
from commonit_trl.sanitize import shown
from commonit_trl.trainer.mixin import CommonITMixin, fit_assign


@dataclass(kw_only=True)
class CommonITSFTConfig(CommonITArguments, SFTConfig):
    """`SFTConfig` with the `commonit_*` options; `HfArgumentParser` and `TrlParser` read it."""


class CommonITSFTTrainer(CommonITMixin, SFTTrainer):
    """TRL's `SFTTrainer` with group-pure batches; takes what `SFTTrainer` takes, and a `CommonITSFTConfig`.

    With `packing=True` each group is packed alone, by TRL's strategies; a step then holds packs of one group.
    """

    def _commonit_rows(self, dataset: Dataset) -> Rows:
        return sft_rows(self, dataset, self.args)

    # `_prepare_dataset` is TRL's own name: packing happens in it, after which no row can be told from another, so it is
    # the only place to group before packing. tests/unit/test_platform.py fails when TRL changes its signature.
    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """TRL's preparation; of the training set with packing, each group is packed alone."""
        if not self._commonit_on or dataset is not self._commonit_raw_train_dataset:
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        self._commonit_raw_train_dataset = None  # the same object may be given for evaluation as well
        kept = copy.copy(args)
        kept.use_liger_kernel = False  # with it, TRL 1.9 drops the columns that grouping reads
        if packing:
            if args.max_length is None:
                raise ValueError("packing=True needs max_length, the tokens of a pack: set it.")
            kept.max_length = None  # packing cuts rows itself
        prepared = super()._prepare_dataset(dataset, processing_class, kept, False, formatting_func, dataset_name)
        if not packing:
            return prepared
        cut_at = args.max_length if args.packing_strategy == "bfd" else None
        rows = sft_rows(self, prepared, args, max_length=cut_at)
        self.commonit_grouper, group_ids = fit_assign(args, rows)
        self._commonit_grouped = rows, group_ids
        return self._commonit_pack(prepared, group_ids, args)

    def _commonit_pack(self, prepared: Dataset, group_ids: NDArray[np.int64], args: Any) -> Dataset:
        """Pack each group alone, and set `commonit_group_ids` to the group of each pack."""
        assert self.commonit_grouper is not None
        rows = prepared.select_columns(["input_ids", "labels"])
        groups, packs = np.unique(group_ids), []
        with PartialState().main_process_first():  # as TRL does: the other ranks read what the first one cached
            for group in groups:
                members = rows.select(np.flatnonzero(group_ids == group))
                packs.append(_pack(members, args, f"Packing {shown(self.commonit_grouper.names[group])}"))
        self.commonit_group_ids = np.repeat(groups, [len(pack) for pack in packs])
        return concatenate_datasets(packs)

    def _commonit_is_packed(self, dataset: Dataset) -> bool:
        packing = self.args.packing if self.args.eval_packing is None else self.args.eval_packing
        return packing and set(dataset.column_names) <= {"input_ids", "labels", "seq_lengths"}

    @contextlib.contextmanager
    def _commonit_keep_eval_metrics(self) -> Any:
        kept = {name: list(values) for name, values in self._metrics["eval"].items()}  # TRL's entropy, accuracy, ...
        yield
        self._metrics["eval"].clear()
        self._metrics["eval"].update(kept)


def sft_rows(trainer: Any, dataset: Dataset, args: Any, max_length: int | None = None) -> Rows:
    return Rows(
        dataset,
        trainer._tokenizer,
        max_length=max_length,
        keep_end=max_length is None and args.truncation_mode == "keep_end",  # packing cuts rows at their end
        text_field=args.dataset_text_field,
        chat_template=trainer.chat_template,
    )


def _pack(rows: Dataset, args: Any, description: str) -> Dataset:
    options = {"num_proc": args.dataset_num_proc, "desc": description}
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
