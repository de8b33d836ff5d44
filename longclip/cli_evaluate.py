"""``longclip evaluate``: parse, call, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from longclip.cli_pairs import Json, SiteName
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
    from longclip.launch.site import find_site
    from longclip.run import evaluations
    from longclip.run.folder import read_json

    if on not in ("slurm", "local", "debug"):
        raise UserError(f"--on {on}: valid is slurm, local or debug")
    profile = find_site(site, runs)
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
