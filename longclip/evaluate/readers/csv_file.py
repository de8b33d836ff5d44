"""A table of image paths and labels."""

from __future__ import annotations

import csv
from pathlib import Path

from longclip.data.shards import unsafe
from longclip.errors import UserError
from longclip.evaluate.classes import Classification
from longclip.evaluate.readers.folder import image_file
from longclip.evaluate.readers.labels import Labelled, Labels, file_there, no_such, reading


def read(task: Classification, data: Path, labels: Path | None) -> Labelled:
    """A CSV (``.tsv``: by tabs) in UTF-8 with a line of column names; one image, or one question, a row.

    Paths start at the CSV's folder; or ``data`` is where they start, and ``labels`` the CSV. They stay below it.
    Several labels, and candidates, are a JSON list in their column.
    """
    table = file_there(labels or data, "a .csv file" + ("" if labels else "; or a folder, and its CSV under `labels`"))
    root = data if labels else data.parent
    if not root.is_dir():
        raise UserError(f"no such folder: {root}; valid is the one that the image paths of {table.name} start from")
    column, label = task.columns()
    rows, paths = Labels(task), []
    with reading(table), open(table, newline="", encoding="utf-8-sig") as file:
        lines = csv.DictReader(file, delimiter="\t" if table.suffix == ".tsv" else ",", strict=True)
        try:
            names = lines.fieldnames or []
            for name in (column, *label, *([task.candidates] if task.candidates else [])):
                if names.count(name) != 1:
                    raise no_such(table, "column" if name not in names else "single column", name, names)
            for row, line in enumerate(lines):
                where = f"{table}, line {lines.line_num}"
                if None in line.values() or None in line:
                    raise UserError(f"{where} has not as many cells as there are columns ({len(names)})")
                path = line[column]
                if not path or unsafe(path) or not (root / path).is_file():
                    why = "leads out of the folder" if unsafe(path) else "is no file"
                    raise UserError(f"{where}, column {column}: {path!r} {why}; paths start at {root}")
                values: list[str | None] = [line[name] for name in label]
                own = (line[task.candidates] or None) if task.candidates else None
                if task.candidates:
                    values = [values[0] or None]
                rows.add(row, path, values, own, f"{where}, column {', '.join(label)}")
                paths.append(path)
        except UnicodeDecodeError:
            raise UserError(f"{table} is not text in UTF-8") from None
        except csv.Error as error:
            raise UserError(f"{table}, line {lines.line_num} is not a line of a CSV ({error})") from None
    sizes = [(root / path).stat().st_size for path in paths]
    return rows.labelled(lambda row: image_file(root / paths[row]), sizes)
