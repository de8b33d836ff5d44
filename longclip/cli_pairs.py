"""The command line's other half: what makes pairs. ``longclip data`` and ``longclip longcap``.

As in ``cli.py`` nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from longclip.cli_options import Json, SiteName, profile_of
from longclip.errors import LongclipError, SiteError, UserError

data_app = typer.Typer(help="Shards: synthesize, index, tokens.", no_args_is_help=True)
longcap_app = typer.Typer(help="Articles to shards: fetch, build, rewrite.", no_args_is_help=True)


@data_app.command()
def index(
    shards: Annotated[Path, typer.Argument(help="Folder of *.tar.")],
    dest: Annotated[Path | None, typer.Option("--out", help="Where the index goes, if not beside the shards.")] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes.")] = 1,
) -> None:
    """Index a folder of WebDataset shards, once, and again after shards change.

    Noticed without it: a shard that is gone or has another size, a sample that is not where it was. Not noticed: other
    bytes in a shard whose samples have the same keys and sizes as before.
    """
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
    from pydantic import ValidationError

    from longclip.experiment.durations import parse_time
    from longclip.longcap.command import build
    from longclip.longcap.options import Options, license_names, mistake

    if on not in ("local", "slurm"):
        raise UserError(f"--on {on}: valid is local or slurm")
    try:
        minutes = parse_time(time_limit)
    except ValueError as error:
        raise UserError(f"--time {error}") from None
    try:
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
    except ValidationError as error:
        raise mistake(error) from None
    build(src, dest, options, workers, (profile_of(site, None), minutes) if on == "slurm" else None)


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
