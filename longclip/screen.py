"""What commands show while and before runs are under way: the plan, the batch scripts, the status, live."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from longclip.errors import LongclipError
from longclip.experiment.durations import time_warning
from longclip.experiment.schema import Experiment
from longclip.launch.status import CONTINUES, UNDER_WAY, Status, statuses
from longclip.run.folder import RunFolder

if TYPE_CHECKING:
    from longclip.launch.plan import Plan
    from longclip.launch.prune import Pruning
    from longclip.launch.scheduler import Words
    from longclip.launch.site import Site
    from longclip.train.estimate import Estimate
    from longclip.train.gpus import Gpu

# In a log file a row stays on its line, however long.
out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 500)
PLAIN_SECONDS, LIVE_SECONDS, SLURM_SECONDS = 20.0, 2.0, 10.0
"""Time between two lines in a log file, and between two pictures on a terminal (where squeue is asked, the last)"""


def print_plans(plans: Sequence[Plan], site: Site) -> None:
    """The table of what submit is about to do."""
    from longclip.launch.forecast import columns, of_plan, unfit
    from longclip.launch.snapshot import code_hash, commit

    out.print(f"site {site.name} · code {commit() or 'installed'} ({code_hash()})", highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("run", "action", "why", "window", "samples", "ranks", "rank-h", "disk"):
        table.add_column(column, overflow="fold")
    warnings: dict[str, list[str]] = {}
    for p in plans:
        guess = of_plan(p, site) if p.queues else None
        if said := unfit(p, guess, site):
            warnings.setdefault(said, []).append(p.run.label)
        samples = f"{p.resolved.samples:,}" if p.resolved.samples else "?"
        ask = p.experiment.slurm
        table.add_row(
            p.run.name,
            p.action,
            escape(p.why),
            str(p.experiment.model.context_length),
            samples,
            f"{ask.nodes} x {ask.ranks_per_node} {'GPU' if ask.gpus_per_node else 'CPU'}",
            *columns(p, guess),
        )
    out.print(table)
    for said, runs in warnings.items():
        print(f"! {', '.join(runs)}: {said}")
    print_time_warnings(p.experiment for p in plans if p.queues)


def print_estimates(estimates: Sequence[Estimate], notes: Iterable[str], gpu: Gpu | None, utilisation: float) -> None:
    """The parts of the models, the table, and what the numbers rest on."""
    from longclip.launch.forecast import memory_table, table

    for parts in dict.fromkeys(tuple(e.parameters.items()) for e in estimates):
        names = ", ".join(e.name for e in estimates if tuple(e.parameters.items()) == parts)
        said = ", ".join(f"{part} {count:,}" for part, count in parts)
        out.print(f"parameters {sum(dict(parts).values()):,} ({said}): {_once(names)}", highlight=False)
    out.print(table(estimates, gpu))
    out.print(memory_table(estimates, gpu))
    out.print(
        "GiB of one rank; not all stand at once, so the peak is not their sum; other: images and libraries",
        highlight=False,
    )
    if gpu is None:
        out.print(
            "no GPU named: no time; memory is that of CPU ranks, unless the experiment asks for GPUs (--gpu NAME)"
        )
    else:
        out.print(
            f"{gpu.name}: {gpu.memory_gib:g} GiB; time at {utilisation:.0%} of its peak, recomputation counted, "
            "without evaluation and waiting; ZeRO and micro: the cheapest that fit",
            highlight=False,
        )
    for line in notes:
        out.print(line, highlight=False, markup=False)
    sizes = sorted({(e.checkpoint_bytes, e.disk_bytes) for e in estimates})
    for one, all_ in sizes:
        out.print(f"a checkpoint is {size(one)}; a run keeps up to {size(all_)}", highlight=False)


def _once(names: str) -> str:
    return ", ".join(dict.fromkeys(names.split(", ")))


def print_time_warnings(experiments: Iterable[Experiment]) -> None:
    """Time limits that Slurm reads as minutes, each once."""
    for text in dict.fromkeys(e.slurm.time for e in experiments):
        if warning := time_warning(text):
            print(f"! {warning}")


def print_dry_run(plans: Sequence[Plan], profile: Site) -> bool:
    """Batch scripts, Slurm's answers to them, and what stands in the way; False if Slurm refused one."""
    from longclip.launch import job
    from longclip.launch.plan import problems
    from longclip.launch.scheduler import have_slurm
    from longclip.launch.snapshot import code_hash

    code = code_hash()
    answers: dict[str, str] = {}
    refused = False
    for p in plans:
        script = job.batch_script(p, profile, code)
        print(f"\n# ---- {p.run.sweep}/{p.run.name}")
        print(script.rstrip())
        if have_slurm():
            if (shape := job.shape(script)) not in answers:
                try:
                    answers[shape] = f"# sbatch --test-only: {job.test_only(script)}"
                except LongclipError as error:
                    refused = True
                    answers[shape] = f"# {error}"
            print(answers[shape])
    if not have_slurm():
        print("\n# sbatch --test-only: not tried, there is no Slurm on this machine")
    obstacles = problems(plans)
    for obstacle in obstacles:
        print(f"! a submit would stop here: {obstacle}")
    if obstacles:
        print("! run ids above are provisional: they hold the hash of what could not be found")
    print("dry run: nothing was queued, nothing was written")
    return not refused


def status_table(runs: Sequence[RunFolder]) -> Table:
    """One row a run, and where the words come from."""
    return _table(*statuses(runs))


def print_status(runs: Sequence[RunFolder]) -> None:
    """The table, and what each run that does not go on by itself needs."""
    rows, words = statuses(runs)
    out.print(_table(rows, words))
    for line in _needs(rows):
        out.print(line, markup=False, highlight=False)


def _table(rows: Sequence[Status], words: Words) -> Table:
    ages = [r.age for r in rows if r.age is not None and r.state == "running"]
    source = " · ".join(filter(None, [words.sources, f"journals {min(ages):.0f} s ago" if ages else ""]))
    table = Table(box=None, pad_edge=False, header_style="bold", caption=source or None, caption_justify="left")
    numbers = ("samples", "loss", "R@1 val", "smp/s", "ends", f"{rows[0].unit if rows else 'GPU'}-h (lost)")
    for column in ("run", "state", *numbers, "note"):
        table.add_column(column, justify="right" if column in numbers else "left")
    for r in rows:
        total = f"{r.total:,}" if r.total else "?"
        needs_hands = r.state not in (*UNDER_WAY, *CONTINUES, "finished", "cancelled")
        colour = "red" if needs_hands else {"finished": "green", "running": "cyan"}.get(r.state, "yellow")
        table.add_row(
            r.run.name,
            f"[{colour}]{r.state}[/]",
            f"{r.samples:,}/{total}",
            "-" if r.loss is None else f"{r.loss:.3f}",
            "-" if r.recall is None else f"{100 * r.recall:.1f}",
            "-" if r.speed is None else f"{r.speed:.0f}",
            "-" if r.ends is None else _when(r.ends),
            "-" if not r.hours else f"{r.hours:.2g} ({r.hours_lost:.2g})",
            escape(r.note),  # notes quote error messages, which may hold brackets
        )
    return table


def _when(moment: float) -> str:
    """``19:40``, or ``Sun 06h`` where it is not today; a guess needs no more."""
    then = time.localtime(moment)
    return time.strftime("%H:%M" if then[:3] == time.localtime()[:3] else "~%a %Hh", then)


def _needs(rows: Sequence[Status]) -> list[str]:
    """What to type for the runs that have stopped: one line for those that submit continues, one for each other."""
    lines = []
    for r in rows:
        if r.state not in (*UNDER_WAY, *CONTINUES, "finished", "cancelled"):
            around = " --around nan" if r.state == "diverged" else ""
            lines.append(
                f"{r.run.name} needs you: longclip logs {r.run.name}{around}, then longclip retry {r.run.name}"
            )
    if stopped := [r.run.name for r in rows if r.state in CONTINUES]:
        lines.append(f"the same longclip submit continues {', '.join(stopped[:4])}{' ...' if len(stopped) > 4 else ''}")
    return lines


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
    """Shows the live table until no run is queued or running (or ``until()``); False if the user stopped it.

    Each picture asks the scheduler once; a cluster's is asked less often than this machine's process table.
    """
    live = out.is_terminal
    try:
        with Live(console=out, refresh_per_second=2) if live else nullcontext() as picture:
            last = ""
            while True:
                # Asked before looking: what is over then has its last word on the picture.
                done = until() if until is not None else False
                rows, words = statuses(runs)
                if isinstance(picture, Live):
                    picture.update(_table(rows, words))
                else:
                    now = "; ".join(f"{s.run.name} {s.state} {s.samples:,}" for s in rows if s.state == "running")
                    if (now or "waiting") != last:
                        last = now or "waiting"
                        print(f"{time.strftime('%H:%M:%S')} {last}", flush=True)
                # A scheduler that does not answer for a moment has ended nothing.
                if done or (until is None and all(s.state not in UNDER_WAY for s in rows)):
                    break
                _pause(until, (SLURM_SECONDS if words.folders else LIVE_SECONDS) if live else PLAIN_SECONDS)
        if not live:
            print_status(runs)
        return True
    except KeyboardInterrupt:
        return False


def _pause(until: Callable[[], bool] | None, seconds: float) -> None:
    """Sleeps, but not past the end of what is waited for."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not (until is not None and until()):
        time.sleep(0.5)
