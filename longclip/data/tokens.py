"""From text to token ids, and how many of them a window wastes.

Lengths count what the tokenizer yields, special tokens included, because the window holds those too.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

from longclip.errors import UserError


class Tokenizer:
    """A transformers tokenizer, cut to a window."""

    def __init__(self, source: str, context_length: int) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UserError(f"tokenizer {source}: {str(error).splitlines()[0]}") from None
        # The window is ours to cut; this silences a warning about texts longer than the tower was trained on.
        self._tokenizer.model_max_length = 10**9
        self.context_length = context_length
        marked = self._tokenizer("a", add_special_tokens=True, return_special_tokens_mask=True)["special_tokens_mask"]
        self._ends = next((n for n, special in enumerate(reversed(marked)) if not special), len(marked))

    def cut_to(self, window: int) -> Tokenizer:
        """The same tokenizer with another window."""
        other = copy(self)
        other.context_length = window
        return other

    @property
    def vocabulary(self) -> int:
        return len(self._tokenizer)

    def __call__(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """Token ids cut to the window, and each text's full length.

        A cut text ends in the special tokens that the tokenizer ends a text with (``[SEP]``; some have none), as
        tokenizers' own truncation leaves it.
        """
        full: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=True)["input_ids"]
        return [cut(ids, self.context_length, self._ends) for ids in full], [len(ids) for ids in full]


def cut(ids: list[int], window: int, ends: int) -> list[int]:
    """The first ``window`` of a text's ids, of which the last ``ends`` are its own last."""
    return ids if len(ids) <= window else [*ids[: max(0, window - ends)], *ids[len(ids) - ends :]]


def waste(lengths: Sequence[int], window: int) -> float:
    """Share of tokens that a window cuts off: sum max(0, L - c) / sum L (arXiv 2510.03978)."""
    total = sum(lengths)
    return sum(max(0, n - window) for n in lengths) / total if total else 0.0


def vocabulary_of(folder: Path) -> int | None:
    """Vocabulary of a tokenizer folder, read without transformers; None where it cannot be told."""
    import json

    file = folder / "tokenizer.json"
    if not file.is_file():
        vocabulary = folder / "vocab.txt"
        return len(vocabulary.read_text(encoding="utf-8").splitlines()) if vocabulary.is_file() else None
    content = json.loads(file.read_text(encoding="utf-8"))
    ids = [t["id"] for t in content.get("added_tokens", [])]
    known = content.get("model", {}).get("vocab")
    ids += list(known.values()) if isinstance(known, dict) else range(len(known or []))
    return max(ids) + 1 if ids else None
