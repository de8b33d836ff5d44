"""The rest of the faults: slow, for each takes Slurm's own time-outs. ``tools/test -m slow tests/faults``."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

import longclip as longclip_package
from longclip.run.attempts import attempts_of
from tests.conftest import Cluster
from tests.faults.trial import Record, Trial, popen, until, wrapper
from tests.launch.small import longclip
from tests.track.test_stream import Server

pytestmark = pytest.mark.slow
Make = Callable[..., Trial]


# ---- Slurm ends the job ------------------------------------------------------------------------------------------


def test_the_time_limit(trial: Make, undisturbed: Record) -> None:
    """One minute: Slurm's own USR2 comes before it, and the job is requeued."""
    one = trial({"slurm.time": "00:01:00"})
    one.submit()
    one.wait_for(500, checkpoint=False)
    pids = [one.pid(0), one.pid(1)]
    for pid in pids:  # too fast for a limit of a minute: held until Slurm's signal, which wakes them
        os.kill(pid, signal.SIGSTOP)
    one.finished("time limit of one minute", undisturbed)
    assert set(one.verdicts()[:-1]) == {"timed out"} and one.recomputed()[0] == 0


def _give_way(one: Trial) -> None:
    """A job of higher priority takes all nodes for some seconds."""
    one.slurm("sbatch", "--nodes=4", "--exclusive", "--mem=0", "--output=/dev/null", "--wrap=sleep 3")


@pytest.mark.parametrize("user_signal", [True, False])
def test_preemption_with_requeue(trial: Make, undisturbed: Record, user_signal: bool) -> None:
    """USR2, or TERM, reaches all processes of the job here, the loader's workers too."""
    one = trial({"slurm.partition": "preempt", "engine.loader_workers": 1})
    with _slurm_conf(one, "SlurmctldParameters=preempt_send_user_signal", "", when=not user_signal):
        one.submit()
        one.wait_for(3_000)
        _give_way(one)
        name = f"preemption, REQUEUE, {'with' if user_signal else 'without'} user signal"
        one.finished(name, undisturbed)
    assert one.verdicts() == ["preempted", "finished"] and one.recomputed() == [0]


def test_preemption_with_cancel(trial: Make, undisturbed: Record) -> None:
    """Slurm ends the job for good; the one queued behind it goes on."""
    one = trial({"slurm.partition": "preempt"}, restart="chain", links=1)
    with _slurm_conf(one, "PriorityTier=1 PreemptMode=REQUEUE", "PriorityTier=1 PreemptMode=CANCEL"):
        one.submit()
        one.wait_for(3_000)
        _give_way(one)
        one.finished("preemption, CANCEL, with a chain", undisturbed)
    assert one.verdicts() == ["preempted", "finished"] and one.recomputed() == [0]


class _slurm_conf:
    """Another line in slurm.conf for a while."""

    def __init__(self, one: Trial, old: str, new: str, when: bool = True) -> None:
        self.file, self.one, self.old, self.new, self.when = one.cluster.dir / "etc/slurm.conf", one, old, new, when

    def __enter__(self) -> None:
        self.before = self.file.read_text()
        assert self.old in self.before
        self._write(self.before.replace(self.old, self.new))

    def __exit__(self, *error: object) -> None:
        self._write(self.before)

    def _write(self, text: str) -> None:
        if self.when:
            self.file.write_text(text)
            self.one.slurm("scontrol", "reconfigure")
            time.sleep(1)


@pytest.mark.parametrize(("which", "name"), [(1, "node death"), (0, "death of the batch script's node")])
def test_a_node_dies(trial: Make, undisturbed: Record, which: int, name: str) -> None:
    """Of the first node nothing is left that could write a word, and it is the node's fault all the same."""
    one = trial()
    one.submit()
    one.wait_for(3_000)
    node = str(one.attempts[-1].started["nodes"][which])  # type: ignore[index]
    one.cluster.kill_node(node)
    try:
        one.finished(name, undisturbed)
    finally:
        one.cluster.start_node(node)
    assert one.verdicts() == ["node failed", "finished"]
    assert node not in one.attempts[-1].started["nodes"]  # type: ignore[index]


def test_what_ails_every_node_ends_the_run(trial: Make) -> None:
    """A worker that sees no GPU, as in a container without --nv: not all nodes of the partition are tried."""
    one = trial({"slurm.nodes": 1, "slurm.tasks_per_node": 1, "slurm.gpus_per_node": 1})
    one.submit()
    row = one.wait_state("no progress")
    assert "3 nodes in a row failed the preflight" in row["note"] and "0 of 1 GPUs" in row["note"], row
    assert one.verdicts() == ["node failed"] * 3
    assert len({node for a in one.attempts for node in a.started["nodes"]}) == 3  # type: ignore[index]


# ---- processes ---------------------------------------------------------------------------------------------------


def test_a_rank_that_hangs(trial: Make, undisturbed: Record) -> None:
    """SIGSTOP: the other rank notices, says who does not answer and where it itself waits, and the run goes on."""
    one = trial({"engine.hang_minutes": 0.15})
    one.submit()
    one.wait_for(3_000)
    pid = one.pid(1)
    os.kill(pid, signal.SIGSTOP)
    one.finished("SIGSTOP of rank 1", undisturbed)
    assert one.verdicts() == ["hung", "finished"]
    said = one.attempts[0].ended["message"]  # type: ignore[index]
    assert "rank 1" in said and str(pid) in said and "does not answer" in said, said
    assert list(one.attempts[0].path.glob("stacks-*.txt"))


def test_a_zombie_that_wakes(trial: Make, undisturbed: Record) -> None:
    """Slurm gives the nodes up, their processes live on, and wake when the successor is at work: the fence holds."""
    one = trial()
    one.submit()
    one.wait_for(3_000)
    pids = [one.pid(0), one.pid(1)]
    nodes = [str(n) for n in one.attempts[0].started["nodes"]]  # type: ignore[index]
    for node in nodes:
        _kill_daemons(one, node)
    for pid in pids:  # not before: the kernel hangs up on stopped processes whose parents die
        os.kill(pid, signal.SIGSTOP)
    try:
        one.wait_for(6_000, attempt=2)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        one.finished("a zombie attempt wakes", undisturbed)
    finally:
        for pid in pids:
            _kill(pid)
        for node in nodes:
            one.cluster.start_node(node)
    assert one.attempts[0].ended is None or one.attempts[0].ended["verdict"] != "finished"


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _kill_daemons(one: Trial, node: str) -> None:
    """slurmd and its step daemons, but not the tasks: to Slurm the node is dead."""
    log = (one.cluster.dir / "log" / f"slurmd-{node}.log").resolve()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name = (entry / "comm").read_text().strip()
            if name.startswith("slurmstepd") and any(f.resolve() == log for f in (entry / "fd").iterdir()):
                _kill(int(entry.name))
        except OSError:
            continue
    pid = one.cluster.dir / "run" / f"slurmd-{node}.pid"
    _kill(int(pid.read_text()))
    pid.unlink()


# ---- Slurm's daemons ---------------------------------------------------------------------------------------------


def test_slurmctld_is_away_for_a_while(trial: Make, undisturbed: Record) -> None:
    """The run goes on; status says what it knows; submit refuses in one line, and works again afterwards."""
    one = trial()
    one.submit()
    one.wait_for(1_000, checkpoint=False)
    one.stop_daemon("slurmctld")
    try:
        row = one.status()
        # running where accounting still says so; finished if asking in vain took longer than the run
        assert row["state"] in ("running", "unknown", "finished"), row
        assert "left alone" in one.submit(code=None)
    finally:
        one.start_daemons()
    one.finished("slurmctld stopped and started", undisturbed)
    assert len(one.attempts) == 1


def test_slurmctld_dies_while_submit_talks_to_it(trial: Make, tmp_path: Path, undisturbed: Record) -> None:
    one = trial()
    pid = int((one.cluster.dir / "run/slurmctld.pid").read_text())
    wrapper(tmp_path / "bin", "sbatch", f'[ "$1" = --test-only ] || kill -9 {pid}\nexec timeout 15 "$real" "$@"')
    front = popen(one.words(), one.sweep.parent, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    said = front.communicate(timeout=120)[0]
    one.start_daemons()
    assert front.returncode == 3 and "could not be queued" in said and "Traceback" not in said, said
    one.submit()
    one.finished("slurmctld killed during submit", undisturbed)


def test_without_accounting(trial: Make, undisturbed: Record) -> None:
    """slurmdbd is down: a killed run is told by its log, and what is final stays final."""
    one = trial(restart="submit")
    one.submit()
    one.wait_for(3_000)
    one.stop_daemon("slurmdbd")
    try:
        one.kill(1)
        row = one.wait_state("killed")
        assert "its log says" in row["note"] or "lost its connection" in row["note"], row
        one.submit()
        one.finished("slurmdbd stopped, rank killed, submit again", undisturbed)
    finally:
        one.start_daemons()


# ---- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["truncated", "one bit flipped"])
def test_the_newest_checkpoint_is_broken(trial: Make, undisturbed: Record, harm: str) -> None:
    one = trial(restart="submit")
    one.submit()
    one.wait_for(5_200)
    one.kill(0)
    one.wait_state("killed", "crashed")
    newest = json.loads((one.run.checkpoints / "latest").read_text())["checkpoint"]
    file = one.run.checkpoints / newest / "weights.safetensors"
    data = bytearray(file.read_bytes())
    if harm == "truncated":
        del data[len(data) // 2 :]
    else:
        data[-100] ^= 1
    file.write_bytes(data)
    one.submit()
    one.wait_state("finished")
    assert one.attempts[1].resumed_at == 2_400, "the one before it"
    assert (one.run.checkpoints / f"broken-{newest}").is_dir()
    Record.of(one.run).check(undisturbed, exact=True)


@pytest.fixture
def small_disk(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MiB that two nodes see: they live in mount name spaces of their own, made when they start."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("mounting a small disk is not allowed here")
    for node in ("n1", "n2"):
        cluster.kill_node(node)
        cluster.start_node(node)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


def test_disk_full_during_a_checkpoint(trial: Make, small_disk: Path, undisturbed: Record) -> None:
    """The older checkpoints stay whole, the verdict says so, nothing is tried again; room made, ``retry`` goes on."""
    one = trial(sbatch={"nodelist": "n[1-2]"})
    one.runs = small_disk / "runs"
    one.submit()
    one.wait_for(2_500)
    room = os.statvfs(small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(b"0" * (room.f_bavail * room.f_bsize - 96 * 1024))
    row = one.wait_state("no space")
    assert "No space left" in row["note"] or "no room" in row["note"], row
    until(lambda: not one.slurm("squeue", "-h").strip(), 60, "the job has left")
    assert len(one.attempts) == 1 and "left alone" in one.submit()
    saved = json.loads((one.run.checkpoints / "latest").read_text())["checkpoint"]
    filler.unlink()
    longclip("retry", "ctx6", *one.words()[-4:], cwd=one.sweep.parent)
    one.finished("disk full during a checkpoint, room made, retry", undisturbed)
    assert one.attempts[1].resumed_at == int(saved.rpartition("-")[2]) * 24


# ---- tracking ----------------------------------------------------------------------------------------------------


def test_the_mlflow_server_is_killed_and_comes_back(trial: Make, undisturbed: Record, tmp_path: Path) -> None:
    """No step waits for it, nothing is missing afterwards, nothing is there twice."""
    server = Server(tmp_path)
    server.start()
    try:
        one = trial(tracking=server.uri)
        one.submit()
        one.wait_for(2_500)
        server.kill()
        one.wait_for(6_000)
        server.start()
        one.finished("MLflow server killed and restarted", undisturbed)
        longclip("sync", "ctx6", *one.words()[-4:], cwd=one.sweep.parent)
        run_id = json.loads((one.run.path / "mlflow.json").read_text())["run_id"]
        client = MlflowClient(server.uri)
        assert client.get_run(run_id).info.status == "FINISHED"
        for metric in ("train/loss", "val/mean_recall_at_1"):
            there = [(p.step, p.value) for p in client.get_metric_history(run_id, metric)]
            assert sorted(there) == sorted(undisturbed.curves[metric].items())
    finally:
        server.kill()


# ---- code, ranks, stages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "tasks", "stage"), [(1, 1, 2), (3, 1, 2), (2, 2, 2), (2, 1, 3), (2, 1, 0), (1, 1, 3)]
)
def test_continued_on_other_ranks_and_stages(
    trial: Make, undisturbed: Record, nodes: int, tasks: int, stage: int
) -> None:
    one = trial(restart="submit")
    one.submit()
    one.wait_for(3_000)
    one.slurm("scancel", "--signal=USR2", one.job())
    one.wait_state("preempted", "interrupted")
    one.settings |= {"slurm.nodes": nodes, "slurm.tasks_per_node": tasks, "engine.zero_stage": stage}
    one.submit()
    one.finished(f"continued on {nodes * tasks} ranks at ZeRO {stage}", undisturbed, exact=False)
    assert attempts_of(one.run)[-1].started["ranks"] == nodes * tasks  # type: ignore[index]


def test_the_source_is_edited_while_the_job_waits(trial: Make, undisturbed: Record, tmp_path: Path) -> None:
    """The job runs the code of its submit; the edit, which would end it at once, is for the next one."""
    source = tmp_path / "source"
    shutil.copytree(Path(longclip_package.__file__).parent, source / "longclip")
    one = trial(sbatch={"begin": "now+10"})
    front = popen(one.words(), one.sweep.parent, PYTHONPATH=str(source), PYTHONSAFEPATH="1")
    said = front.communicate(timeout=120)[0]
    assert front.returncode == 0, said
    with (source / "longclip/train/loop.py").open("a") as f:
        f.write("raise SystemExit('edited while queued')\n")
    one.finished("source edited while queued", undisturbed)
    assert len(one.attempts) == 1


def test_an_unreadable_shard_folder_is_not_tried_again(trial: Make) -> None:
    one = trial()
    moved = one.runs.parent / "moved"
    shutil.copytree(one.sweep.parent / "train", moved)
    one.settings |= {"data.train": str(moved)}
    one.submit()
    shutil.rmtree(moved)
    row = one.wait_state("bad input", "no progress", "crashed")
    until(lambda: not one.slurm("squeue", "-h").strip(), 60, "the job has left")
    assert row["state"] == "bad input" and len(one.attempts) == 1, row


def test_longclip_cancel_is_final(trial: Make) -> None:
    one = trial(restart="chain", links=2)
    one.submit()
    one.wait_for(1_000, checkpoint=False)
    longclip("cancel", "ctx6", "--runs", one.runs, cwd=one.sweep.parent)
    one.wait_state("cancelled")
    until(lambda: not one.slurm("squeue", "-h").strip(), 60, "the chain is gone, too")
    assert len(one.attempts) == 1 and "left alone" in one.submit()


def test_too_little_memory_ends_the_run(trial: Make) -> None:
    """Killed for memory each time: tried again once or twice, then left to a person, who is told what it was."""
    # more than it takes to begin (0.45 GiB), whatever the machine, and less than such an embedding takes to train
    one = trial({"slurm.mem_gb": 0.75, "model.text.config.vocab_size": 1_000_000})
    one.submit()
    row = one.wait_state("no progress", seconds=600)
    assert "memory" in row["note"], row
    until(lambda: not one.slurm("squeue", "-h").strip(), 60, "the job has left")
