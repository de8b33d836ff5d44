"""Our own indexed shards, with the label in the JSON member."""

from __future__ import annotations

from pathlib import Path

from longclip.data.shards import open_dataset
from longclip.errors import UserError
from longclip.evaluate.classes import Classification
from longclip.evaluate.readers.labels import Labelled, Labels, dig, listed, reading


def read(task: Classification, data: Path, labels: Path | None) -> Labelled:
    """``label`` and ``candidates`` are fields of the JSON member: ``facts.0`` is the first of the list ``facts``."""
    dataset = open_dataset(data)
    places = [(shard, i) for shard, size in enumerate(dataset.sizes) for i in range(size)]
    rows = Labels(task)
    for row, (shard, index) in enumerate(places):
        with reading(dataset.root / dataset.names[shard]):
            key, _, fields = dataset.fields_and_text(shard, index)
        where = f"{data}, sample {key}"
        found = {}
        for path in (*task.label, *([task.candidates] if task.candidates else [])):
            try:
                found[path] = dig(fields, path)
            except KeyError:
                raise UserError(f"{where} has no field {path!r}; it has {listed(list(fields)) or 'none'}") from None
        values = [found[path] for path in task.label]
        own = found[task.candidates] if task.candidates else None
        rows.add(row, key, values, own, f"{where}, field {', '.join(task.label)}")

    def image(row: int) -> bytes:
        shard, index = places[row]
        with reading(dataset.root / dataset.names[shard]):
            return dataset.read(shard, index).image

    return rows.labelled(image, [dataset.hash])
