"""A text made of the fields of a sample."""

from __future__ import annotations

from functools import lru_cache
from string import Formatter


@lru_cache
def template(text: str) -> tuple[tuple[str, str], ...]:
    """Literals, each with the name of the field that follows it (empty after the last).

    ``"{txt} See: {a}."`` -> ``(("", "txt"), (" See: ", "a"), (".", ""))``; a text without braces is one name. ``{{``
    stands for a brace, as in Python. Raises ValueError saying what is wrong.
    """
    if "{" not in text and "}" not in text:
        pieces = [("", text)]
    else:
        pieces = []
        for literal, name, form, conversion in Formatter().parse(text):
            if form or conversion or name == "":
                raise ValueError("between braces stands the name of a field and nothing else")
            pieces.append((literal, name or ""))
    if not any(name for _, name in pieces):
        raise ValueError("names no field")
    return tuple(pieces)
