"""The command line: parse, call one function, print.

Nothing heavy is imported here or by what the front's commands call: ``--help``, ``check``, ``submit``, ``status`` and
``collect`` run without torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from longclip import __version__
from longclip.errors import LongclipError, SiteError, UserError

app = typer.Typer(
    name="longclip",
    help="Train image-text models at several context lengths on Slurm: one YAML an experiment, one folder a run, "
    "one table a sweep.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Shards: synthesize, index, tokens.", no_args_is_help=True)
app.add_typer(data_app, name="data")
site_app = typer.Typer(help="Site profiles: init.", no_args_is_help=True)
app.add_typer(site_app, name="site")
longcap_app = typer.Typer(help="Articles to shards: fetch, build, rewrite.", no_args_is_help=True)
app.add_typer(longcap_app, name="longcap")

_debug = False

Paths = Annotated[list[Path], typer.Argument(help="Experiment files, or folders of them.", show_default=False)]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: train.lr=3e-4")]
SiteName = Annotated[str | None, typer.Option("--site", help="Site profile: a name or a file.")]
Runs = Annotated[Path | None, typer.Option("--runs", help="Folder of the runs, in place of the site's.")]
Json = Annotated[bool, typer.Option("--json", help="For scripts.")]
Run = Annotated[str, typer.Argument(help="Name, unique start of one, sweep/name, path or job id.", show_default=False)]
Target = Annotated[str | None, typer.Argument(help="Sweep, run, unique start of a run's name, path or job id.")]


def main() -> None:
    """Entry point: every error is one message and an exit code; ``--debug`` shows the traceback."""
    try:
        app()
    except LongclipError as error:
        if _debug:
            raise
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(error.exit_code)
    except PermissionError as error:  # somebody else's folder
        if _debug:
            raise
        print(f"error: {': '.join(filter(None, (error.filename, error.strerror)))}", file=sys.stderr)
        sys.exit(SiteError.exit_code)
    except BrokenPipeError:  # `longclip status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    from longclip.experiment.load import load

    loaded = load(paths, set_)
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
    gpus: Annotated[str | None, typer.Option("--gpus", help="How many: 4, or 1,4,16 for a row each.")] = None,
    utilisation: Annotated[float, typer.Option("--utilisation", min=0.01, max=1, help="Of the GPU's peak.")] = 0.35,
    as_json: Json = False,
    site: SiteName = None,
) -> None:
    """Parameters, memory per GPU at every ZeRO stage, time and GPU-hours, disk: before anything is queued."""
    from longclip import screen
    from longclip.experiment.load import load
    from longclip.launch.forecast import forecasts
    from longclip.train.gpus import named, of_site

    profile = _site(site, None)
    device = of_site(profile.gpu_type) if gpu is None else named(gpu)
    counts = gpus.split(",") if gpus else []
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise UserError(f"--gpus {gpus}: valid is a number, or several with commas: 1,4,16")
    found, notes = forecasts(load(paths, set_), profile, device, [int(count) for count in counts], utilisation)
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

    profile = _site(site, runs)
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

    profile = _site(site, runs)
    found = find_runs(profile.runs, target)
    loaded = [Loaded(r.experiment(), r.path, r.sweep, r.axes()) for r in found]
    plans = plan(loaded, profile, retry=True)
    for run, one in zip(found, plans, strict=True):
        if one.run.path.resolve() != run.path.resolve():
            raise UserError(
                f"{run.path}: retry would begin {one.run.path} instead: data or weights have changed, or --runs"
            )
    screen.print_plans(plans, profile)
    if code := carry_out(plans, profile, on, wait):
        raise typer.Exit(code)


def _site(name: str | None, runs: Path | None) -> Any:
    from longclip.launch.site import find_site

    return find_site(name, runs)


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

    found = _find(site, runs, target)
    if as_json:
        print(json.dumps([s.as_dict() for s in statuses(found)[0]], indent=1))
    elif watch:
        screen.watch(found)
    else:
        screen.print_status(found)


def _find(site: str | None, runs: Path | None, target: str | None) -> list[Any]:
    from longclip.run.folder import find_runs, runs_of

    root = _site(site, runs).runs
    if target is not None:
        return find_runs(root, target)
    found = list(runs_of(root))
    if not found:
        raise UserError(f"no runs under {root}", "longclip submit experiments/demo, or --runs DIR")
    return found


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
    (run,) = _single(_find(site, runs, target))
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

    (run,) = _single(_find(site, runs, target))
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

    found = compare(a, b, _site(site, runs))
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        print("\n".join(found.lines()))


def _single(found: list[Any]) -> list[Any]:
    if len(found) != 1:
        raise UserError(f"that is {len(found)} runs: {', '.join(r.name for r in found)}; name one")
    return found


@app.command()
def cancel(
    target: Annotated[str, typer.Argument(help="Run or sweep.")], site: SiteName = None, runs: Runs = None
) -> None:
    """Stop queued and running jobs for good; ``retry`` continues them."""
    from longclip.launch.cancel import cancel_runs

    cancelled = cancel_runs(_find(site, runs, target))
    for name, what in cancelled:
        print(f"{name}: {what}")
    if not cancelled:
        print("nothing to cancel: no run is queued or running")


@app.command()
def collect(
    targets: Annotated[list[str], typer.Argument(help="Sweeps or runs.")],
    dest: Annotated[Path | None, typer.Option("--out", help="Folder for tables and curves.")] = None,
    no_sync: Annotated[bool, typer.Option("--no-sync", help="Leave MLflow alone.")] = False,
    site: SiteName = None,
    runs: Runs = None,
) -> None:
    """Lay a sweep out side by side: one row a run, curves, CSV and Markdown."""
    from longclip import screen
    from longclip.collect.tables import collect as collect_runs
    from longclip.collect.tables import terminal

    found = [run for target in targets for run in _find(site, runs, target)]
    result = collect_runs(found, dest or Path("results") / found[0].sweep)
    screen.out.print(terminal(result))
    for warning in result.warnings:
        print(f"! {warning}")
    print(f"wrote {', '.join(str(p) for p in result.files)}")
    if not no_sync:
        from longclip.submission import print_sync

        print_sync(found, _site(site, runs))


@app.command()
def sync(
    target: Target = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again and again, until all runs have ended.")] = False,
    site: SiteName = None,
    runs: Runs = None,
) -> None:
    """Replay journals into MLflow: one run, one curve. Any number of times, from any machine."""
    from longclip.launch.tracking import keep_synced
    from longclip.submission import print_sync

    found, profile = _find(site, runs, target), _site(site, runs)
    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            keep_synced(
                found, profile.tracking_uri, lambda line: print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
            )
    else:
        print_sync(found, profile)


@app.command()
def doctor(site: SiteName = None, runs: Runs = None, as_json: Json = False) -> None:
    """Can this machine submit? Slurm, partition, limits, folders, datasets, worker, MLflow: one line each."""
    from longclip.launch.doctor import examine

    checks = []
    for check in examine(_site(site, runs)):
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


@app.command()
def export(
    target: Run,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="best (by validation), last, or a step.")] = "best",
    dest: Annotated[Path | None, typer.Option("--to", help="A new folder; by default RUN-FORMAT, here.")] = None,
    form: Annotated[str, typer.Option("--format", help="transformers or open_clip.")] = "transformers",
    site: SiteName = None,
    runs: Runs = None,
) -> None:
    """A trained model as a folder that others load without longclip; needs longclip[train]."""
    from longclip.launch.export import export as write

    (run,) = _single(_find(site, runs, target))
    done = write(run, checkpoint, dest or Path(f"{run.name}-{form}"), form)
    print(f"wrote {done.folder} ({done.checkpoint}, {done.samples:,} samples); how to use it: {done.folder}/README.md")


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

    plans = pruning.plan(_find(site, runs, target), keep_last)
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
    """Train here and now, on the ranks of torchrun or srun, or alone; needs longclip[train].

    Exit code 85: stopped by a signal and saved; the same command goes on.
    """
    from longclip.launch.direct import train_here
    from longclip.launch.restart import AGAIN

    verdict = train_here(file, set_ or [], _site(site, runs))
    print(verdict)
    if verdict != "finished":
        raise typer.Exit(AGAIN)


@data_app.command()
def index(
    shards: Annotated[Path, typer.Argument(help="Folder of *.tar.")],
    dest: Annotated[Path | None, typer.Option("--out", help="Where the index goes, if not beside the shards.")] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes.")] = 1,
) -> None:
    """Index a folder of WebDataset shards, once."""
    from longclip.data.index import index_folder

    done = index_folder(shards, dest, workers)
    print(f"indexed {done.samples:,} samples in {done.shards} shards -> {done.folder}/index.json")
    for reason, count in done.skipped.items():
        print(f"! skipped {count:,}: {reason}")


class _Numbers(typer.core.TyperCommand):
    """``--windows 77 154`` as well as ``--windows 77 --windows 154``: numbers after the option belong to it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        for before, word in zip(["", *args], args, strict=False):
            if word.isdecimal() and before.isdecimal() and spread[-2:-1] == ["--windows"]:
                spread.append("--windows")
            spread.append(word)
        return super().parse_args(ctx, spread)


@data_app.command(cls=_Numbers)
def tokens(
    shards: Annotated[list[str], typer.Argument(help="Indexed folders, or FOLDER/GLOB.tar.", show_default=False)],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="A folder, tokenizer.json, vocab.txt, CLIP's bpe_*.txt.gz, or a hub id.")
    ],
    windows: Annotated[list[int], typer.Option("--windows", min=1, help="In tokens.")] = [77, 154, 256, 512],  # noqa: B006
    text: Annotated[
        str, typer.Option("--text", metavar="FIELD", help="txt, a json field, or a template over these.")
    ] = "txt",
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes.")] = 1,
    dest: Annotated[Path | None, typer.Option("--out", help="Folder for waste.csv, lengths.csv, tokens.png.")] = None,
    as_json: Json = False,
) -> None:
    """How many tokens each window cuts off, and how many places padding leaves empty."""
    from longclip.data import waste_report
    from longclip.data.waste import measure

    with waste_report.progress() as advance:
        lengths = measure(shards, tokenizer, text, workers, advance)
    if as_json:
        print(json.dumps(lengths.as_dict(windows), indent=1))
    else:
        Console(soft_wrap=True).print(waste_report.table(lengths, windows))
    for shard, count in lengths.without.items():
        print(f"! no text {text!r} in {count:,} samples of {shard}", file=sys.stderr)
    if dest is not None:
        files = waste_report.write(lengths, windows, dest)
        print(f"wrote {', '.join(map(str, files))}", file=sys.stderr if as_json else sys.stdout)


@data_app.command()
def synthesize(
    dest: Annotated[Path, typer.Argument(help="Folder for train/, val/, test/ and tokenizer/.")],
    train: Annotated[int, typer.Option("--train", help="Training pairs.")] = 20000,
    val: Annotated[int, typer.Option("--val", help="Validation pairs.")] = 400,
    test: Annotated[int, typer.Option("--test", help="Test pairs.")] = 1000,
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Draw images with long captions whose best possible Recall@1 is known at every window."""
    from longclip.data.synthetic import synthesize as draw

    draw(dest, train, val, test, seed)
    print(f"wrote {dest}/train ({train:,} pairs), {dest}/val ({val:,}), {dest}/test ({test:,}), {dest}/tokenizer")


@longcap_app.command("build")
def longcap_build(
    src: Annotated[Path, typer.Argument(help="Folder of articles: XML with its media beside it.")],
    dest: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Folder, file or hub id; what counts --budget. Default: words.")
    ] = None,
    budget: Annotated[int, typer.Option("--budget", min=16, help="Most tokens of a long caption.")] = 512,
    licenses: Annotated[str, typer.Option("--licenses", help='"CC BY,CC0"; unknown only if named. Default: all.')] = "",
    val: Annotated[float, typer.Option("--val", min=0, help="Share of the articles for validation.")] = 0.01,
    test: Annotated[float, typer.Option("--test", min=0, help="Share of the articles for testing.")] = 0.01,
    against: Annotated[
        list[str] | None, typer.Option("--against", help="Evaluation images to leave out: shards, or a folder.")
    ] = None,
    distance: Annotated[int, typer.Option("--distance", min=0, max=16, help="Bits of 64 for near duplicates.")] = 4,
    shard_size: Annotated[int, typer.Option("--shard-size", min=1, help="Most pairs of a shard.")] = 10_000,
    seed: Annotated[int, typer.Option("--seed", help="Of the order.")] = 0,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes, or with --on slurm tasks.")] = 1,
    on: Annotated[str, typer.Option("--on", help="local or slurm.")] = "local",
    time_limit: Annotated[str, typer.Option("--time", help="With --on slurm: limit of each job.")] = "24:00:00",
    site: SiteName = None,
) -> None:
    """Build shards of image-text pairs with long captions from articles. The same command goes on after a stop."""
    from longclip.experiment.schema import parse_time
    from longclip.longcap.command import build
    from longclip.longcap.options import Options, license_names

    if on not in ("local", "slurm"):
        raise UserError(f"--on {on}: valid is local or slurm")
    try:
        minutes = parse_time(time_limit)
    except ValueError as error:
        raise UserError(f"--time {error}") from None
    options = Options(
        tokenizer=tokenizer,
        budget=budget,
        licenses=license_names(licenses),
        val=val,
        test=test,
        shard_size=shard_size,
        against=tuple(against or ()),
        distance=distance,
        seed=seed,
    )
    build(src, dest, options, workers, (_site(site, None), minutes) if on == "slurm" else None)


@longcap_app.command("fetch")
def longcap_fetch(
    dest: Annotated[Path, typer.Argument(file_okay=False, help="Folder of the articles, one each.")],
    articles: Annotated[list[str] | None, typer.Argument(help="PMC13901, or one version: PMC13901.1")] = None,
    ids: Annotated[Path | None, typer.Option("--ids", help="File with a PMCID a line, or ESearch's JSON.")] = None,
    licenses: Annotated[str | None, typer.Option("--licenses", help='Only these: "CC BY,CC0".')] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Articles after which it is enough.")] = None,
    source: Annotated[str | None, typer.Option("--from", help="A mirror's URL, or a folder laid out like it.")] = None,
    rate: Annotated[float, typer.Option("--rate", help="Requests a second.")] = 10.0,
    connections: Annotated[int, typer.Option("--connections", help="Articles at a time.")] = 4,
    contact: Annotated[
        str, typer.Option("--contact", envvar="LONGCLIP_CONTACT", help="Mail or URL for the User-Agent.")
    ] = "",
) -> None:
    """Fetch articles and their images from PMC's open bucket: named ones, or all of a licence. The same call resumes.

    Without articles or --ids, --licenses walks the service's whole inventory (see --limit).
    """
    import shlex

    from longclip.longcap import pmc
    from longclip.longcap.fetch import FAILED, fetch, report
    from longclip.longcap.polite import Manners
    from longclip.longcap.store import open_store

    wanted = pmc.parse_licenses(licenses) if licenses is not None else None
    store = open_store(source or pmc.BUCKET, Manners(rate=rate, connections=connections, contact=contact))
    named = pmc.choose(articles or [], ids)
    if named is None and wanted is None:
        raise UserError("fetch what?", "name articles (PMC13901), or --ids FILE, or all of a licence: --licenses CC0")
    outcome = fetch(store, named or pmc.inventory(store, dest / ".inventory"), dest, wanted, limit, connections)
    again = ["longclip", "longcap", "fetch", dest, "--ids", dest / FAILED]
    again += [w for o, v in (("--from", source), ("--licenses", licenses)) if v is not None for w in (o, v)]
    report(outcome, dest, shlex.join(map(str, again)))
    if outcome.stopped:
        raise (LongclipError if outcome.stopped == "interrupted" else SiteError)(
            f"stopped: {outcome.stopped}", "the same command continues"
        )
    if outcome.failed:
        raise typer.Exit(1)


@longcap_app.command("rewrite")
def longcap_rewrite(
    src: Annotated[Path, typer.Argument(help="Indexed shards with long captions: FOLDER or FOLDER/GLOB.tar.")],
    dest: Annotated[Path, typer.Argument(file_okay=False, help="Folder for the rewritten shards.")],
    url: Annotated[str, typer.Option("--url", help="OpenAI-compatible endpoint: http://HOST:8000/v1")],
    model: Annotated[str, typer.Option("--model", help="As the endpoint calls it.")],
    prompt: Annotated[Path, typer.Option("--prompt", exists=True, dir_okay=False, help="File: the system message.")],
    token_env: Annotated[str | None, typer.Option("--token-env", help="Variable that holds the token.")] = None,
    max_requests: Annotated[int | None, typer.Option("--max-requests", min=1, help="Budget, all calls.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Budget, all calls.")] = None,
    rate: Annotated[float, typer.Option("--rate", help="Requests a second.")] = 10.0,
    connections: Annotated[int, typer.Option("--connections", help="Requests at a time.")] = 8,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds to wait for an answer.")] = 120.0,
) -> None:
    """Have a language model rewrite long captions; what it invents is not taken. The same call goes on after a stop."""
    from longclip.longcap import enrich
    from longclip.longcap.polite import Manners

    try:
        text = prompt.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {prompt}: {error}") from error
    manners = Manners(rate=rate, connections=connections, timeout=timeout)
    endpoint = enrich.Endpoint(url, model, text, manners, enrich.token_from(token_env) if token_env else None)
    done = enrich.rewrite(src, dest, endpoint, enrich.Budget(max_requests, max_tokens), connections)
    rewritten = done.outcomes.get("rewritten", 0)
    print(
        f"rewrote {rewritten:,} of {done.samples:,} long captions into {dest}: {done.requests:,} requests now, ", end=""
    )
    print(f"{done.tokens:,} tokens in all")
    for outcome, count in done.outcomes.items():
        if outcome != "rewritten":
            print(f"! kept {count:,} as they were: {outcome}")
    if done.unreadable:
        print(f"! left out {done.unreadable:,}: unreadable, as the index of {src} says")
    if done.invented:
        print("  most often invented: " + ", ".join(f"{what!r} {count:,}" for what, count in done.invented.items()))


if __name__ == "__main__":
    main()
