"""The commands that make something of trained models: ``evaluate``, ``collect``, ``sync``, ``export``.

As in ``cli.py`` nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from longclip.cli_options import Json, Run, Runs, SiteName, Target, find, profile_of, single
from longclip.errors import UserError


def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(help="Runs or sweeps; or models: an exported folder, a CLIPModel's folder or hub id."),
    ],
    suite: Annotated[list[Path], typer.Option("--suite", help="Suite file (experiments/suites); may be repeated.")],
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="Of runs: best, last, all, or a step.")] = "best",
    on: Annotated[str, typer.Option("--on", help="slurm, local, or debug: here, or on torchrun's ranks.")] = "local",
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the records, in place of the runs'.")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=0, help="Ranks, a GPU each; by default as trained.")] = None,
    as_json: Json = False,
    site: SiteName = None,
    runs: Annotated[Path | None, typer.Option("--runs", help="Folder of the runs, in place of the site's.")] = None,
) -> None:
    """Score checkpoints or published models on suites. What has a record is not computed again."""
    from longclip.evaluate.conventions import lines
    from longclip.evaluate.suite import read_suite
    from longclip.launch import evaluation
    from longclip.launch import evaluation_jobs as jobs
    from longclip.run import evaluations
    from longclip.run.folder import read_json

    if on not in ("slurm", "local", "debug"):
        raise UserError(f"--on {on}: valid is slurm, local or debug")
    profile = profile_of(site, runs)
    units: list[evaluation.Unit] = []

    def decide() -> list[evaluation.Unit]:
        """What is to be done now, after saying what is not."""
        units.extend(evaluation.plan(targets, [read_suite(file) for file in suite], checkpoint, profile, out, gpus))
        todo = [unit for unit in units if unit.suites]
        if not as_json:
            for file in (record for unit in units for record in unit.done):
                print(f"there already: {file}")
            for line in evaluation.skipped(todo):
                print(f"! {line}")
        return todo

    if on == "debug":
        jobs.here(decide)
    else:
        todo = decide()
        if on == "local":
            jobs.locally(todo, profile)
        elif todo:
            busy = jobs.under_way(todo)
            for unit in todo:
                if unit.key not in busy and (why := jobs.failure(unit)):
                    print(f"! failed before: {why.message}; the logs are in {unit.work / 'logs'}")
            queued = jobs.queue([unit for unit in todo if unit.key not in busy], profile)
            for unit in todo:
                if job := busy.get(unit.key):
                    print(f"left alone: {unit.name}: job {job} waits or runs")
            if queued:
                count = len(todo) - len(busy)
                print(f"queued {count} in {', '.join(queued)}; the same command queues what is missing then")
            return
    if not units:  # a rank that torchrun made besides the first
        return
    found = [record for unit in units for record in unit.done]
    for unit in units:
        for each in unit.suites:
            place = Path(unit.spec["out"])
            record = evaluations.cached(place, unit.spec["about"]["weights"], each.hash)
            found += [] if record is None else [record]
    if as_json:
        print(json.dumps([{"file": str(file), **read_json(file)} for file in found], indent=1))
        return
    for file in found:
        record_of = file.parents[2].name
        print(*(f"{record_of}: {line}" for line in lines(read_json(file))), sep="\n")
    groups = dict.fromkeys(unit.group.name for unit in units)
    print(f"{len(found)} records; next: longclip collect {' '.join(groups)}")


def collect(
    targets: Annotated[list[str], typer.Argument(help="Sweeps, runs, or models (those evaluated outside any run).")],
    dest: Annotated[Path | None, typer.Option("--out", help="Folder for tables and curves.")] = None,
    best_over: Annotated[
        list[str] | None, typer.Option("--best-over", metavar="KEY", help="Axis that validation chooses: train.lr")
    ] = None,
    allow: Annotated[bool, typer.Option("--allow-differences", help="Mark undeclared ones; do not refuse.")] = False,
    trim: Annotated[bool, typer.Option("--trim", help="All at the samples of the least advanced.")] = False,
    goal: Annotated[
        float | None, typer.Option("--goal", min=0, max=1, help="Samples and hours to this Recall@1: 0.4")
    ] = None,
    references: Annotated[Path | None, typer.Option("--references", help="Figures that papers report.")] = None,
    mlflow: Annotated[str | None, typer.Option("--mlflow", metavar="URI", help="Read from there, no folders.")] = None,
    no_sync: Annotated[bool, typer.Option("--no-sync", help="Leave MLflow alone.")] = False,
    site: SiteName = None,
    runs: Runs = None,
) -> None:
    """Lay sweeps out side by side: windows compared, seeds folded, intervals, curves; CSV, Markdown, LaTeX, JSON."""
    from longclip import screen
    from longclip.collect import command
    from longclip.collect.collect import Options
    from longclip.collect.tables import terminal

    given = Options(tuple(best_over or ()), allow, trim, goal, command=command.typed(sys.argv[1:]))
    root = None if mlflow else profile_of(site, runs).runs
    result, found = command.run(targets, dest, given, references, root, mlflow)
    screen.out.print(terminal(result.comparison))
    for warning in [*result.comparison.warnings, *filter(None, [command.next_step(result.comparison)])]:
        print(f"! {warning}")
    print(command.wrote(result.files))
    if found and not no_sync:
        from longclip.collect.upload import upload
        from longclip.submission import print_sync

        profile = profile_of(site, runs)
        print_sync(found, profile)
        if sweeps := upload(result, found, profile.tracking_uri):
            print(f"MLflow: results under {', '.join(sweeps)}")


def sync(
    target: Target = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again and again, until all runs have ended.")] = False,
    site: SiteName = None,
    runs: Runs = None,
) -> None:
    """Replay journals into MLflow: one run, one curve. Any number of times, from any machine."""
    from longclip.launch.tracking import keep_synced
    from longclip.submission import print_sync

    found, profile = find(site, runs, target), profile_of(site, runs)
    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            keep_synced(
                found, profile.tracking_uri, lambda line: print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
            )
    else:
        print_sync(found, profile)


def export(
    target: Run,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="best (by validation), last, or a step.")] = "best",
    dest: Annotated[Path | None, typer.Option("--to", help="A new folder; by default RUN-FORMAT, here.")] = None,
    form: Annotated[str, typer.Option("--format", help="transformers or open_clip.")] = "transformers",
    site: SiteName = None,
    runs: Runs = None,
) -> None:
    """A trained model as a folder that others load without longclip; needs the train extra."""
    from longclip.launch.export import export as write

    (run,) = single(find(site, runs, target))
    done = write(run, checkpoint, dest or Path(f"{run.name}-{form}"), form)
    print(f"wrote {done.folder} ({done.checkpoint}, {done.samples:,} samples); how to use it: {done.folder}/README.md")
