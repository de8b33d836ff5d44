"""A run of two nodes on the real cluster, long enough to be hurt, and what must be true of it afterwards."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longclip.launch.status import statuses
from longclip.run.attempts import Attempt, attempts_of
from longclip.run.folder import RunFolder
from longclip.run.journal import effective, read_points
from longclip.run.verdicts import reached, verdict_of
from tests.conftest import FAULTS, Cluster, dev_cluster
from tests.launch.small import environment, longclip, the_run

BATCH, SAMPLES, SAVE_EVERY = 24, 14_400, 2_400
SETTINGS = {
    "slurm.nodes": 2,
    "slurm.tasks_per_node": 1,
    "train.samples": SAMPLES,
    "checkpoint.every": f"{SAVE_EVERY} samples",
    "evaluate.every": "4800 samples",
}


def until(true: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first value of ``true()`` that is true; fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.5)
    return value


@dataclass
class Trial:
    """One sweep folder, one runs folder, one run in it."""

    cluster: Cluster
    sweep: Path
    runs: Path
    settings: dict[str, Any] = field(default_factory=lambda: dict(SETTINGS))
    site: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def run(self) -> RunFolder:
        return the_run(self.runs, "ctx6")

    @property
    def attempts(self) -> list[Attempt]:
        return attempts_of(self.run)

    def words(self) -> list[str]:
        profile = self.runs.parent / f"{self.runs.name}-site.yaml"
        profile.write_text(json.dumps({"name": "faults", **self.site}))
        sets = [w for key, value in self.settings.items() for w in ("--set", f"{key}={value}")]
        return ["submit", str(self.sweep / "ctx6.yaml"), *sets, "--runs", str(self.runs), "--site", str(profile)]

    def submit(self, code: int | None = 0) -> str:
        return longclip(*self.words(), cwd=self.sweep.parent, code=code)

    def status(self) -> dict[str, Any]:
        return statuses([self.run])[0][0].as_dict()

    def state(self) -> str:
        return str(self.status()["state"])

    def samples(self) -> int:
        points = effective(self.run)
        return points[-1].samples if points else 0

    def wait_for(self, samples: int, attempt: int = 1, checkpoint: bool = True) -> None:
        """Until that attempt has passed ``samples``, and a checkpoint stands."""

        def passed() -> bool:
            if len(self.attempts) < attempt:
                return False
            points = read_points(self.attempts[attempt - 1].journal)
            saved = (self.run.checkpoints / "latest").exists() or not checkpoint
            return bool(points) and points[-1].samples >= samples and saved

        until(passed, 180, f"attempt {attempt} at {samples} samples")

    def wait_state(self, *states: str, seconds: float = 180) -> dict[str, Any]:
        return dict(until(lambda: row if (row := self.status())["state"] in states else None, seconds, str(states)))

    def job(self) -> str:
        return str(self.attempts[-1].job)

    def pid(self, rank: int) -> int:
        """The worker of a rank: a process whose command names the run, and whose environment says who it is."""
        me = f"SLURM_PROCID={rank}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes()
                if str(self.run.attempts.resolve()).encode() in command and b"submitit" in command:
                    parts = (entry / "environ").read_bytes().split(b"\0")
                    if me in parts and b"srun" not in command.split(b"\0")[0]:
                        return int(entry.name)
            except OSError:
                continue
        raise AssertionError(f"no process of rank {rank}")

    def kill(self, rank: int, signum: int = signal.SIGKILL) -> None:
        os.kill(self.pid(rank), signum)

    def slurm(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def stop_daemon(self, name: str) -> None:
        pid = int((self.cluster.dir / "run" / f"{name}.pid").read_text())
        os.kill(pid, signal.SIGKILL)

    def start_daemons(self) -> None:
        done = dev_cluster("up", self.cluster.dir)
        assert done.returncode == 0, done.stderr

    def verdicts(self) -> list[str]:
        return [v.kind if (v := verdict_of(a)) else "killed" for a in self.attempts]

    def recomputed(self) -> list[int]:
        """Samples that each next attempt computed again."""
        trained = [a for a in self.attempts if a.resumed_at is not None]
        return [reached(a) - int(b.resumed_at or 0) for a, b in itertools.pairwise(trained)]

    def finished(self, fault: str, like: Record, exact: bool = True, seconds: float = 240) -> None:
        """The run ends, with the journal of one that was never disturbed, and no more work done twice than allowed."""
        self.wait_state("finished", seconds=seconds)
        record = Record.of(self.run)
        record.check(like, exact)
        again = self.recomputed()
        assert all(0 <= lost <= SAVE_EVERY for lost in again), again
        FAULTS.append((fault, len(self.attempts), sum(again), time.monotonic() - self.began - like.seconds))


@dataclass
class Record:
    """What a finished run says: its curves by position, and its test scores."""

    curves: dict[str, dict[int, float]]
    test: dict[str, float]
    seconds: float = 0.0

    @classmethod
    def of(cls, run: RunFolder, seconds: float = 0.0) -> Record:
        curves: dict[str, dict[int, float]] = {}
        for point in effective(run):
            for name, value in point.metrics.items():
                if name.startswith(("train/", "val/", "text/tokens")):
                    curve = curves.setdefault(name, {})
                    assert point.samples not in curve, f"{name} twice at {point.samples}"
                    curve[point.samples] = value
        return cls(curves, json.loads((run.evaluations / "test.json").read_text())["metrics"], seconds)

    def check(self, like: Record, exact: bool) -> None:
        """Same positions, and the same values: bit for bit, or to 1e-5 where ranks or stage differ."""
        positions = list(range(BATCH, SAMPLES + 1, BATCH))
        assert list(self.curves["train/loss"]) == positions, "a gap"
        assert self.curves.keys() == like.curves.keys()
        if exact:
            assert self.curves == like.curves and self.test == like.test
            return
        assert self.curves["text/tokens"] == like.curves["text/tokens"], "other samples"
        for name in ("train/loss", "train/grad_norm"):
            for at, value in like.curves[name].items():
                assert abs(self.curves[name][at] - value) <= 1e-5 * max(1.0, abs(value)), (name, at)


def wrapper(folder: Path, name: str, script: str) -> None:
    """Puts a command of that name before the real one; ``script`` may call it as "$real"."""
    import shutil

    real = shutil.which(name)
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/bash\nreal={real}\n{script}\n")
    file.chmod(0o755)


def popen(words: list[str], cwd: Path, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "longclip.cli", *words]
    return subprocess.Popen(
        command, cwd=cwd, env={**environment(), **env}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
