"""What several commands take and do alike: runs by name, a site profile, output for scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from longclip.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="For scripts.")]
SiteName = Annotated[str | None, typer.Option("--site", help="Site profile: a name or a file.")]
Runs = Annotated[Path | None, typer.Option("--runs", help="Folder of the runs, in place of the site's.")]
Run = Annotated[str, typer.Argument(help="Name, unique start of one, sweep/name, path or job id.", show_default=False)]
Target = Annotated[str | None, typer.Argument(help="Sweep, run, unique start of a run's name, path or job id.")]


def profile_of(name: str | None, runs: Path | None) -> Any:
    from longclip.launch.site import find_site

    return find_site(name, runs)


def find(site: str | None, runs: Path | None, target: str | None) -> list[Any]:
    from longclip.run.folder import find_runs, runs_of

    root = profile_of(site, runs).runs
    if target is not None:
        return find_runs(root, target)
    found = list(runs_of(root))
    if not found:
        raise UserError(f"no runs under {root}", "longclip submit experiments/demo, or --runs DIR")
    return found


def single(found: list[Any]) -> list[Any]:
    if len(found) != 1:
        raise UserError(f"that is {len(found)} runs: {', '.join(r.name for r in found)}; name one")
    return found
