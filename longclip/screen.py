"""What commands show while and before runs are under way: the plan, the batch scripts, the status, live."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from longclip.errors import LongclipError
from longclip.experiment.schema import Experiment, time_warning
from longclip.launch.status import UNDER_WAY, statuses
from longclip.run.folder import RunFolder

if TYPE_CHECKING:
    from longclip.launch.prune import Pruning
    from longclip.launch.site import Site
    from longclip.launch.submit import Plan

# In a log file a row stays on its line, however long.
out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 500)
PLAIN_SECONDS, LIVE_SECONDS = 20.0, 2.0
"""Time between two lines in a log file, and between two pictures on a terminal"""


def print_plans(plans: Sequence[Plan], site: str) -> None:
    """The table of what submit is about to do."""
    from longclip.launch.snapshot import code_hash, commit

    out.print(f"site {site} · code {commit() or 'installed'} ({code_hash()})", highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("run", "action", "why", "window", "samples", "ranks"):
        table.add_column(column, overflow="fold")
    for p in plans:
        samples = f"{p.resolved.samples:,}" if p.resolved.samples else "?"
        ask = p.experiment.slurm
        table.add_row(
            p.run.name,
            p.action,
            escape(p.why),
            str(p.experiment.model.context_length),
            samples,
            f"{ask.nodes} x {ask.ranks_per_node} {'GPU' if ask.gpus_per_node else 'CPU'}",
        )
    out.print(table)
    print_time_warnings(p.experiment for p in plans if p.queues)


def print_time_warnings(experiments: Iterable[Experiment]) -> None:
    """Time limits that Slurm reads as minutes, each once."""
    for text in dict.fromkeys(e.slurm.time for e in experiments):
        if warning := time_warning(text):
            print(f"! {warning}")


def print_dry_run(plans: Sequence[Plan], profile: Site) -> bool:
    """Batch scripts, Slurm's answers to them, and what stands in the way; False if Slurm refused one."""
    from longclip.launch import submit as launch
    from longclip.launch.scheduler import have_slurm

    refused = False
    for p in plans:
        script = launch.batch_script(p, profile)
        print(f"\n# ---- {p.run.sweep}/{p.run.name}")
        print(script.rstrip())
        if have_slurm():
            try:
                print(f"# sbatch --test-only: {launch.test_only(script)}")
            except LongclipError as error:
                refused = True
                print(f"# {error}")
    if not have_slurm():
        print("\n# sbatch --test-only: not tried, there is no Slurm on this machine")
    obstacles = launch.problems(plans)
    for obstacle in obstacles:
        print(f"! a submit would stop here: {obstacle}")
    if obstacles:
        print("! run ids above are provisional: they hold the hash of what could not be found")
    print("dry run: nothing was queued, nothing was written")
    return not refused


def status_table(runs: Sequence[RunFolder]) -> Table:
    """One row a run, and where the words come from."""
    rows, words = statuses(runs)
    ages = [r.age for r in rows if r.age is not None and r.state == "running"]
    source = " · ".join(filter(None, [words.sources, f"journals {min(ages):.0f} s ago" if ages else ""]))
    table = Table(box=None, pad_edge=False, header_style="bold", caption=source or None, caption_justify="left")
    for column in ("run", "state", "samples", "loss", "R@1 val", "smp/s", "note"):
        table.add_column(column, justify="right" if column in ("samples", "loss", "R@1 val", "smp/s") else "left")
    colours = {"finished": "green", "running": "cyan", "crashed": "red", "diverged": "red", "lost": "yellow"}
    for r in rows:
        total = f"{r.total:,}" if r.total else "?"
        table.add_row(
            r.run.name,
            f"[{colours.get(r.state, 'default')}]{r.state}[/]",
            f"{r.samples:,}/{total}",
            "-" if r.loss is None else f"{r.loss:.3f}",
            "-" if r.recall is None else f"{100 * r.recall:.1f}",
            "-" if r.speed is None else f"{r.speed:.0f}",
            escape(r.note),  # notes quote error messages, which may hold brackets
        )
    return table


def print_prunings(prunings: Sequence[Pruning]) -> None:
    """One row a run: what can go, what stays."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("run", "state", "frees", "can go", "stays"):
        table.add_column(column, justify="right" if column == "frees" else "left", overflow="fold")
    for p in prunings:
        going = "; ".join(f"{r.path.name} ({r.why})" for r in p.removals)
        stays = ", ".join(f"{name} ({why})" for name, why in p.kept.items())
        left_alone = f"left alone: {p.note}" if p.note else ""
        table.add_row(p.run.name, p.state, size(p.bytes), escape(going or "-"), escape(left_alone or stays or "-"))
    out.print(table)


def size(number: int) -> str:
    """``4.5 GB``; GB are 10^9 bytes, as in what quotas and disks are sold by."""
    return f"{number / 1e9:.1f} GB" if number >= 5e7 else f"{number / 1e6:.1f} MB"


def watch(runs: Sequence[RunFolder], until: Callable[[], bool] | None = None) -> bool:
    """Shows the live table until no run is queued or running (or ``until()``); False if the user stopped it."""

    def over() -> bool:
        if until is not None:
            return until()
        # A scheduler that does not answer for a moment has ended nothing.
        return all(s.state not in UNDER_WAY for s in statuses(runs)[0])

    try:
        if not out.is_terminal:
            last = ""
            while not (done := over()) or last == "":
                lines = [f"{s.run.name} {s.state} {s.samples:,}" for s in statuses(runs)[0] if s.state == "running"]
                if (line := "; ".join(lines) or "waiting") != last:
                    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
                    last = line
                if done:
                    break
                _pause(until, PLAIN_SECONDS)
            out.print(status_table(runs))
            return True
        with Live(status_table(runs), console=out, refresh_per_second=2) as live:
            while not over():
                _pause(until, LIVE_SECONDS)
                live.update(status_table(runs))
            live.update(status_table(runs))
        return True
    except KeyboardInterrupt:
        return False


def _pause(until: Callable[[], bool] | None, seconds: float) -> None:
    """Sleeps, but not past the end of what is waited for."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not (until is not None and until()):
        time.sleep(0.5)
