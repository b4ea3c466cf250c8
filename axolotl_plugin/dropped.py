"""Count the rows that Axolotl's preparation drops, by reason and group.

Steps: (1) apply Axolotl's rules for dropping rows to each tokenised entry of `datasets:`; (2) when Axolotl saves the
prepared dataset, count other missing rows, as duplicates with `dataset_exact_deduplication`; (3) store the counts in
`dataset.info.description`, which datasets saves with the rows and copies to every split, shard and selection. Cached
rows therefore have their own counts on every rank, and rows prepared again without CommonIT have none.

Groups are task labels where the metric reads them, else the entries of `datasets:`. A duplicate's entry is unknown.
One raw row can become several (`type: completion`); then a row without tokens is counted only if its group shrinks.

Cost: list lengths and labels, read once through Arrow.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from axolotl.utils.logging import get_logger
from datasets import Dataset
from numpy.typing import NDArray

from commonit_trl.grouping.dropped import NO_TRAINED_TOKEN, UNKNOWN_GROUP, DroppedRows
from commonit_trl.rows import Rows

LOG = get_logger(__name__)

NOT_TOKENIZED = "no tokens"
DUPLICATE = "duplicate (dataset_exact_deduplication)"
OTHER_REASON = "dropped by Axolotl"
_HEADER = "Rows that Axolotl's preparation dropped: "


class PreparationCount:
    """The dropped rows of one preparation: `add_entry` for each entry, then `finish`."""

    def __init__(self) -> None:
        self.dropped: Counter[tuple[str, str]] = Counter()
        self.remaining: Counter[str] = Counter()

    def add_entry(self, raw_groups: Sequence[str], tokenized: Dataset, groups: Sequence[str], cfg: Any) -> None:
        """Count the rows of an entry that tokenisation dropped and those that Axolotl will drop.

        Args:
            raw_groups: (raw rows,) group names.
            tokenized: the entry's tokenised rows.
            groups: (tokenised rows,) group names.
            cfg: Axolotl's configuration.
        """
        self._add(NOT_TOKENIZED, Counter(raw_groups) - Counter(groups))
        self.remaining.update(groups)
        for reason, unusable in _unusable_rows(tokenized, cfg).items():
            dropped = Counter(groups[row] for row in np.flatnonzero(unusable).tolist())
            self._add(reason, dropped)
            self.remaining -= dropped

    def finish(self, prepared: Dataset, groups: Sequence[str] | None, cfg: Any) -> None:
        """Store the counts in the prepared dataset.

        Args:
            prepared: the rows that Axolotl saves.
            groups: (rows,) group names, or None where the prepared rows have none.
            cfg: Axolotl's configuration.
        """
        if groups is None:
            missing = Counter({UNKNOWN_GROUP: self.remaining.total() - len(prepared)})
        else:
            missing = self.remaining - Counter(groups)
        self._add(DUPLICATE if cfg.dataset_exact_deduplication else OTHER_REASON, +missing)
        counts = [[*key, count] for key, count in sorted(self.dropped.items())]
        prepared.info.description = _HEADER + json.dumps(counts)

    def _add(self, reason: str, groups: Counter[str]) -> None:
        self.dropped.update({(reason, group): count for group, count in groups.items()})


def dropped_rows(dataset: Dataset) -> DroppedRows | None:
    """Return the rows that were dropped while Axolotl prepared a dataset.

    Args:
        dataset: prepared rows, or a split or selection of them. The counts are those of the whole preparation.

    Returns:
        None for data prepared without CommonIT.
    """
    _, found, counts = dataset.info.description.partition(_HEADER)
    if not found:
        LOG.info("Dropped rows: unknown for data prepared without CommonIT.")
        return None
    return DroppedRows(counts={(reason, group): count for reason, group, count in json.loads(counts)})


def _unusable_rows(tokenized: Dataset, cfg: Any) -> dict[str, NDArray[np.bool_]]:
    """Return the rows that `handle_long_seq_in_dataset` and `process_datasets_for_packing` drop, by reason."""
    if "input_ids" not in tokenized.column_names:
        return {}
    lengths, min_length = Rows(tokenized).token_counts("total"), cfg.min_sample_len or 2
    truncates = (cfg.excess_length_strategy or "drop").lower() == "truncate"
    unusable = {f"shorter than min_sample_len={min_length}": lengths < min_length}
    if not truncates:
        unusable[f"longer than sequence_len={cfg.sequence_len}"] = lengths > cfg.sequence_len
    if cfg.sample_packing and "labels" in tokenized.column_names:
        remain = ~np.logical_or.reduce([*unusable.values()])
        truncated = Rows(tokenized, max_length=cfg.sequence_len if truncates else None)
        unusable[NO_TRAINED_TOKEN] = remain & (truncated.trained_counts(shifted=False) == 0)  # Axolotl does not shift
    return unusable
