"""The arrangement: which pairs of the units go into the shards, and where. Arithmetic over hashes; no pair is read.

    train.npy, val.npy, test.npy      the pairs of a split in their order: unit, and where they lie in it
    arrangement.json                  how many pairs and shards, and what was left out. Written last.
    duplicates.jsonl                  the pairs that were left out, by key

State: 55 bytes a pair for what the units recorded, and about as much again while it is sorted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip.data.shards import write_aside
from longclip.longcap.hashes import near
from longclip.longcap.options import Options
from longclip.longcap.unit import RECORD, SPLITS, Pairs, Unit

PLACE = np.dtype([("unit", "<u4"), ("start", "<u8"), ("key", "<u2"), ("head", "<u4"), ("jpeg", "<u4")])
"""where a pair lies, 22 bytes"""

REASONS = ("", "article built already", "image seen before", "image like one of val or test")


class Arrangement:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._facts = folder / "arrangement.json"
        self.dropped = folder / "duplicates.jsonl"

    def done(self) -> bool:
        return self._facts.is_file()

    def facts(self) -> dict[str, Any]:
        """``pairs`` and ``shards`` of each split, ``dropped`` by reason."""
        return dict(json.loads(self._facts.read_text()))

    def shards(self) -> list[tuple[str, int]]:
        """Split and number of each shard."""
        return [(split, i) for split, number in self.facts()["shards"].items() for i in range(number)]

    def places(self, split: str, shard: int) -> NDArray[np.void]:
        """PLACE of each pair of a shard, in its order. Shards of a split differ by at most one pair in size."""
        facts = self.facts()
        pairs, shards = facts["pairs"][split], facts["shards"][split]
        order = np.load(self._folder / f"{split}.npy", mmap_mode="r")
        return np.array(order[shard * pairs // shards : (shard + 1) * pairs // shards])

    def make(self, units: Path, number: int, options: Options) -> None:
        """Arranges the pairs of the ``number`` units in the folder ``units``."""
        sizes = [len(Unit(units, i).records()) for i in range(number)]
        unit_of = np.repeat(np.arange(number, dtype=np.uint32), sizes)
        records = np.empty(len(unit_of), dtype=RECORD)
        for i, end in enumerate(np.cumsum(sizes)):  # read again, or all would be in memory twice
            records[end - sizes[i] : end] = Unit(units, i).records()
        why = _left_out(records, options.distance)
        facts: dict[str, Any] = {"pairs": {}, "shards": {}}
        for i, split in enumerate(SPLITS):
            mine = np.flatnonzero((why == 0) & (records["split"] == i))
            mine = mine[np.lexsort((mine, records["order"][mine]))]
            places = np.empty(len(mine), dtype=PLACE)
            places["unit"] = unit_of[mine]
            for name in ("start", "key", "head", "jpeg"):
                places[name] = records[name][mine]
            facts["pairs"][split], facts["shards"][split] = len(mine), -(-len(mine) // options.shard_size)
            with write_aside(self._folder / f"{split}.npy") as file:
                np.save(file, places)
        facts["dropped"] = {reason: int((why == i).sum()) for i, reason in enumerate(REASONS) if i and (why == i).any()}
        with Pairs(units) as pairs, write_aside(self.dropped) as file:
            for row in np.flatnonzero(why):
                skip = {"pair": pairs.key(int(unit_of[row]), records[row]), "reason": REASONS[why[row]]}
                file.write(json.dumps(skip).encode() + b"\n")
        with write_aside(self._facts) as file:
            file.write(json.dumps(facts).encode())

    def skips(self) -> Iterator[bytes]:
        """The lines of duplicates.jsonl."""
        with open(self.dropped, "rb") as file:
            yield from file


def _left_out(records: NDArray[np.void], distance: int) -> NDArray[np.uint8]:
    """Index into REASONS for each record. Of what is the same, the first in the listing stays."""
    why = np.zeros(len(records), dtype=np.uint8)
    begins = np.flatnonzero(np.diff(records["article"], prepend=np.uint32(2**32 - 1)))
    again = np.zeros(len(begins), dtype=bool)
    for name in ("doi", "pmcid"):
        again |= _occurred(records[name][begins])
    why[np.repeat(again, np.diff(begins, append=len(records)))] = 1
    left = np.flatnonzero(why == 0)
    why[left[_occurred(records["image"][left])]] = 2
    # val and test are evaluation images, too; between themselves they may be alike.
    for_training = np.flatnonzero((why == 0) & (records["split"] == 0))
    held_out = records["image"][(why == 0) & (records["split"] > 0)]
    why[for_training[near(records["image"][for_training], held_out, distance)]] = 3
    return why


def _occurred(values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each value has occurred before. 0 stands for none, and has not."""
    _, first = np.unique(values, return_index=True)
    again: NDArray[np.bool_] = values != 0
    again[first] = False
    return again
