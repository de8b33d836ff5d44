"""A folder for each class, as LC25000 and most sets of single images come: the folder's name is the label."""

from __future__ import annotations

import os
from pathlib import Path

from longclip.data.shards import IMAGE_EXTENSIONS, MAX_MEMBER
from longclip.errors import UserError
from longclip.evaluate.classes import Classification
from longclip.evaluate.readers.labels import Labelled, Labels, listed, reading


def read(task: Classification, data: Path, labels: Path | None) -> Labelled:
    """Images lie in their class's folder, which lies anywhere below ``data``, in the order of their paths.

    Files whose extension is not an image's are no images. Links to folders are not followed.
    """
    if not data.is_dir():
        raise UserError(f"no such folder: {data}; valid is a folder that holds a folder for each class")
    found: list[tuple[str, str, int]] = []
    with reading(data):
        for folder, _, names in os.walk(data, onerror=_raise):
            for name in names:
                path = Path(folder, name)
                if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and path.is_file() and name[0] != ".":
                    found.append((path.relative_to(data).as_posix(), Path(folder).name, path.stat().st_size))
    found.sort()
    folders: dict[str, str] = {}
    rows = Labels(task)
    for row, (key, name, _) in enumerate(found):
        folder = key.rpartition("/")[0]
        if name not in task.classes or not folder:
            raise UserError(f"{data / key} lies in no class's folder; valid: {listed(list(task.classes))}")
        if folders.setdefault(name, folder) != folder:
            both = f"{folders[name]} and {folder}"
            raise UserError(f"{data} has two folders of {name}: {both}; give the one above a single split as data")
        rows.add(row, key, [name], None, str(data / key))
    if empty := [name for name in task.classes if name not in folders]:
        known = f"images: .{', .'.join(IMAGE_EXTENSIONS)}"
        raise UserError(
            f"no images of {listed(empty)} in {data}; every class has a folder of its name with some ({known})"
        )

    def image(row: int) -> bytes:
        return image_file(data / found[row][0])

    return rows.labelled(image, [size for _, _, size in found])


def image_file(path: Path) -> bytes:
    """The bytes of an image file. Raises ValueError where there are too many, SiteError where the disk fails."""
    with reading(path), open(path, "rb") as file:
        data = file.read(MAX_MEMBER + 1)
    if len(data) > MAX_MEMBER:
        raise ValueError(f"larger than {MAX_MEMBER // 2**20} MiB")
    return data


def _raise(error: OSError) -> None:
    raise error
