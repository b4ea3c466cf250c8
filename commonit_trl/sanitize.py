"""Text of a dataset or a user, made safe to show: what it holds stands there, and nothing in it acts.

Control characters and escape sequences would reach the terminal, and marks that turn the direction of writing would
turn the text around them; each becomes the name of its code point. Right-to-left letters stay as they are. Markup is
the business of who shows the text: `rich.text.Text`, which has none, and HTML that is escaped.
"""

import re
import unicodedata

_SPACES = re.compile(r"\s+")
_TURNS_DIRECTION = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_ACTS = frozenset(("Cc", "Cs", "Zl", "Zp"))  # controls, halves of a pair, separators of lines and paragraphs


def shown(text: str) -> str:
    """`text` on one line, without a character that a terminal or a browser would act on."""
    return escaped(_SPACES.sub(" ", text).strip())


def escaped(text: str, *, but: str = "") -> str:
    """`text` with its spaces, without a character that a terminal or a browser would act on; those in `but` stay."""
    return "".join(
        f"\\u{ord(mark):04x}"
        if mark in _TURNS_DIRECTION or (unicodedata.category(mark) in _ACTS and mark not in but)
        else mark
        for mark in text
    )


def cut(text: str, characters: int) -> str:
    """`text` in at most so many characters; an ellipsis stands for the rest."""
    return text if len(text) <= characters else text[: characters - 1] + "…"
