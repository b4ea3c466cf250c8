"""The base class of groupers: read rows, fit groups, assign rows to groups, save.

    rows --read--> values (hashed by the cache) --fit--> groups --assign--> group ids

A saved grouper is `groups.json` (metric, options, group names, fitted numbers) and, for groupers with arrays,
`groups.safetensors`. No pickle.
"""

import contextlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from commonit_trl.files import write_arrays, write_text
from commonit_trl.grouping.ranks import ALONE, Ranks
from commonit_trl.rows import Rows

logger = logging.getLogger(__name__)

GROUPS_FILE = "groups.json"
ARRAYS_FILE = "groups.safetensors"
FORMAT = 2
_OPTIMAL = 1_000


class Grouper(ABC):
    """Base class of the groupers; a new metric implements the abstract methods.

    `options` are the constructor's keyword arguments, as JSON values. `fit` sets `names`, the groups in the order of
    their ids, and `notices`, warnings about the groups.
    """

    metric: str

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.names: list[str] = []
        self.notices: list[str] = []

    @abstractmethod
    def read(self, rows: Rows) -> Any:
        """Return the values of `rows` that this metric groups by."""

    def hashed(self, values: Any) -> Any:
        """Return the parts of `values` that determine the groups: an array, a list of strings, or a tuple of them."""
        return values

    @abstractmethod
    def fit_values(self, values: Any) -> None:
        """Fit the groups to `values`: set `names` and append to `notices`."""

    @abstractmethod
    def assign_values(self, values: Any) -> NDArray[np.int64]:
        """Return (rows,) group ids, -1 for unassigned rows."""

    def subset(self, values: Any, numbers: NDArray[np.int64]) -> Any:
        """Return the values of the rows of these numbers, in ascending order."""
        return values[numbers]

    def coordinates(self) -> NDArray[Any] | None:
        """Return (groups, dimensions) numbers by which groups are near each other; None where none are."""
        return None

    def positions(self) -> NDArray[np.float64] | None:
        """Return (groups,) numbers that put near groups side by side; None where no group is near another.

        Groups with one coordinate are in its order. Others are the leaves of a hierarchical clustering by cosine, in
        its optimal order up to `_OPTIMAL` groups.
        """
        coordinates = self.coordinates()
        if coordinates is None or coordinates.shape[1] == 1:
            return None if coordinates is None else coordinates[:, 0].astype(np.float64)
        positions = np.zeros(len(coordinates))
        if len(coordinates) > 1:
            from scipy.cluster.hierarchy import leaves_list, linkage

            tree = linkage(coordinates, "average", "cosine", optimal_ordering=len(coordinates) <= _OPTIMAL)
            positions[leaves_list(tree)] = np.arange(len(coordinates))
        return positions

    @contextlib.contextmanager
    def resources(self) -> Iterator[None]:
        """Hold what fitting and assigning need, such as an encoder, over several calls."""
        yield

    def fit_assign(self, values: Any, ranks: Ranks = ALONE) -> NDArray[np.int64]:
        """Fit the groups to `values` and return their (rows,) group ids.

        Args:
            values: what `read` returned.
            ranks: ranks that call this with the same values, to split slow work between them.
        """
        ranks.run(lambda: self.fit_values(values))
        return ranks.run(lambda: self.assign_values(values))

    def identity(self) -> dict[str, Any]:
        """Return everything besides the values that determines the groups: metric, options, model and reference."""
        return {"metric": self.metric, **self.options}

    def fitted_numbers(self) -> dict[str, Any]:
        """Return the fitted state to save in `groups.json`, besides `names`."""
        return {}

    def fitted_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the fitted state to save in `groups.safetensors`."""
        return {}

    @abstractmethod
    def restore(self, numbers: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        """Set the fitted state from the values of `fitted_numbers` and `fitted_arrays`."""

    def fit(self, rows: Rows) -> Self:
        """Fit the groups to `rows` and return the grouper."""
        self.fit_values(self.read(rows))
        self.log_notices()
        return self

    def assign(self, rows: Rows) -> NDArray[np.int64]:
        """Return (rows,) group ids, -1 for unassigned rows (an unseen task)."""
        return self.assign_values(self.read(rows))

    def log_notices(self) -> None:
        """Log `notices` as warnings; a loaded grouper keeps those of its fit."""
        for notice in self.notices:
            logger.warning(notice)

    def description(self) -> dict[str, Any]:
        """Return the content of `groups.json`: the fitted grouper without its arrays."""
        return {
            "format": FORMAT,
            "metric": self.metric,
            "options": self.options,
            "names": self.names,
            "notices": self.notices,
            "fitted": self.fitted_numbers(),
            "arrays": sorted(self.fitted_arrays()),
        }

    def save(self, directory: str | Path, **notes: Any) -> None:
        """Write the fitted grouper into `directory`, creating it if needed.

        Args:
            directory: read back by `load_grouper`.
            notes: JSON values to add to `groups.json` for human readers; `load_grouper` ignores them.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        arrays = self.fitted_arrays()
        if arrays:
            write_arrays(directory / ARRAYS_FILE, arrays)
        else:
            (directory / ARRAYS_FILE).unlink(missing_ok=True)  # of another grouper saved here before
        text = json.dumps({**self.description(), **notes}, indent=2, ensure_ascii=False)
        write_text(directory / GROUPS_FILE, text)
