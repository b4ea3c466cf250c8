"""Catch errors in optional parts of a report."""

import contextlib
import logging
from collections.abc import Iterator

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def optional(part: str, log: logging.Logger = logger) -> Iterator[None]:
    """Log an error in the block as a warning that the report lacks `part`.

    Catches every `Exception`: a failing report must not end the run.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        log.warning("commonit_report: the report lacks %s (%s: %s).", part, type(error).__name__, reason)
        log.debug("The error in %s:", part, exc_info=True)
