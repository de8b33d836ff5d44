"""Run folders written by hand: what a trained run leaves, without training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longclip.experiment.identity import REFERENCES, identity
from longclip.experiment.schema import Experiment
from longclip.run.attempts import Attempt, claim, new_attempt
from longclip.run.folder import RunFolder, dump_experiment, read_json, write_json
from longclip.run.journal import Journal

BATCH = 100
START = 1_700_000_000.0
"""when the first attempt of every run started, in seconds since 1970"""


def experiment(window: int = 77, samples: int = 1000, name: str | None = None, **train: Any) -> Experiment:
    return Experiment.model_validate(
        {
            "name": name or f"ctx{window}",
            "model": {
                "context_length": window,
                "image": {"config": {"model_type": "vit", "hidden_size": 32}},
                "text": {"config": {"model_type": "modernbert", "hidden_size": 32}, "tokenizer": "/data/tokenizer"},
            },
            "data": {"train": "tiny-train", "val": "tiny-val", "test": "tiny-test"},
            "train": {"samples": samples, "global_batch": BATCH, "lr": 1e-3, **train},
        }
    )


def make_run(runs: Path, asked: Experiment, sweep: str = "tiny", axes: Mapping[str, Any] | None = None) -> RunFolder:
    from longclip.experiment.identity import uid

    pins = {key: f"{i:x}" * 64 for i, key in enumerate(REFERENCES)}
    facts = identity(asked, pins)
    run = RunFolder(runs / sweep / f"{asked.name}-{uid(facts)}")
    run.create(asked, facts, dict(axes or {}))
    return run


def add_attempt(run: RunFolder, started: float, ranks: int = 2) -> Attempt:
    """Queued, and claimed ``started`` seconds after START."""
    made = new_attempt(run)
    asked = run.experiment()
    (made.path / "experiment.yaml").write_text(dump_experiment(asked))
    job = str(100 + made.number)
    record = {"executor": "slurm", "job": job, "samples": asked.train.samples, "code": "c0dec0de", "commit": "9f31c02"}
    write_json(made.path / "submitted.json", record)
    attempt = claim(
        run, made.number, job, {"nodes": ["n1", "n2"], "ranks": ranks, "code": "c0dec0de", "device": "cuda:0"}
    )
    write_json(attempt.path / "started.json", {**read_json(attempt.path / "started.json"), "time": START + started})
    return Attempt(attempt.path)


def train(
    attempt: Attempt,
    resumed: int,
    until: int,
    since: float,
    losses: Mapping[int, float] | None = None,
    val: Mapping[int, float] | None = None,
) -> None:
    """A point every BATCH samples from ``resumed`` on, one every 10 s from ``since`` (seconds after START).

    Every step keeps 60 tokens a caption and cuts 40 off. ``val`` gives the mean R@1 at some positions.
    """
    attempt.begin(resumed)
    journal = Journal(attempt.journal)
    for i, samples in enumerate(range(resumed + BATCH, until + 1, BATCH)):
        when = START + since + 10 * i
        loss = (losses or {}).get(samples, 5.0 - samples / 1000)
        metrics = {"train/loss": loss, "text/tokens": 60.0 * BATCH, "text/tokens_cut": 40.0 * BATCH}
        journal.write(samples // BATCH, samples, metrics, when)
        if val and samples in val:
            scores = {f"val/{k}_recall_at_1": val[samples] for k in ("i2t", "t2i", "mean")}
            journal.write(samples // BATCH, samples, scores, when + 1)
    journal.close()


def end(attempt: Attempt, verdict: str, samples: int, when: float, message: str = "") -> None:
    write_json(
        attempt.path / "ended.json", {"verdict": verdict, "samples": samples, "message": message, "time": START + when}
    )


def save_checkpoint(run: RunFolder, samples: int) -> None:
    """What readers without torch look at: the newest checkpoint's name and position."""
    folder = run.checkpoints / f"step-{samples // BATCH:08d}"
    folder.mkdir()
    write_json(folder / "state.json", {"step": samples // BATCH, "samples": samples})
    write_json(run.checkpoints / "latest", {"checkpoint": folder.name})


def save_test(run: RunFolder, i2t: float, t2i: float, samples: int, ceiling: float | None = None) -> None:
    scores = {
        f"{side}_recall_at_{k}": min(1.0, value * k) for side, value in (("i2t", i2t), ("t2i", t2i)) for k in (1, 5, 10)
    }
    window = run.experiment().model.context_length
    record = {
        "dataset": "7" * 64,
        "checkpoint": f"step-{samples // BATCH:08d}",
        "samples": samples,
        "chosen_by": "val/mean_recall_at_1",
        "context_length": window,
        "metrics": {**scores, "mean_recall_at_1": (i2t + t2i) / 2, "pairs": 500.0, "waste": 0.4},
        "ceiling": None if ceiling is None else {"i2t": ceiling, "t2i": ceiling},
        "time": START,
    }
    write_json(run.evaluations / "test.json", record)


def finished_run(runs: Path, asked: Experiment, val: Mapping[int, float], **kwargs: Any) -> RunFolder:
    """One attempt from the first sample to the last; started at 0 s, first point at 60 s."""
    test = {k: kwargs.pop(k) for k in ("i2t", "t2i", "ceiling") if k in kwargs}
    run = make_run(runs, asked, **kwargs)
    attempt = add_attempt(run, 0)
    samples = asked.train.samples or 0
    train(attempt, 0, samples, 60, val=val)
    save_checkpoint(run, samples)
    save_test(run, **{"i2t": 0.1, "t2i": 0.1, **test}, samples=max(val, key=lambda s: val[s]))
    end(attempt, "finished", samples, 60 + 10 * samples / BATCH)
    return run
