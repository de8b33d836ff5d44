"""``longclip longcap build`` as it is typed: here or as jobs of a cluster, and what it says."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from longclip.errors import SiteError
from longclip.launch.site import Site
from longclip.longcap.manifest import MANIFEST, SKIPPED
from longclip.longcap.options import Options
from longclip.run.folder import read_json


def build(src: Path, dst: Path, asked: Options, workers: int, slurm: tuple[Site, int] | None) -> None:
    """Builds ``dst`` and prints what it holds, or queues the jobs that will: ``slurm`` is the site and their minutes.

    Raises:
        UserError, SiteError: as :func:`longclip.longcap.build.begin` and :func:`build_here`.
    """
    missing = [name for name in ("lxml", "webdataset") if find_spec(name) is None]
    if missing:
        raise SiteError(f"building shards needs {' and '.join(missing)}", 'pip install "longclip[longcap,train]"')
    from longclip.longcap import build as steps

    if asked.tokenizer is None:
        print(f"! --budget {asked.budget} counts words: name the text tower's --tokenizer to count its tokens")
    if slurm is not None and (dst / ".build").is_dir() and _say_alive(dst):
        return
    work = steps.begin(src, dst, asked)
    if work is None:
        print(f"{dst} was built already")
    elif slurm is not None:
        _queue(work, workers, *slurm)
        return
    else:
        steps.build_here(work, workers)
    report(dst, read_json(dst / MANIFEST))


def _say_alive(dst: Path) -> bool:
    from longclip.launch.array import alive

    if jobs := alive(dst / ".build"):
        print(f"left alone: jobs {', '.join(jobs)} are at it; scancel {' '.join(jobs)} stops them")
    return bool(jobs)


def _queue(work: Any, workers: int, site: Site, minutes: int) -> None:
    from longclip.launch.array import Step, queue
    from longclip.longcap import build as steps

    dst = str(work.dst.resolve())
    each = [(dst, i, workers) for i in range(workers)]
    jobs = queue(
        work.dst.name,
        work.folder,
        [
            Step("units", steps.units_of, each),
            Step("arrange", steps.arrange, [(dst,)]),
            Step("shards", steps.shards_of, each),
            Step("finish", steps.finish, [(dst,)]),
        ],
        site,
        minutes,
    )
    print(f"queued {', '.join(jobs)}: {work.facts['articles']:,} articles on {workers} tasks -> {work.dst}")
    print("next: squeue -u $USER; the same command, when they have ended, says what was built or queues the rest")


def report(dst: Path, manifest: dict[str, Any]) -> None:
    """What a finished build holds, and what it left out."""
    pairs = ", ".join(f"{split} {number:,}" for split, number in manifest["pairs"].items())
    print(f"{manifest['articles']:,} articles -> {sum(manifest['pairs'].values()):,} pairs ({pairs})")
    licenses = ", ".join(f"{name} {number:,}" for name, number in manifest["licenses"].items())
    print(f"licences: {licenses or '-'}")
    total = {name: manifest["tokens"][name]["total"] for name in ("caption", "long_caption")}
    if total["caption"]:
        unit = "words" if manifest["options"]["tokenizer"] is None else "tokens"
        ratio = total["long_caption"] / total["caption"]
        print(f"{unit}: {total['caption']:,} in captions, {total['long_caption']:,} in long captions ({ratio:.1f}x)")
    for reason, count in manifest["skipped"].items():
        print(f"! skipped {count:,}: {reason}")
    if manifest["skipped"]:
        print(f"  by name: {dst / SKIPPED}")
    print(f"wrote {dst / MANIFEST}    use: data.train: {dst}/train-*.tar, data.text: txt or long_caption")
