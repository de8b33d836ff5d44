"""Several datasets read as one: their shards counted through, in their order."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip.data.shards import Dataset, Sample


@dataclass(frozen=True)
class Sources:
    """Read by (shard, index) as each of its parts is. May be pickled and forked."""

    parts: tuple[Dataset, ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """readable samples of each shard"""
        return tuple(size for part in self.parts for size in part.sizes)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(part.sizes) for part in self.parts))

    def __len__(self) -> int:
        return sum(self.sizes)

    def _part(self, shard: int) -> tuple[Dataset, int]:
        part = bisect_right(self._ends, shard)
        return self.parts[part], shard - (self._ends[part - 1] if part else 0)

    def read(self, shard: int, index: int) -> Sample:
        """As :meth:`Dataset.read`."""
        part, shard = self._part(shard)
        return part.read(shard, index)

    def text_bytes(self, shard: int, indices: NDArray[np.int64], fields: bool) -> NDArray[np.int64]:
        """As :meth:`Dataset.text_bytes`."""
        part, shard = self._part(shard)
        return part.text_bytes(shard, indices, fields)

    def fields_and_text(self, shard: int, index: int) -> tuple[str, str, dict[str, Any]]:
        """As :meth:`Dataset.fields_and_text`."""
        part, shard = self._part(shard)
        return part.fields_and_text(shard, index)
