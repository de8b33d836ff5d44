"""What all readers give, and how a label in a file becomes the number of a class."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from longclip.errors import SiteError, UserError
from longclip.evaluate.classes import Classification

T = TypeVar("T")
Picture = bytes | NDArray[np.uint8]
"""an image file's bytes, or its pixels: [height, width] grey or [height, width, 3] RGB"""

_WHOLE = re.compile(r"[+-]?\d+(\.0*)?")
_SHOWN = 8


@dataclass(frozen=True)
class Labelled:
    """Labelled images in a fixed order."""

    keys: Sequence[str]
    """[N] what an image is called in messages"""
    labels: NDArray[np.int64]
    """[N] number of the class; of several labels [N, L] 0 or 1; with candidates [N] the place of the right one"""
    candidates: Sequence[tuple[str, ...]] | None
    """[N] what an image is told apart from, where every image has its own"""
    image: Callable[[int], Picture]
    """reads image i; cheapest asked for in order. Raises ValueError where it is broken, SiteError where the disk is"""
    hash: str
    """sha256 (hex) over keys, labels, classes or candidates, and the files' sizes (of shards their content, of .npz its
    checksums): where it is the same, results pair up image by image"""
    left_out: tuple[str, ...] = ()
    """rows of the data that ask nothing (neither label nor candidates), and are none of the N"""

    def __len__(self) -> int:
        return len(self.keys)


class Labels:
    """The labels of a task, row by row, as they are read from a file."""

    def __init__(self, task: Classification) -> None:
        self.names, self.multi = tuple(task.classes), task.multi_label
        self._number = {name: i for i, name in enumerate(self.names)}
        # Classes that are called by numbers are meant by them, whatever their places in the list.
        self._counted = not any(whole(name) is not None for name in self.names)
        self._own = task.candidates is not None
        self.keys: list[str] = []
        self.rows: list[int] = []
        """place in the file of each image that counts"""
        self.labels: list[Any] = []
        self.candidates: list[tuple[str, ...]] | None = [] if self._own else None
        self.left_out: list[str] = []

    def add(self, row: int, key: str, values: Sequence[Any], candidates: Any, where: str) -> None:
        """``values`` is the label, or one for each class. A row without label and candidates is left out.

        Raises UserError, which begins with ``where``, for a label that is none of the classes.
        """
        if self.candidates is not None:
            if not candidates and values[0] is None:
                self.left_out.append(f"{key}: no question")
                return
            texts = self._texts(candidates, where)
            self.candidates.append(texts)
            self.labels.append(self._place(values[0], texts, where))
        elif self.multi:
            self.labels.append(self._several(values if len(values) > 1 else values[0], where))
        else:
            self.labels.append(self._one(values[0], where))
        self.keys.append(key)
        self.rows.append(row)

    def labelled(self, image: Callable[[int], Picture], files: Iterable[Any]) -> Labelled:
        """``image`` reads the image of a row of the file; ``files`` tells one state of the files from another."""
        numbers = np.asarray(self.labels, dtype=np.int64)
        digest = hashlib.sha256(json.dumps([[str(f) for f in files], self.names]).encode())
        for key in self.keys:
            digest.update(key.encode(errors="surrogateescape") + b"\0")
        digest.update(numbers.tobytes())
        for texts in self.candidates or ():
            digest.update(json.dumps(texts).encode())
        rows, own = self.rows, self.candidates
        return Labelled(self.keys, numbers, own, lambda i: image(rows[i]), digest.hexdigest(), tuple(self.left_out))

    def _one(self, value: Any, where: str) -> int:
        count = whole(value)
        number = self._number.get(str(value), self._number.get(str(count)))
        if number is None and self._counted:
            number = count
        if number is None or not 0 <= number < len(self.names):
            numbers = f", or their numbers 0 to {len(self.names) - 1}" if self._counted else ""
            raise UserError(f"{where} is {_shown(value)}; valid: {listed(self.names)}{numbers}")
        return number

    def _several(self, values: Any, where: str) -> list[int]:
        """0 or 1 for each class, from such a list or from the names of those that are there."""
        if isinstance(values, np.ndarray):
            values = values.tolist()
        if isinstance(values, str):
            with _as_user_error(where, "a list"):
                values = json.loads(values)
        if isinstance(values, (list, tuple)) and all(isinstance(v, str) and v in self._number for v in values):
            return [int(name in values) for name in self.names]
        numbers = [whole(v) for v in values] if isinstance(values, (list, tuple)) else []
        if len(numbers) == len(self.names) and all(n in (0, 1) for n in numbers):
            return [int(n or 0) for n in numbers]
        valid = f"0 or 1 for each of the {len(self.names)} classes, or a list of names among {listed(self.names)}"
        raise UserError(f"{where} is {_shown(values)}; valid: {valid}")

    @staticmethod
    def _texts(candidates: Any, where: str) -> tuple[str, ...]:
        if isinstance(candidates, str):
            with _as_user_error(f"{where}: candidates", "a list of texts"):
                candidates = json.loads(candidates)
        texts = tuple(candidates) if isinstance(candidates, (list, tuple)) else ()
        if len(texts) < 2 or not all(isinstance(t, str) and t.strip() for t in texts):
            raise UserError(f"{where}: candidates are {_shown(candidates)}; valid is a list of two texts or more")
        if len(set(texts)) < len(texts):
            raise UserError(
                f"{where}: candidates are {_shown(candidates)}, one of them twice; no text tells them apart"
            )
        return texts

    @staticmethod
    def _place(value: Any, texts: tuple[str, ...], where: str) -> int:
        if isinstance(value, str) and value in texts:
            return texts.index(value)
        number = whole(value)
        if number is None or not 0 <= number < len(texts):
            raise UserError(f"{where} is {_shown(value)}; valid: one of {listed(texts)}, or its place from 0")
        return number


def whole(value: Any) -> int | None:
    """A whole number, also as text or as a float (as tables with gaps have them); None for anything else."""
    if isinstance(value, str):
        return int(float(value)) if len(value) < 16 and _WHOLE.fullmatch(value.strip()) else None
    if isinstance(value, (bool, int, np.integer, np.bool_)):
        return int(value)
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return int(value)
    return None


def dig(fields: Any, path: str) -> Any:
    """``a.b.0`` in mappings and lists within one another; a key that has dots goes first. Raises KeyError."""
    if isinstance(fields, Mapping) and path in fields:
        return fields[path]
    at = fields
    for part in path.split("."):
        if isinstance(at, Mapping) and part in at:
            at = at[part]
        elif isinstance(at, (list, tuple)) and part.isdecimal() and int(part) < len(at):
            at = at[int(part)]
        elif at is None:
            return None
        else:
            raise KeyError(path)
    return at


def no_such(file: Path, what: str, name: str, there: Iterable[str]) -> UserError:
    return UserError(f"{file} has no {what} {name!r}; it has {listed(list(there)) or 'none'}")


def listed(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(name if len(name) <= 60 else f"{name[:57]}..." for name in names[:_SHOWN]) + more


def file_there(path: Path, what: str) -> Path:
    """Raises UserError where there is no such file."""
    if path.is_dir() or not path.exists():
        raise UserError(f"{'a folder, not' if path.is_dir() else 'no such file:'} {path}; valid is {what}")
    return path


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises SiteError in place of a disk's errors."""
    try:
        yield
    except OSError as error:
        raise SiteError(f"cannot read {path}: {error.strerror or error}") from error


@contextmanager
def _as_user_error(where: str, valid: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError):
        raise UserError(f"{where} is not a JSON list; valid is {valid}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


class Forward(Generic[T]):
    """Item i of a stream that is read front to back, once for each time that an earlier one is asked for."""

    def __init__(self, begin: Callable[[], Iterator[T]]) -> None:
        self._begin, self._stream, self._next = begin, begin(), 0
        self._last: tuple[T, ...] = ()

    def __call__(self, index: int) -> T:
        if index < self._next - 1:
            self._stream, self._next = self._begin(), 0
        while self._next <= index:
            self._last = (next(self._stream),)
            self._next += 1
        return self._last[0]
