"""What a window wastes, shown: a table for the terminal, CSV files and a figure."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from longclip.data.waste import Lengths
from longclip.errors import SiteError

if TYPE_CHECKING:
    from rich.table import Table


EVERY = 20.0
"""seconds between two lines about progress in a log file"""


@contextmanager
def progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's standard error, a line now and then in a log file."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    last = time.monotonic()

    def lines(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY:
            last = time.monotonic()
            print(f"{done:,} of {total:,} samples", file=sys.stderr, flush=True)

    if not console.is_terminal:
        yield lines
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("counting", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def table(lengths: Lengths, windows: Sequence[int]) -> Table:
    """One row a window, shares in percent."""
    from rich.table import Table

    summary = lengths.as_dict(())
    made = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left")
    made.caption = (
        f"{lengths.texts:,} texts, {lengths.tokens:,} tokens and {lengths.specials} special ones each · length: "
        f"mean {summary['mean']:.0f}, median {summary['p50']}, 95 % {summary['p95']}, longest {summary['longest']:,}"
    )
    for column in ("window", "waste (cut off)", "tokens cut", "texts cut", "padding (packing saves)"):
        made.add_column(column, justify="right")
    for window in windows:
        row = lengths.at(window)
        shares = [f"{100 * row[key]:.1f} %" for key in ("waste", "texts_cut", "padding")]
        made.add_row(str(window), shares[0], f"{row['tokens_cut']:,}", *shares[1:])
    return made


def write(lengths: Lengths, windows: Sequence[int], out: Path) -> list[Path]:
    """Writes ``waste.csv`` (a row a window), ``lengths.csv`` (tokens, texts) and ``tokens.png`` into ``out``.

    Raises:
        SiteError: ``out`` cannot be written.
    """
    files = [out / name for name in ("waste.csv", "lengths.csv", "tokens.png")]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(files[0], "w", newline="", encoding="utf-8") as file:
            rows = [lengths.at(window) for window in windows]
            writer = csv.DictWriter(file, list(lengths.at(1)), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        with open(files[1], "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("tokens", "texts"), *sorted(lengths.counts.items())])
        _figure(lengths, windows, files[2])
    except OSError as error:
        raise SiteError(f"cannot write {error.filename or out}: {error.strerror or error}", "--out FOLDER") from error
    return files


def _figure(lengths: Lengths, windows: Sequence[int], file: Path) -> None:
    """Left: how long the texts are. Right: what truncation and padding waste, by window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    last = max(*windows, lengths.quantile(0.99))
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)  # no display, and no state shared with a pyplot that the caller may use
    left, right = figure.subplots(1, 2)
    bins = [min(length, last) for length in lengths.counts]
    left.hist(bins, bins=60, range=(0, last), weights=list(lengths.counts.values()), color="#56B4E9")
    left.set(title=f"{lengths.texts:,} texts", xlabel=f"tokens (those above {last:,} in the last bar)", ylabel="texts")
    steps = sorted({*windows, *range(max(1, lengths.specials), last + 1, max(1, last // 200))})
    for values, label, colour, dash in (
        ([lengths.waste(w) for w in steps], "cut off, of all tokens", "#D55E00", "-"),
        ([lengths.padding(w) for w in steps], "empty, of all padded places", "#0072B2", "--"),
    ):
        right.plot(steps, [100 * v for v in values], dash, color=colour, label=label)
    right.set(title="Waste", xlabel="window [tokens]", ylabel="[%]", ylim=(0, 100))
    right.legend(fontsize="small", frameon=False)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
        for window in windows:
            panel.axvline(window, color="0.6", linewidth=0.8, linestyle=":")
    right.set_xticks(list(windows), [str(w) for w in windows], fontsize="small")
    figure.savefig(file, format="png")
