"""Text for a page: what data says made harmless and visible, and numbers as they are written everywhere on it."""

from __future__ import annotations

import html
import unicodedata

_JOINERS = "\u200c\u200d"
"""Zero width, but letters of Persian and Indic scripts and emoji are written with them."""
_THIN = "\u00a0"


def shown(text: str, *, keep: str = "") -> str:
    """The text with what can't be seen, or reorders what can, written out: control characters, overrides of the direction,
    marks, noncharacters.

    keep   of them the ones that stay, such as LF where lines are shown as lines
    """
    if text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() or char in keep or char in _JOINERS or unicodedata.category(char) == "Zs"
        else f"⟨U+{ord(char):04X}⟩"
        for char in text
    )


def escaped(text: str, *, keep: str = "") -> str:
    """The same for HTML, as text or as the value of a quoted attribute."""
    return html.escape(shown(text, keep=keep), quote=True)


def columns(text: str) -> float:
    """About how wide a text is in a proportional face, in letters of 0.6 em."""
    return sum(map(_column, text))


def _column(char: str) -> float:
    if unicodedata.combining(char):
        return 0
    if unicodedata.east_asian_width(char) in "WF" or char in "MWmw@%…—":
        return 1.7
    return 1.3 if char.isupper() else 1


def cut(text: str, width: float) -> str:
    """The text, or as much of its beginning as is so many columns wide."""
    if columns(text) <= width:
        return text
    end = next(i for i in range(len(text)) if columns(text[: i + 1] + "…") > width)
    return text[:end] + "…"


def count(number: int) -> str:
    """1,234."""
    return f"{number:,}"


def counted(number: int, noun: str) -> str:
    """1 row, 1,234 rows."""
    return f"{number:,}{_THIN}{noun}" + ("" if number == 1 else "s")


def share(part: float, whole: float) -> str:
    """12.3 %; what is more than nothing and less than all never reads as either."""
    if not whole:
        return f"0{_THIN}%"
    percent = 100 * part / whole
    if 0 < percent < 0.05:
        return f"<0.1{_THIN}%"
    if 99.95 <= percent < 100:
        return f">99.9{_THIN}%"
    return f"{percent:.1f}".replace("100.0", "100") + f"{_THIN}%"


def megabytes(num_bytes: float) -> str:
    """1.2 MB of 10^6 bytes, with three digits."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return (
                f"{num_bytes / size:.3g}{_THIN}{unit}"
                if num_bytes < 1000 * size
                else f"{num_bytes / size:,.0f}{_THIN}{unit}"
            )
    return f"{num_bytes:.0f}{_THIN}bytes"


def binary_size(num_bytes: int) -> str:
    """A power of two: 512 B, 4 KiB."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if num_bytes >= 1 << power:
            return f"{num_bytes >> power}{_THIN}{unit}"
    return f"{num_bytes}{_THIN}B"
