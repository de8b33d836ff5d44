"""How long a large sweep takes to collect: from run folders, and from MLflow's SQLite by its plain client.

    python tools/bench/collector.py make DIR       run folders, and the same synced into DIR/mlflow.db (minutes, once)
    python tools/bench/collector.py time DIR       both ways, whole: rows, statistics, table.csv

100 runs (4 windows x 25 seeds) of 10,000 steps with 6 metrics each, and a validation every 500 steps. Prints the times
(of the folders the median of three), their ratio, the peak memory of each way (a process of its own), and whether
the two tables are equal, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from longclip.experiment.identity import REFERENCES, identity, uid
from longclip.experiment.schema import Experiment
from longclip.run.attempts import claim, new_attempt
from longclip.run.folder import RunFolder, dump_experiment, runs_of, write_json

WINDOWS, SEEDS, STEPS, BATCH, VALIDATION = (77, 154, 256, 512), 25, 10_000, 4096, 500
START = 1_700_000_000.0
METRICS = ("train/loss", "train/grad_norm", "train/lr", "train/scale", "text/tokens", "text/tokens_cut")


def make(folder: Path, runs: int, steps: int) -> None:
    from longclip.track.mlflow import sync

    for number in range(runs):
        one_run(folder / "runs", WINDOWS[number % len(WINDOWS)], number // len(WINDOWS), steps)
    begun = time.monotonic()
    report = sync(list(runs_of(folder / "runs")), f"sqlite:///{folder / 'mlflow.db'}")
    print(f"{report}, in {time.monotonic() - begun:.0f} s", flush=True)


def one_run(root: Path, window: int, seed: int, steps: int) -> None:
    """A finished run, written as its worker would have; the numbers are drawn, but look like a run's."""
    experiment = Experiment.model_validate(
        {
            "name": f"ctx{window}_s{seed}",
            "model": {
                "context_length": window,
                "image": {"config": {"model_type": "vit"}},
                "text": {"config": {"model_type": "modernbert"}, "tokenizer": "/data/tokenizer"},
            },
            "data": {"train": "big-train", "val": "big-val", "test": "big-test"},
            "train": {"samples": steps * BATCH, "global_batch": BATCH, "lr": 5e-4, "seed": seed},
        }
    )
    facts = identity(experiment, {key: f"{i:x}" * 64 for i, key in enumerate(REFERENCES)})
    run = RunFolder(root / "big" / f"{experiment.name}-{uid(facts)}")
    if run.exists():
        return
    run.create(experiment, facts, {"model.context_length": window, "train.seed": seed})
    attempt = new_attempt(run)
    (attempt.path / "experiment.yaml").write_text(dump_experiment(experiment))
    write_json(attempt.path / "submitted.json", {"executor": "slurm", "job": "7", "samples": steps * BATCH})
    where = {"nodes": ["n1"], "ranks": 4, "code": "c0dec0de", "device": "cuda:0"}
    attempt = claim(run, attempt.number, "7", where)
    write_json(attempt.path / "started.json", {"job": "7", "time": START, **where})
    attempt.begin(0)
    draw = random.Random(f"{window} {seed}")
    best = 0.2 + 0.1 * math.log2(window / 77 + 1)
    with attempt.journal.open("w", encoding="utf-8") as f:
        for step in range(1, steps + 1):
            done = step / steps
            kept = 100.0 * BATCH * min(1.0, window / 160)
            values = (8 * math.exp(-4 * done) + draw.random(), draw.random(), 5e-4 * (1 - done), 14 + 80 * done, kept)
            metrics = dict(zip(METRICS, (*values, 160.0 * BATCH - kept), strict=True))
            line = {"t": START + 2.0 * step, "step": step, "samples": step * BATCH, "metrics": metrics}
            f.write(json.dumps(line, separators=(",", ":")) + "\n")
            if step % VALIDATION == 0:
                recall = round(5000 * (best * (1 - math.exp(-4 * done)) + 0.01 * draw.random())) / 5000
                scores = {f"val/{k}_recall_at_1": recall for k in ("i2t", "t2i", "mean")} | {"val/pairs": 5000.0}
                f.write(
                    json.dumps({**line, "t": START + 2.0 * step + 1, "metrics": scores}, separators=(",", ":")) + "\n"
                )
    recalls = {f"{side}_recall_at_{k}": min(1.0, recall + k / 100) for side in ("i2t", "t2i") for k in (1, 5, 10)}
    record = {
        "dataset": "7" * 64,
        "checkpoint": f"step-{steps:08d}",
        "samples": steps * BATCH,
        "context_length": window,
        "metrics": {**recalls, "mean_recall_at_1": recalls["i2t_recall_at_1"], "pairs": 5000.0, "waste": 0.5},
        "ceiling": None,
        "time": START,
    }
    write_json(run.evaluations / "test.json", record)
    write_json(
        attempt.path / "ended.json",
        {"verdict": "finished", "samples": steps * BATCH, "message": "", "time": START + 2.0 * steps + 60},
    )


def folders(folder: Path) -> str:
    from longclip.collect.gather import gather

    return table(gather(list(runs_of(folder / "runs"))))


def mlflow(folder: Path) -> str:
    from longclip.collect.store import gather_from

    return table(gather_from(f"sqlite:///{folder / 'mlflow.db'}", ["big"]))


def plain(folder: Path) -> str:
    """All points of all metrics by MLflow's own client, and nothing done with them: what the folders' journals hold."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("big")
    count = 0
    for run in client.search_runs([experiment.experiment_id], max_results=1000):
        for name in run.data.metrics:
            count += len([(p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)])
    return f"{count:,} points"


def table(rows: list[Any]) -> str:
    from longclip.collect.compare import compare
    from longclip.collect.frame import frame

    return str(frame(compare(rows)).to_csv(index=False))


WAYS = {"folders": folders, "plain": plain, "mlflow": mlflow}
SAYS = {
    "folders": "run folders, to table.csv",
    "plain": "MLflow client over SQLite, all points read",
    "mlflow": "longclip collect --mlflow, to table.csv",
}


def one_way(folder: Path, way: str) -> None:
    begun, busy = time.monotonic(), time.process_time()
    result = WAYS[way](folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = {"seconds": time.monotonic() - begun, "cpu": time.process_time() - busy, "GiB": peak}
    print(json.dumps({**seconds, "result": result}))


def measure(folder: Path) -> int:
    found: dict[str, Any] = {}
    # The folders take so little time that whatever else the machine did would show: before, between and after.
    for way in ("folders", "plain", "folders", "mlflow", "folders"):
        command = [sys.executable, __file__, "time", str(folder), "--way", way]
        done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(
            f"{SAYS[way]:44} {done['seconds']:7.1f} s  {done['cpu']:7.1f} s of CPU  {done['GiB']:.2f} GiB at most",
            flush=True,
        )
        found.setdefault(way, []).append(done)
    found = {way: sorted(takes, key=lambda take: take["seconds"])[len(takes) // 2] for way, takes in found.items()}
    ours, theirs = found["folders"], found["plain"]
    same = ours["result"] == found["mlflow"]["result"]
    faster = {clock: theirs[clock] / ours[clock] for clock in ("seconds", "cpu")}
    print(
        f"{theirs['result']}; folders {faster['seconds']:.1f} times as fast, by CPU time {faster['cpu']:.1f} (goal 20)"
    )
    print(f"the two tables are {'equal, byte for byte' if same else 'NOT EQUAL'}")
    print(f"{platform.machine()}, Python {platform.python_version()}")
    return 0 if same else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "time"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=len(WINDOWS) * SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--way", choices=tuple(WAYS), help="only this one, and as JSON")
    given = parser.parse_args()
    if given.what == "make":
        make(given.folder, given.runs, given.steps)
    elif given.way:
        one_way(given.folder, given.way)
    else:
        sys.exit(measure(given.folder))
