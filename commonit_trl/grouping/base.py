"""What every metric's grouper is: read rows, fit groups, assign rows to them; save and load.

    rows --read--> values (what the cache hashes) --fit--> groups --assign--> group ids

A saved grouper is `groups.json` (metric, options, group names, fitted numbers) and, where it holds arrays,
`groups.safetensors`. No pickle.
"""

import json
import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self, get_type_hints

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors.numpy import load_file

from commonit_trl.files import write_arrays, write_text
from commonit_trl.grouping.work import ALONE, Work
from commonit_trl.rows import Rows

logger = logging.getLogger(__name__)

GROUPS_FILE = "groups.json"
ARRAYS_FILE = "groups.safetensors"
FORMAT = 1


class Grouper(ABC):
    """Base class of the groupers; a new metric implements the methods that are abstract here.

    `options` are the constructor's keyword arguments, JSON values that say which grouper this is. After
    `fit`, `names` lists the groups in the order of their ids, and `notices` says what the user should know
    about them.
    """

    metric: ClassVar[str]

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.names: list[str] = []
        self.notices: list[str] = []

    @abstractmethod
    def read(self, rows: Rows) -> Any:
        """What this metric looks at in `rows`."""

    def hashed(self, values: Any) -> Any:
        """What decides the groups in what `read` returned: a numpy array, a list of strings, or a tuple of them."""
        return values

    @abstractmethod
    def fit_values(self, values: Any) -> None:
        """Find the groups in what `read` returned, set `names` and add to `notices`."""

    @abstractmethod
    def assign_values(self, values: Any) -> NDArray[np.int64]:
        """(rows,) group ids of what `read` returned, -1 for a row that belongs to none of the fitted groups."""

    def fit_assign(self, values: Any, work: Work = ALONE) -> NDArray[np.int64]:
        """Fit to what `read` returned and assign the same rows.

        Args:
            work: how processes that do the same share what takes long.
        """
        self.fit_values(values)
        return self.assign_values(values)

    def identity(self) -> dict[str, Any]:
        """What decides the groups besides the rows' values: metric, options, state of model and reference."""
        return {"metric": self.metric, **self.options}

    def fitted_numbers(self) -> dict[str, Any]:
        """The fitted state that `groups.json` holds besides `names`."""
        return {}

    def fitted_arrays(self) -> dict[str, NDArray[Any]]:
        """The fitted state that `groups.safetensors` holds."""
        return {}

    @abstractmethod
    def restore(self, numbers: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        """Set the fitted state from what `fitted_numbers` and `fitted_arrays` gave."""

    def fit(self, rows: Rows) -> Self:
        """Fit the groups to `rows`; returns the grouper."""
        self.fit_values(self.read(rows))
        self.log_notices()
        return self

    def assign(self, rows: Rows) -> NDArray[np.int64]:
        """(rows,) the group id of each row, -1 where it belongs to none (a task that `fit` did not see)."""
        return self.assign_values(self.read(rows))

    def log_notices(self) -> None:
        """Tell the user what fitting noticed; loaded groups tell it again."""
        for notice in self.notices:
            logger.warning(notice)

    def description(self) -> dict[str, Any]:
        """The fitted grouper as JSON values, arrays left out: the content of `groups.json`."""
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
        """Write the fitted grouper into `directory`, which is made where needed.

        Args:
            notes: JSON values that `groups.json` holds besides, for people; `load_grouper` does not read them.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        arrays = self.fitted_arrays()
        if arrays:
            write_arrays(directory / ARRAYS_FILE, arrays)
        else:
            (directory / ARRAYS_FILE).unlink(missing_ok=True)  # of another grouper that was saved here before
        text = json.dumps({**self.description(), **notes}, indent=2, ensure_ascii=False)
        write_text(directory / GROUPS_FILE, text)


def load_grouper(directory: str | Path) -> Grouper:
    """The grouper that `Grouper.save` wrote into `directory`.

    Raises:
        ValueError: naming the file that is missing, damaged or of another format.
    """
    from commonit_trl.grouping.build import GROUPERS

    path = Path(directory) / GROUPS_FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']}, this version reads {FORMAT}")
        kind, texts = GROUPERS[saved["metric"]], TypeAdapter(list[str])
        types = get_type_hints(kind.__init__)
        options = {name: TypeAdapter(types[name]).validate_python(value) for name, value in saved["options"].items()}
        grouper = kind(**options)
        grouper.names, grouper.notices = (texts.validate_python(saved[name]) for name in ("names", "notices"))
        arrays = {}
        if saved["arrays"]:
            path = path.with_name(ARRAYS_FILE)
            arrays = load_file(path)
        grouper.restore(saved["fitted"], arrays)
    except Exception as error:  # a damaged file fails in the parser's own way
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{path} is not a readable set of groups ({reason}): fit and save them again.") from error
    return grouper
