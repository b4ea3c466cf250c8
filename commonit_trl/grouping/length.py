"""Metric `length`: rows with a similar number of tokens in the response (or prompt, or both) form a group.

The paper groups by response length ("Statistics", section 3.1) without bin counts; quantile bins, 8 by default, are
this project's choice. Cost: one sort of the lengths, well under a second for 10^6 rows.
"""

import numpy as np
from numpy.typing import NDArray

from commonit_trl.config import DEFAULT_NUM_GROUPS
from commonit_trl.grouping.base import Grouper
from commonit_trl.grouping.column import ColumnGrouper
from commonit_trl.rows import Rows


class LengthGrouper(ColumnGrouper):
    """Groups by token count, in quantile bins or between explicit edges.

    Args:
        of: `response`, `prompt` or `total`.
        num_groups: number of quantile bins; fewer where many rows have the same length.
        edges: ascending token counts to use instead of quantiles; bin i holds edges[i - 1] <= tokens < edges[i].
        min_size: bins with fewer rows merge with their smaller neighbour.
    """

    metric = "length"
    quantity = "length"
    fewer_groups = "Set a lower number, or commonit_length_edges."

    def __init__(
        self,
        *,
        of: str = "response",
        num_groups: int = DEFAULT_NUM_GROUPS["length"],
        edges: list[int] | None = None,
        min_size: int = 1,
    ) -> None:
        Grouper.__init__(self, of=of, num_groups=num_groups, edges=edges, min_size=min_size)

    def read(self, rows: Rows) -> NDArray[np.int64]:
        return rows.token_counts(self.options["of"])

    def _explicit_edges(self) -> NDArray[np.int64] | None:
        edges = self.options["edges"]
        return None if edges is None else np.asarray(edges, dtype=np.int64)

    @property
    def _prefix(self) -> str:
        return self.options["of"]
