"""Keep an error in a part of a report from ending the run."""

import contextlib
import logging
from collections.abc import Iterator

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def optional(part: str, log: logging.Logger = logger) -> Iterator[None]:
    """Log an error in the block as a warning that `part` is missing from the report.

    A report describes a run and has no part in it, so whatever the data make it raise is caught here.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        log.warning("commonit_report: the report lacks %s (%s: %s).", part, type(error).__name__, reason)
        log.debug("The error in %s:", part, exc_info=True)
