"""Conventions of Recall@K, by name and in words; a figure without its convention says little. How each is counted is in
ranking.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

Convention = Literal["strict", "open_clip", "clip_benchmark"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
SAYS: dict[Convention, str] = {
    "strict": "ties = misses",
    "open_clip": "open_clip's convention: an image's first caption, ties by index",
    "clip_benchmark": "CLIP_benchmark's convention: any caption of an image, ties by index",
}


def lines(record: Mapping[str, Any]) -> list[str]:
    """The record in a few words, one line a task, with every recall its convention and, of shards, which text."""
    found = []
    for name, task in record["tasks"].items():
        metrics = task["metrics"]
        if task["kind"] == "retrieval":
            text = f" ({task['text']})" if "text" in task else ""
            said = (
                f"n = {task['images']:,} images, {task['captions']:,} captions{text}, {SAYS[task['convention']]}: "
                f"R@1 i2t {100 * metrics['i2t_recall_at_1']:.1f} t2i {100 * metrics['t2i_recall_at_1']:.1f}"
            )
        else:
            said = f"n = {task['images']:,}: " + ", ".join(
                f"{key} {100 * metrics[key]:.1f}" for key in ("accuracy", "balanced_accuracy", "auc") if key in metrics
            )
        skipped = "".join(f"; {key} skipped: {why}" for key, why in task.get("skipped", {}).items())
        found.append(f"{record['suite']}/{name} at {record['checkpoint']}: {said}{skipped}")
    return found
