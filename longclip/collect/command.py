"""What ``longclip collect`` is given, in words: targets to runs and models, references, where the results go."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from longclip.collect.collect import Collected, Options, write
from longclip.collect.comparison import Comparison
from longclip.collect.gather import gather
from longclip.collect.progress import cut_of
from longclip.collect.references import Reference, read_references
from longclip.collect.row import Row, count
from longclip.collect.scores import External, external
from longclip.errors import UserError
from longclip.experiment.load import REFERENCES as FILE
from longclip.run.evaluations import MODEL, MODELS
from longclip.run.folder import RunFolder, find_runs


def run(
    targets: Sequence[str],
    out: Path | None,
    given: Options,
    references: Path | None,
    root: Path | None,
    mlflow: str | None = None,
) -> tuple[Collected, list[RunFolder]]:
    """Collects ``targets`` from the folder of runs ``root``, or from the store ``mlflow``; the run folders it read.

    Raises:
        UserError: a target is nothing; what is found is not to be compared so.
        SiteError: the store cannot be reached, or the results not be written.
    """
    runs: list[RunFolder] = []
    externals: list[External] = []
    rows: list[Row] = []
    if mlflow is not None:
        from longclip.collect.store import gather_from

        rows = gather_from(mlflow, targets)
    elif root is not None:
        for target in targets:
            if target == MODELS or target.startswith(f"{MODELS}/"):
                externals += _models(root, target)
            else:
                runs += [r for r in find_runs(root, target) if r.path not in [known.path for known in runs]]
        rows = gather(runs)
    sweeps = list(dict.fromkeys(r.sweep for r in rows)) or [MODELS]
    quoted = read_references(references) if references else _beside(sweeps)
    return write(rows, out or Path("results") / sweeps[0], replace(given, references=tuple(quoted)), externals), runs


def typed(words: Sequence[str]) -> str:
    """The command line, to be typed again; without user and password of a server."""
    return re.sub(r"//[^/@\s]*@", "//", shlex.join(["longclip", *words]))


def wrote(files: Sequence[Path]) -> str:
    """``wrote results/demo/{table.csv,table.md,curves.png}``"""
    folder = files[0].parent
    return f"wrote {folder}/{{{','.join(f.name for f in files)}}}"


def next_step(comparison: Comparison) -> str | None:
    """What to type where a run that is not finished could be compared all the same."""
    late = [x.name for x in comparison.lines if not x.counts and x.best is not None]
    cut = cut_of(comparison.rows) or 0
    if comparison.cut is not None or not late:
        return None
    some = ", ".join(late[:3]) + (" ..." if len(late) > 3 else "")
    return f"{some}: shown in curves, left out of means; --trim compares all at {count(cut)} samples"


def _models(root: Path, target: str) -> list[External]:
    """All models below ``<runs>/models``, or the one that the target names by its beginning."""
    start = target.removeprefix(MODELS).lstrip("/")
    found = [external(f.parent) for f in sorted((root / MODELS).glob(f"*/{MODEL}")) if f.parent.name.startswith(start)]
    if not found:
        raise UserError(f"{target}: no such model under {root / MODELS}", "longclip evaluate MODEL --suite S makes one")
    return found


def _beside(sweeps: Sequence[str]) -> list[Reference]:
    """Those beside the experiments, where the sweeps' files stand as usual."""
    files = [Path("experiments") / sweep / FILE for sweep in sweeps]
    return [row for file in files if file.is_file() for row in read_references(file)]
