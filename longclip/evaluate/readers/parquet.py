"""Parquet with the images' bytes in it, as the hub of Hugging Face has datasets."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from longclip.errors import SiteError, UserError
from longclip.evaluate.classes import Classification
from longclip.evaluate.readers.labels import Forward, Labelled, Labels, dig, no_such

ROWS = 16
"""images read at once"""


def read(task: Classification, data: Path, labels: Path | None) -> Labelled:
    """A file, all of a folder, or ``FOLDER/test-*.parquet``, in the order of their names.

    The image's column holds bytes, or ``{bytes, path}`` as ``datasets.Image`` does; labels and candidates may lie
    within a struct (``questions.stain.answer``). A path without bytes is not followed.
    """
    files = _files(data)
    column, label = task.columns()
    wanted = (*label, *([task.candidates] if task.candidates else []))
    rows, groups, row = Labels(task), list[tuple[Path, int, int]](), 0
    for path in files:
        with _opened(path) as file:
            roots = [_root(path, file, name) for name in wanted]
            if column not in file.schema_arrow.names:
                raise no_such(path, "column", column, file.schema_arrow.names)
            kind = file.schema_arrow.field(column).type
            if _bytes_of(kind) is None:
                raise UserError(f"{path}: column {column} is {kind}; valid is binary, or a struct with bytes")
            within = 0
            for group in range(file.num_row_groups):
                groups.append((path, group, file.metadata.row_group(group).num_rows))
                for batch in file.iter_batches(2**12, row_groups=[group], columns=list(dict.fromkeys(roots))):
                    for line in batch.to_pylist():
                        where = f"{path}, row {within}"
                        values = [_value(line, name, path) for name in label]
                        own = _value(line, task.candidates, path) if task.candidates else None
                        rows.add(row, f"{path.name}:{within}", values, own, f"{where}, column {', '.join(label)}")
                        row, within = row + 1, within + 1
    return rows.labelled(_Images(groups, column), [path.stat().st_size for path in files])


class _Images:
    """Image i over all files; within a row group front to back, and from group to group at once."""

    def __init__(self, groups: list[tuple[Path, int, int]], column: str) -> None:
        self._groups, self._column = groups, column
        self._ends = list(accumulate(size for _, _, size in groups))
        self._at, self._within = -1, Forward[Any](lambda: iter(()))

    def __call__(self, row: int) -> bytes:
        at = bisect_right(self._ends, row)
        if at != self._at:
            path, group, _ = self._groups[at]
            self._at, self._within = at, Forward(lambda: self._stream(path, group))
        value = self._within(row - (self._ends[at - 1] if at else 0))
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise ValueError("no bytes")
        return bytes(data)

    def _stream(self, path: Path, group: int) -> Iterator[Any]:
        with _opened(path) as file:
            struct = _bytes_of(file.schema_arrow.field(self._column).type) == "struct"
            name = f"{self._column}.bytes" if struct else self._column
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=[name]):
                yield from batch.column(0).to_pylist()


def _files(data: Path) -> list[Path]:
    pattern = data / "*.parquet" if data.is_dir() else data
    files = [data] if data.is_file() else sorted(pattern.parent.glob(pattern.name))
    if not files:
        raise UserError(
            f"no such file: {pattern}; valid is a .parquet file, a folder of them, or FOLDER/test-*.parquet"
        )
    return files


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise SiteError(f"reading {path.name} needs pyarrow", 'pip install "longclip[evaluate]"') from None
    try:
        # read page by page: by default a whole row group is held, and a file may be a single one
        with ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            yield file
    except (pyarrow.ArrowException, ValueError, OSError) as error:  # a text that is not UTF-8 is a ValueError
        raise UserError(f"{path} cannot be read as parquet ({str(error).splitlines()[0]})") from None


def _root(path: Path, file: Any, name: str) -> str:
    """The column that a dotted name begins with."""
    columns = file.schema_arrow.names
    root = name if name in columns else name.partition(".")[0]
    if root not in columns:
        raise no_such(path, "column", name, columns)
    return str(root)


def _value(line: dict[str, Any], name: str, path: Path) -> Any:
    try:
        return dig(line, name)
    except KeyError:
        root = name.partition(".")[0]
        there = list(line[root]) if isinstance(line.get(root), dict) else []
        raise no_such(path, "field", name, [f"{root}.{part}" for part in there]) from None


def _bytes_of(kind: Any) -> str | None:
    import pyarrow.types as types

    if types.is_struct(kind):
        inner = [kind.field(i) for i in range(kind.num_fields) if kind.field(i).name == "bytes"]
        return "struct" if inner and _bytes_of(inner[0].type) == "binary" else None
    return "binary" if types.is_binary(kind) or types.is_large_binary(kind) else None
