"""The worker's side of ``longclip evaluate``: what each rank of a job does with the units that it was given.

A unit is one state of a model with the suites that it has no record on, as ``<work>/units/<key>.json`` says
(launch/evaluation.py writes it). Every record is written when its suite is done, so that nothing is computed twice.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longclip.errors import LongclipError, UserError
from longclip.evaluate.conventions import lines
from longclip.evaluate.suite import Resolved
from longclip.experiment.schema import Model
from longclip.launch.environment import before_torch
from longclip.launch.worker import set_ranks
from longclip.run import evaluations
from longclip.run.checkpoints import WEIGHTS
from longclip.run.folder import read_json, write_json

if TYPE_CHECKING:
    from longclip.evaluate.embed import Embedder
    from longclip.train.ranks import Ranks


def run(work: str, keys: Sequence[str]) -> None:
    """One rank of a job: scores the units ``keys`` of the folder ``work``, one after the other.

    Raises what went wrong, after leaving a LongclipError's words in ``<work>/failed/``.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it; there is nothing to save
    before_torch()
    set_ranks(Path(work), "evaluate")
    from longclip.train import ranks as processes

    ranks = processes.start()
    for key in keys:
        try:
            for line in score_unit(read_json(Path(work) / "units" / f"{key}.json"), ranks):
                print(line, flush=True)
        except LongclipError as error:
            folder = Path(work) / "failed"
            folder.mkdir(exist_ok=True)
            write_json(folder / f"{key}.json", {"message": error.message, "hint": error.hint, "code": error.exit_code})
            raise
    processes.stop()


def score_unit(unit: dict[str, Any], ranks: Ranks) -> Iterator[str]:
    """Scores one model on its suites; on rank 0 what is to be said of each task. Collective."""
    embedder = _embedder(unit, ranks)
    for record in unit["suites"]:
        suite, folder = Resolved.of_record(record, unit["paths"]), Path(unit["out"])
        there = evaluations.cached(folder, unit["about"]["weights"], suite.hash) if ranks.rank == 0 else None
        if ranks.tell(there) is not None:
            continue
        from longclip.evaluate.score import score

        file = evaluations.place(folder, suite.name, unit["about"]["checkpoint"])
        found = score(embedder, suite, file, unit["about"])
        if ranks.rank == 0:
            yield from (f"{unit['name']}: {line}" for line in lines(found))


def _embedder(unit: dict[str, Any], ranks: Ranks) -> Embedder:
    from longclip.data.tokens import Tokenizer
    from longclip.evaluate.embed import Embedder
    from longclip.model.clip import as_bf16
    from longclip.model.towers import pixels_of
    from longclip.train.loop import localized

    spec = localized(Model.model_validate(unit["model"]), unit["paths"])
    tokenizer = Tokenizer(unit["tokenizer"] or str(spec.text.tower), spec.context_length)
    model = _model(unit, spec, ranks)
    if unit["about"]["precision"] == "bf16":
        model = as_bf16(model)  # the figures of the job that trained it
    model = model.to(ranks.device).eval()
    return Embedder(model, model, tokenizer, pixels_of(spec.image), ranks, unit["batch"])


def _model(unit: dict[str, Any], spec: Model, ranks: Ranks) -> Any:
    from longclip.model import external
    from longclip.model.clip import build
    from longclip.train.checkpoint import load_weights, on_rank_0

    folder = Path(unit["folder"])
    if unit["form"] != "checkpoint":
        return external.load(folder, unit["form"], spec, unit["loss"])

    def check() -> None:
        # Training may go on meanwhile, and remove what it need not keep.
        if not folder.is_dir():
            raise UserError(f"{unit['name']}: its checkpoint was removed meanwhile", "the same command again")
        with (folder / f"{WEIGHTS}.safetensors").open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != unit["about"]["weights"]:
                raise LongclipError(f"{folder}: its weights are not what its manifest says", "another checkpoint")

    on_rank_0(ranks, folder, check)
    model = build(spec, 0, loss=unit["loss"])
    model.load_state_dict(load_weights(folder))
    return model
