"""Fifty faults at random times over one long run; by hand, up to an hour: ``python -m tests.faults.storm [SEED] [N]``.

Prints a table of what was done to the run and what each of it cost, and ends with exit code 0 only if the run finished
with the journal of one that was never disturbed. Starts its own cluster, and removes it.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from longclip.run.journal import read_points
from tests.conftest import Cluster, dev_cluster
from tests.faults import trial as trials
from tests.faults.trial import SAVE_EVERY, SETTINGS, Record, Trial, until
from tests.launch.small import longclip, make_sweep

LONG = 24 * 4_000


def kill_rank(one: Trial, rng: random.Random) -> None:
    one.kill(rng.randrange(2))


def stop_rank(one: Trial, rng: random.Random) -> None:
    one.kill(rng.randrange(2), signal.SIGSTOP)


def user_signal(one: Trial, rng: random.Random) -> None:
    one.slurm("scancel", "--signal=USR2", one.job())


def terminate(one: Trial, rng: random.Random) -> None:
    one.slurm("scancel", "--signal=TERM", one.job())


def requeue(one: Trial, rng: random.Random) -> None:
    one.slurm("scontrol", "requeue", one.job())


def kill_node(one: Trial, rng: random.Random) -> None:
    node = str(rng.choice(one.attempts[-1].started["nodes"]))  # type: ignore[index]
    one.cluster.kill_node(node)
    try:
        # Slurm may say "mixed*" of a node that it gave up, for the sake of the job that was on it.
        words = ["sinfo", "-h", "-n", node, "-o", "%T %E"]
        until(lambda: re.search("down|Not responding", one.slurm(*words)), 180, f"{node} is lost")
    finally:
        one.cluster.start_node(node)


def preempt(one: Trial, rng: random.Random) -> None:
    one.slurm("sbatch", "--nodes=4", "--exclusive", "--mem=0", "--output=/dev/null", "--wrap=sleep 2")


def controller(one: Trial, rng: random.Random) -> None:
    one.stop_daemon("slurmctld")
    one.start_daemons()


def accounting(one: Trial, rng: random.Random) -> None:
    one.stop_daemon("slurmdbd")
    one.start_daemons()


def flip_bit(one: Trial, rng: random.Random) -> None:
    """In the newest checkpoint; then a rank is killed, so that it is needed."""
    newest = json.loads((one.run.checkpoints / "latest").read_text())["checkpoint"]
    file = one.run.checkpoints / newest / "exp_avg.safetensors"
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    kill_rank(one, rng)


FAULTS = (kill_rank, stop_rank, user_signal, terminate, requeue, kill_node, preempt, controller, accounting, flip_bit)
HARMLESS = (controller, accounting)


def training(one: Trial, attempt: int) -> bool:
    """Whether that attempt (from 0) or a later one has computed a step."""
    return len(one.attempts) > attempt and any(read_points(a.journal) for a in one.attempts[attempt:])


def storm(cluster: Cluster, root: Path, seed: int, number: int) -> bool:
    rng = random.Random(seed)
    trials.SAMPLES = LONG
    settings = {**SETTINGS, "train.samples": LONG, "evaluate.every": "24000 samples", "engine.hang_minutes": 0.15}
    sweep = make_sweep(root, (6,))
    peace = Trial(cluster, sweep, root / "peace", settings)
    peace.submit()
    peace.wait_state("finished", seconds=1200)
    like = Record.of(peace.run, time.monotonic() - peace.began)
    one = Trial(cluster, sweep, root / "storm", {**settings, "slurm.partition": "preempt", "slurm.time": "01:00:00"})
    one.submit()
    done: list[str] = []
    retries = 0
    while len(done) < number:
        before = len(one.attempts) - 1
        until(lambda n=before: training(one, n), 900, "training")  # type: ignore[misc]
        # By samples and not by time: all the faults find room in the run, whatever the speed of the machine.
        here = one.samples()
        there = here + rng.uniform(0.3, 1.7) * (0.9 * LONG - here) / (number - len(done) + 1)
        until(lambda n=there: one.samples() >= n or one.status()["state"] != "running", 900, f"{there:.0f} samples")  # type: ignore[misc]
        state = one.status()["state"]
        if state == "no progress":  # three of them hit between two checkpoints: a person is asked, and goes on
            retries += 1
            longclip("retry", "ctx6", *one.words()[-4:], cwd=sweep.parent)
            continue
        if state == "finished":
            break
        if state != "running" or one.attempts[-1].ended is not None:
            time.sleep(1)
            continue
        fault = rng.choice(FAULTS)
        count = len(one.attempts)
        try:
            fault(one, rng)
        except (AssertionError, ProcessLookupError, OSError) as error:  # it was between two lives
            print(f"  {fault.__name__}: missed ({error})", flush=True)
            continue
        done.append(fault.__name__)
        print(f"{len(done):3d} {fault.__name__:12s} at {one.samples():,} samples, attempt {count}", flush=True)
        if fault not in HARMLESS:
            until(lambda n=count: len(one.attempts) > n or one.status()["state"] == "no progress", 900, "next attempt")  # type: ignore[misc]
    one.wait_state("finished", seconds=1200)
    again = one.recomputed()
    print(f"\n{len(done)} faults, {len(one.attempts)} attempts, {retries} retries by hand, seed {seed}")
    for name, times in Counter(done).most_common():
        print(f"  {name:12s} {times}")
    print(f"verdicts: {dict(Counter(one.verdicts()))}")
    print(f"samples recomputed: {sum(again):,} of {LONG:,}, at most {max(again):,} at once (interval {SAVE_EVERY:,})")
    wide = [n for n in again if n > SAVE_EVERY]
    print(f"more than an interval {len(wide)} times, where a flipped bit had set the newest checkpoint aside")
    print(f"{time.monotonic() - one.began:.0f} s, undisturbed {like.seconds:.0f} s")
    assert len(wide) <= done.count("flip_bit") and max(again) <= 2 * SAVE_EVERY, again
    Record.of(one.run).check(like, exact=True)
    print("same journal and test scores as the undisturbed run, bit for bit")
    return len(done) == number


def main() -> None:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    number = int(sys.argv[2]) if len(sys.argv) > 2 else 50
    folder = Path(tempfile.mkdtemp(prefix="lc-", dir="/tmp"))
    with tempfile.TemporaryDirectory(prefix="storm-") as root:
        try:
            assert dev_cluster("up", folder).returncode == 0
            for line in dev_cluster("env", folder).stdout.splitlines():
                name, _, value = shlex.split(line)[1].partition("=")
                os.environ[name] = value
            ok = storm(Cluster(folder, {"SLURM_CONF": os.environ["SLURM_CONF"]}), Path(root), seed, number)
        finally:
            dev_cluster("down", folder, "--delete")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
