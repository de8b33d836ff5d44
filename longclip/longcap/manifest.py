"""The manifest of built shards: what is in them, what is not and why, and what they were made with."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from longclip.data.shards import Index, ShardEntry, write_aside
from longclip.longcap.unit import Pair

MANIFEST, SKIPPED = "manifest.json", "skipped.jsonl"
BIN = 32
"""tokens of a bar of the histograms"""


class Tally:
    """What a shard's pairs are, counted while they pass."""

    def __init__(self) -> None:
        self.licenses: Counter[str] = Counter()
        self.tokens: dict[str, Counter[str]] = {"caption": Counter(), "long_caption": Counter()}
        """number of captions by their length's bar: "64" is from 64 to 95 tokens"""
        self.total: Counter[str] = Counter()

    def passing(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        for pair in pairs:
            self.licenses[pair.fields["article_license"]] += 1
            for name, tokens in zip(self.tokens, pair.tokens, strict=True):
                self.tokens[name][str(tokens // BIN * BIN)] += 1
                self.total[name] += tokens
            yield pair

    def as_dict(self) -> dict[str, Any]:
        return {"licenses": self.licenses, "tokens": self.tokens, "total": self.total}

    def add(self, other: dict[str, Any]) -> None:
        self.licenses.update(other["licenses"])
        self.total.update(other["total"])
        for name, bars in self.tokens.items():
            bars.update(other["tokens"][name])


def write_skipped(file: BinaryIO, lines: Iterable[bytes]) -> tuple[dict[str, int], str]:
    """Writes the lines; their number by reason, most frequent first, and the sha256 (hex) of it all."""
    reasons: Counter[str] = Counter()
    digest = hashlib.sha256()
    for line in lines:
        reasons[json.loads(line)["reason"]] += 1
        digest.update(line)
        file.write(line)
    return dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))), digest.hexdigest()


def finish(
    dst: Path, facts: dict[str, Any], counts: dict[str, Any], shards: list[dict[str, Any]], skipped: Iterable[bytes]
) -> None:
    """Writes index.json, skipped.jsonl and, last, manifest.json.

    Args:
        facts: what the build was begun with.
        counts: articles found, and pairs by split.
        shards: of each shard ``entry`` (its line of the index) and ``tally``.
        skipped: a JSON line for everything that was left out.
    """
    shards = sorted(shards, key=lambda shard: str(shard["entry"]["name"]))
    entries = tuple(ShardEntry.model_validate(shard["entry"]) for shard in shards)
    tally = Tally()
    for shard in shards:
        tally.add(shard["tally"])
    with write_aside(dst / "index.json") as file:
        file.write(Index(version=1, root=".", shards=entries).model_dump_json(indent=1).encode() + b"\n")
    with write_aside(dst / SKIPPED) as file:
        reasons, digest = write_skipped(file, skipped)
    manifest = {
        "version": 1,
        **facts,
        **counts,
        "licenses": dict(sorted(tally.licenses.items())),
        "tokens": {
            "counted_by": facts["options"]["tokenizer"] or "words",
            "bar": BIN,
            **{
                name: {"total": tally.total[name], "histogram": {k: bars[k] for k in sorted(bars, key=int)}}
                for name, bars in tally.tokens.items()
            },
        },
        "skipped": reasons,
        "sha256": {SKIPPED: digest, **{entry.name: entry.sha256 for entry in entries}},
    }
    with write_aside(dst / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n")
