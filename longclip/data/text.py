"""The text of a sample: a field, a template over fields, or a mix of two, as ``data.text`` says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from longclip.data.order import Draw
from longclip.data.sentences import sentences
from longclip.experiment.schema import Data
from longclip.experiment.template import template


@dataclass(frozen=True)
class Text:
    """Picks and renders. ``long`` is what validation and test see, and training with probability ``p_long``."""

    long: str
    """``txt``, the name of a json field, or a template over these"""
    short: str = ""
    p_long: float = 1.0
    shuffle: bool = False

    @classmethod
    def of(cls, data: Data) -> Text:
        if isinstance(data.text, str):
            return cls(data.text, shuffle=data.shuffle_sentences)
        return cls(data.text.long, data.text.short, data.text.p_long, data.shuffle_sentences)

    @property
    def names(self) -> tuple[str, ...]:
        """``txt`` and json fields that it may look at."""
        return tuple(dict.fromkeys(name for text in self.texts for _, name in template(text) if name))

    @property
    def texts(self) -> tuple[str, ...]:
        """The names or templates themselves."""
        return (self.long, self.short) if self.short else (self.long,)

    def __call__(self, txt: str, fields: Mapping[str, Any], draw: Draw | None = None) -> str:
        """The text of a sample with text member ``txt`` and json member ``fields``; without ``draw`` nothing is drawn.

        Raises ValueError where there is none: the other text of a mix does not stand in.
        """
        chosen = self.long
        if draw is not None and self.p_long < 1 and draw.uniforms(1, "text")[0] >= self.p_long:
            chosen = self.short
        text = render(chosen, {**fields, "txt": txt})
        if not text.strip():
            raise ValueError(f"no text in {chosen}")
        if self.shuffle and draw is not None:
            parts = [text[start:end] for start, end in sentences(text)]
            text = " ".join(parts[i] for i in draw.permutation(len(parts), "sentences").tolist())
        return text


def render(text: str, fields: Mapping[str, Any]) -> str:
    """A name or template filled from ``fields``; a name alone leaves a string as it stands.

    What is missing or null is empty. A list, or the values of a mapping such as ``image_context`` (figure id ->
    paragraphs), is its strings in order, each once, joined by a space. In a template white space is one space.
    """
    pieces = template(text)
    filled = [literal + (words(fields.get(name)) if name else "") for literal, name in pieces]
    return filled[0] if pieces == (("", text),) else " ".join("".join(filled).split())


def words(value: Any) -> str:
    """What a template takes of a field that holds ``value``: empty where that is neither text nor holds any."""
    return value if isinstance(value, str) else " ".join(dict.fromkeys(_strings(value)))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
