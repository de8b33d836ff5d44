"""The command line: parse, call one function, print.

Nothing heavy is imported here or by what the front's commands call: ``--help``, ``check``, ``submit``, ``status`` and
``collect`` run without torch.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from longclip import __version__
from longclip.cli_options import Json, Run, Runs, SiteName, Target, find, profile_of, single
from longclip.cli_pairs import data_app, longcap_app
from longclip.cli_results import collect, evaluate, export, sync
from longclip.errors import FULL, LongclipError, SiteError, UserError

app = typer.Typer(
    name="longclip",
    help="Train image-text models at several context lengths on Slurm: one YAML an experiment, one folder a run, "
    "one table a sweep.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data_app, name="data")
site_app = typer.Typer(help="Site profiles: init.", no_args_is_help=True)
app.add_typer(site_app, name="site")
app.add_typer(longcap_app, name="longcap")

_debug = False

Paths = Annotated[list[Path], typer.Argument(help="Experiment files, or folders of them.", show_default=False)]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: train.lr=3e-4")]


def main() -> None:
    """Entry point: every error is one message and an exit code; ``--debug`` shows the traceback."""
    try:
        app()
    except LongclipError as error:
        if _debug:
            raise
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `longclip status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # somebody else's folder, a full disk
        if _debug or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, *FULL):
            raise
        said = ": ".join(filter(None, (error.filename, error.strerror)))
        hint = "make room (longclip prune shows what can go)" if error.errno in FULL else None
        print(f"error: {SiteError(said, hint)}", file=sys.stderr)
        sys.exit(SiteError.exit_code)


@app.callback(invoke_without_command=True)
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.")] = False,
) -> None:
    global _debug
    _debug = debug
    if version:
        print(f"longclip {__version__}")
        raise typer.Exit


@app.command()
def check(paths: Paths, set_: Sets = None) -> None:
    """Validate experiment files. Needs no Slurm, no data and no network."""
    from longclip import screen
    from longclip.evaluate.suite import read_suite
    from longclip.experiment.load import load

    loaded = load(paths, set_)
    for file in dict.fromkeys(suite for one in loaded for suite in one.experiment.evaluate.suites):
        read_suite(Path(file))
    for one in loaded:
        e = one.experiment
        length = f"{e.train.samples:,} samples" if e.train.samples else f"{e.train.epochs:g} epochs"
        print(
            f"ok  {one.sweep}/{e.name}: window {e.model.context_length}, {length}, "
            f"batch {e.train.global_batch} = {e.slurm.ranks} x {e.train.global_batch // e.slurm.ranks}, "
            f"{e.slurm.nodes} x {e.slurm.ranks_per_node} ranks"
        )
    screen.print_time_warnings(one.experiment for one in loaded)


@app.command()
def estimate(
    paths: Paths,
    set_: Sets = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="As in h100-80g; by default the site's gpu_type.")] = None,
    gpus: Annotated[str | None, typer.Option("--gpus", help="How many: 4, or 1 4 16 for a row each.")] = None,
    utilisation: Annotated[float, typer.Option("--utilisation", min=0.01, max=1, help="Of the GPU's peak.")] = 0.35,
    as_json: Json = False,
    site: SiteName = None,
) -> None:
    """Parameters, memory per GPU at every ZeRO stage, time and GPU-hours, disk: before anything is queued."""
    from longclip import screen
    from longclip.experiment.load import load
    from longclip.launch.forecast import forecasts
    from longclip.train.gpus import may_be, named, of_site

    profile = profile_of(site, None)
    device = of_site(profile.gpu_type) if gpu is None else named(gpu)
    counts = gpus.split(",") if gpus else []
    if gpus is not None:  # what the parser takes for paths, in `--gpus 1 4 16`
        counts += [str(path) for path in paths if str(path).isdecimal()]
        paths = [path for path in paths if not str(path).isdecimal()]
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise UserError(f"--gpus {' '.join(counts)}: valid is a number, or several: 1 4 16")
    if not paths:
        raise UserError(f"--gpus {' '.join(counts)}: no experiment file is named")
    found, notes = forecasts(load(paths, set_), profile, device, [int(count) for count in counts], utilisation)
    if gpu is None and len(meant := may_be(profile.gpu_type)) > 1:
        notes.append(f"the site's {profile.gpu_type} may be {' or '.join(g.name for g in meant)}: say which by --gpu")
    if as_json:
        print(json.dumps([e.as_dict() for e in found], indent=1))
    else:
        screen.print_estimates(found, notes, device, utilisation)


@app.command()
def submit(
    paths: Paths,
    set_: Sets = None,
    site: SiteName = None,
    on: Annotated[str, typer.Option("--on", help="slurm, local or debug.")] = "slurm",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show runs and batch scripts; queue nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Stay, with a live table, until all runs have ended.")] = False,
    parallel: Annotated[bool, typer.Option("--parallel", help="With --on local: all runs at once.")] = False,
    canary: Annotated[bool, typer.Option("--canary", help="First try each memory shape, in minutes.")] = False,
    collect: Annotated[bool, typer.Option("--collect", help="A job that collects when all runs have ended.")] = False,
    runs: Runs = None,
) -> None:
    """Queue what is new or was interrupted; leave alone what is finished, queued or running."""
    from longclip import screen
    from longclip.experiment.load import load
    from longclip.launch.plan import plan
    from longclip.submission import carry_out

    profile = profile_of(site, runs)
    if on not in ("slurm", "local", "debug"):
        raise UserError(f"--on {on}: valid is slurm, local or debug")
    if collect and on != "slurm":
        raise UserError("--collect is for Slurm's queue", "longclip collect SWEEP, when the runs have ended")
    if canary and on != "slurm":
        raise UserError("--canary is for Slurm's queue, where the runs wait for it")
    plans = plan(load(paths, set_), profile)
    screen.print_plans(plans, profile)
    if dry_run:
        if not screen.print_dry_run(plans, profile):
            raise typer.Exit(3)
        return
    if code := carry_out(plans, profile, on, wait, parallel, collect, canary):
        raise typer.Exit(code)


@app.command()
def retry(
    target: Annotated[str, typer.Argument(help="Run or sweep.")],
    site: SiteName = None,
    on: Annotated[str, typer.Option("--on", help="slurm, local or debug.")] = "slurm",
    wait: Annotated[bool, typer.Option("--wait")] = False,
    runs: Runs = None,
) -> None:
    """Continue runs that crashed, diverged or were cancelled, from their last checkpoint."""
    from longclip import screen
    from longclip.experiment.load import Loaded
    from longclip.launch.plan import plan
    from longclip.run.folder import find_runs
    from longclip.submission import carry_out

    profile = profile_of(site, runs)
    found = find_runs(profile.runs, target)
    loaded = [Loaded(r.experiment(), r.path, r.sweep, r.axes()) for r in found]
    plans = plan(loaded, profile, retry=True)
    theirs = {run.path.resolve() for run in found}  # plans are in another order: parents come first
    if other := next((one.run.path for one in plans if one.run.path.resolve() not in theirs), None):
        raise UserError(f"retry would begin {other}, no run of {target}: data or weights have changed, or --runs")
    screen.print_plans(plans, profile)
    if code := carry_out(plans, profile, on, wait):
        raise typer.Exit(code)


@app.command()
def status(
    target: Target = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Stay and refresh.")] = False,
    as_json: Json = False,
    site: SiteName = None,
    runs: Runs = None,
) -> None:
    """Where runs stand: from their records and the scheduler's word."""
    from longclip import screen
    from longclip.launch.status import statuses

    found = find(site, runs, target)
    if as_json:
        print(json.dumps([s.as_dict() for s in statuses(found)[0]], indent=1))
    elif watch:
        screen.watch(found)
    else:
        screen.print_status(found)


@app.command()
def logs(
    target: Run,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the run has ended.")] = False,
    rank: Annotated[int, typer.Option("--rank", help="Whose log.", min=0)] = 0,
    attempt: Annotated[int | None, typer.Option("--attempt", help="Which attempt, by default the newest.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", help="How many of the last lines.", min=1)] = 40,
    around: Annotated[
        str | None, typer.Option("--around", metavar="TEXT", help="Points and lines around the first TEXT: nan")
    ] = None,
    site: SiteName = None,
    runs: Runs = None,
) -> None:
    """The last lines of a run's log, and the first failure if there was one."""
    from longclip.launch import logs as read

    if follow and (attempt is not None or around is not None):
        raise UserError("-f follows the newest attempt; leave out --attempt and --around")
    (run,) = single(find(site, runs, target))
    if follow:
        said = read.follow(run, rank, lines)
    elif around is not None:
        said = read.around(run, rank, attempt, lines, around)
    else:
        said = read.tail(run, rank, attempt, lines)
    try:
        for line in said:
            print(line, flush=follow)
    except KeyboardInterrupt:  # the usual end of -f
        raise typer.Exit(130) from None


@app.command()
def show(target: Run, as_json: Json = False, site: SiteName = None, runs: Runs = None) -> None:
    """One page about a run: state, attempts, checkpoints, scores, pinned content, resolved experiment."""
    from longclip import screen
    from longclip.launch.show import facts, page

    (run,) = single(find(site, runs, target))
    if as_json:
        print(json.dumps(facts(run), indent=1))
    else:
        screen.out.print(page(facts(run), run.experiment_file.read_text(encoding="utf-8")))


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="Run or experiment file.")],
    b: Annotated[str, typer.Argument(help="Run or experiment file.")],
    as_json: Json = False,
    site: SiteName = None,
    runs: Runs = None,
) -> None:
    """Which keys differ, and whether that makes them different runs."""
    from longclip.launch.diff import compare

    found = compare(a, b, profile_of(site, runs))
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        print("\n".join(found.lines()))


@app.command()
def cancel(
    target: Annotated[str, typer.Argument(help="Run or sweep.")], site: SiteName = None, runs: Runs = None
) -> None:
    """Stop queued and running jobs for good; ``retry`` continues them."""
    from longclip.launch.cancel import cancel_runs

    cancelled = cancel_runs(find(site, runs, target))
    for name, what in cancelled:
        print(f"{name}: {what}")
    if not cancelled:
        print("nothing to cancel: no run is queued or running")


app.command()(collect)
app.command()(sync)


@app.command()
def doctor(site: SiteName = None, runs: Runs = None, as_json: Json = False) -> None:
    """Can this machine submit? Slurm, partition, limits, folders, datasets, worker, MLflow: one line each."""
    from longclip.launch.doctor import examine

    checks = []
    for check in examine(profile_of(site, runs)):
        checks.append(check)
        if not as_json:
            print(check, flush=True)
    if as_json:
        print(json.dumps([c.as_dict() for c in checks], indent=1))
    if any(c.level == "fail" for c in checks):
        raise typer.Exit(3)


@site_app.command("init")
def site_init(
    name: Annotated[str | None, typer.Argument(help="Name of the profile, by default the cluster's.")] = None,
    dest: Annotated[Path | None, typer.Option("--out", help="File, by default in ~/.config/longclip/sites.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing: take the best guess, and mark it.")] = False,
) -> None:
    """Write a site profile from what Slurm says of itself."""
    from longclip.launch.site_init import write_profile

    ask = None if yes or not sys.stdin.isatty() else typer.prompt
    file, site = write_profile(name, dest, ask)
    print(f"wrote {file}\nnext: longclip doctor --site {site}")


app.command()(export)
app.command()(evaluate)


@app.command()
def prune(
    target: Target = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without, it is only shown.")] = False,
    keep_last: Annotated[int, typer.Option("--keep-last", min=1, help="Newest checkpoints to keep.")] = 1,
    site: SiteName = None,
    runs: Runs = None,
) -> None:
    """Free disk: old, broken and half-written checkpoints. A file `pinned` in a checkpoint's folder keeps it."""
    from longclip import screen
    from longclip.launch import prune as pruning

    plans = pruning.plan(find(site, runs, target), keep_last)
    screen.print_prunings(plans)
    todo = [p for p in plans if p.removals]
    total = screen.size(sum(p.bytes for p in todo))
    if not yes or not todo:
        print(f"{total} can go; nothing was removed; next: the same with --yes" if todo else "nothing can go")
        return
    for plan in todo:
        pruning.free(plan)
        print(f"{plan.run.name}: freed {screen.size(plan.bytes)}")


@app.command()
def train(
    file: Annotated[Path, typer.Argument(help="One experiment file.")],
    set_: Sets = None,
    site: SiteName = None,
    runs: Runs = None,
) -> None:
    """Train here and now, on the ranks of torchrun or srun, or alone; needs the train extra.

    Exit code 85: stopped by a signal and saved; the same command goes on.
    """
    from longclip.launch.direct import train_here
    from longclip.launch.restart import AGAIN

    verdict = train_here(file, set_ or [], profile_of(site, runs))
    print(verdict)
    if verdict != "finished":
        raise typer.Exit(AGAIN)


if __name__ == "__main__":
    main()
