"""Make untrusted text, from a dataset or a user, safe to print.

Control characters, escape sequences and marks that change the direction of writing would act on the terminal or the
browser; each becomes its code point, such as `\\u202e`. Right-to-left letters stay. Callers handle markup: in the
terminal `rich.text.Text`, which has none; in HTML, escaping.
"""

import re
import unicodedata

_SPACES = re.compile(r"\s+")
_DIRECTION_MARKS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_CONTROLS = frozenset(("Cc", "Cs", "Zl", "Zp"))  # controls, halves of a pair, separators of lines and paragraphs


def sanitize(text: str) -> str:
    """Return `text` on one line, without characters that act on a terminal or a browser."""
    return escape(_SPACES.sub(" ", text).strip())


def escape(text: str, *, keep: str = "") -> str:
    """Escape the characters of `text` that act on a terminal or a browser.

    Args:
        text: spaces in it stay as they are.
        keep: characters not to escape.
    """
    return "".join(
        f"\\u{ord(mark):04x}"
        if mark in _DIRECTION_MARKS or (unicodedata.category(mark) in _CONTROLS and mark not in keep)
        else mark
        for mark in text
    )


def cut(text: str, characters: int) -> str:
    """Return at most `characters` of `text`; an ellipsis replaces the others."""
    return text if len(text) <= characters else text[: characters - 1] + "…"
