"""A sweep so small that a run takes seconds, and the commands typed as a user types them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from longclip.run.attempts import attempts_of
from longclip.run.folder import RunFolder, runs_of
from longclip.run.journal import effective, series
from tests.data.test_loader import make_shards, make_tokenizer

BASE = """\
model:
  embed_dim: 16
  image:
    config: {model_type: vit, image_size: 16, patch_size: 8, hidden_size: 32, intermediate_size: 48,
             num_hidden_layers: 1, num_attention_heads: 2, hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}
    pool: mean
  text:
    config: {model_type: modernbert, vocab_size: 64, hidden_size: 32, intermediate_size: 40, num_hidden_layers: 1,
             num_attention_heads: 2, max_position_embeddings: 64, pad_token_id: 0, cls_token_id: 1, sep_token_id: 2,
             bos_token_id: 1, eos_token_id: 2}
    tokenizer: ../tok
data: {train: ../train, val: ../val, test: ../test}
train: {samples: 1440, global_batch: 24, precision: fp32, lr: 2e-3, warmup_steps: 5, seed: 0}
engine: {zero_stage: 2, loader_workers: 0}
evaluate: {every: 20 steps, batch: 7}
checkpoint: {every: 15 steps, keep: {last: 2}}
slurm: {tasks_per_node: 2, cpus_per_task: 1, mem_gb: 2.5, time: "00:20:00"}
"""


def make_sweep(root: Path, windows: tuple[int, ...] = (4, 5, 6, 9)) -> Path:
    """Data below ``root``, and ``root/small/ctx<window>.yaml``; returns ``root/small``."""
    make_tokenizer(root / "tok")
    make_shards(root / "train", [30, 40, 26])
    make_shards(root / "val", [23])
    make_shards(root / "test", [31])
    sweep = root / "small"
    sweep.mkdir()
    (sweep / "_base.yaml").write_text(BASE)
    for window in windows:
        arm = f"extends: _base.yaml\nname: ctx{window}\nmodel: {{context_length: {window}}}\n"
        (sweep / f"ctx{window}.yaml").write_text(arm)
    return sweep


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


def longclip(*words: str | Path, cwd: Path, code: int | None = 0, timeout: float = 240) -> str:
    """Output of a longclip command; its exit code is asserted."""
    command = [sys.executable, "-m", "longclip.cli", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment())
    said = done.stdout + done.stderr
    assert code is None or done.returncode == code, said
    assert words[0] == "logs" or "Traceback" not in said, said
    return said


def the_run(root: Path, label: str) -> RunFolder:
    (run,) = [r for r in runs_of(root) if r.label == label]
    return run


def curve(run: RunFolder, metric: str = "train/loss") -> list[tuple[int, float]]:
    return series(effective(run), metric)


def kill_after_checkpoint(words: list[str | Path], cwd: Path, runs: Path, sample: int) -> None:
    """Starts a submit, and kills all of it with -9 once a checkpoint stands and ``sample`` has been passed."""
    command = [sys.executable, "-m", "longclip.cli", *map(str, words)]
    front = subprocess.Popen(command, cwd=cwd, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            for run in runs_of(runs):
                points = curve(run)
                if points and points[-1][0] >= sample and (run.checkpoints / "latest").exists():
                    victims = _processes_of(run)
                    assert len(victims) >= 3, "the controller and two ranks"
                    for pid in victims:
                        os.kill(pid, signal.SIGKILL)
                    assert attempts_of(run)[-1].ended is None
                    return
            assert front.poll() is None, "the run ended before it could be killed"
            time.sleep(0.02)
        raise AssertionError("no checkpoint in time")
    finally:
        front.kill()
        front.wait()


def _processes_of(run: RunFolder) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if str(run.attempts.resolve()).encode() in command:
            found.append(int(entry.name))
    return found
