"""The HTML report: what is in it, that nothing from outside is code in it, and that a real browser shows it offline."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longclip.collect.collect import Options, collect
from longclip.collect.command import typed
from longclip.collect.compare import compare
from longclip.collect.gather import gather
from longclip.collect.report import number, report
from longclip.collect.upload import headlines
from longclip.data.index import index_folder
from longclip.data.shards import Sample, open_dataset, write_shard
from longclip.run.attempts import attempts_of
from longclip.run.evaluations import write_arrays
from longclip.run.folder import RunFolder, read_json, write_json
from tests import chromium
from tests.chromium import Page, browser
from tests.helpers import add_attempt, end, experiment, finished_run, make_run, train

HOSTILE = "</script><script>window.owned = 1</script><img src=x onerror='window.owned = 2'>&amp; \"quoted\""
PAIRS = 40


class Seen(HTMLParser):
    """Elements with their attributes, and the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "elements end in the order in which they began"

    def handle_data(self, data: str) -> None:
        for tag in dict.fromkeys(self.open):
            self.text.setdefault(tag, []).append(data)


def shards(folder: Path) -> Path:
    """PAIRS images, each of one colour; the eleventh caption is hostile."""
    folder.mkdir(parents=True)
    samples = []
    for i in range(PAIRS):
        file = io.BytesIO()
        Image.new("RGB", (300, 200), (5 * i, 100, 100)).save(file, "PNG")
        samples.append(Sample(f"pair{i:03d}", file.getvalue(), HOSTILE if i == 10 else f"caption number {i}", {}))
    write_shard(folder / "a.tar", samples[:30])
    write_shard(folder / "b.tar", samples[30:])
    index_folder(folder)
    return folder


def ranked(run: RunFolder, data: Path, hits: int) -> RunFolder:
    """The first ``hits`` queries are hits both ways; the others' matches come at places 2, 3, ..."""
    ranks = np.maximum(np.arange(PAIRS) - hits + 1, 0).astype(np.int32)
    write_arrays(run.evaluations / "test.npz", {"test/i2t": ranks, "test/t2i": ranks})
    record = read_json(run.evaluations / "test.json")
    metrics = {**record["metrics"], "pairs": float(PAIRS)}
    metrics |= {f"{side}_recall_at_1": hits / PAIRS for side in ("i2t", "t2i", "mean")}
    write_json(run.evaluations / "test.json", {**record, "dataset": open_dataset(data).hash, "metrics": metrics})
    (attempt,) = attempts_of(run)
    submitted = attempt.path / "submitted.json"
    write_json(submitted, {**read_json(submitted), "paths": {"data.test": str(data)}})
    return run


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    """77 finds 10 of 40, 512 finds 25; a run of 154 with a hostile message has failed."""
    folder = tmp_path_factory.mktemp("report")
    data = shards(folder / "data")
    runs = []
    for window, hits in ((77, 10), (512, 25)):
        val = {500: hits / 80, 1000: hits / PAIRS}
        run = finished_run(folder, experiment(window), val, sweep="a<b>&c", i2t=0.1, t2i=0.1)
        runs.append(ranked(run, data, hits))
    failed = make_run(folder, experiment(154), "a<b>&c")
    attempt = add_attempt(failed, 0)
    train(attempt, 0, 400, 60, val={400: 0.1})
    end(attempt, "crashed", 400, 200, HOSTILE)
    return [*runs, failed]


@pytest.fixture(scope="module")
def page(sweep: list[RunFolder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    result = collect(sweep, out, Options(command="longclip collect 'a<b>&c'"))
    assert out / "report.html" in result.files
    return out / "report.html"


@pytest.fixture(scope="module")
def seen(page: Path) -> Seen:
    return Seen(page.read_text(encoding="utf-8"))


def test_all_that_comes_from_outside_is_text(seen: Seen) -> None:
    assert seen.open == []
    tags = [tag for tag, _ in seen.tags]
    figures = sum(a.get("type") == "application/json" for _, a in seen.tags)
    assert tags.count("script") == figures + 2, "figures as data, plotly.js, and the page's own"
    assert not [a for _, attributes in seen.tags for a in attributes if a.startswith("on")]
    assert "a<b>&c" in seen.text["h1"]
    assert any("</script><script>window.owned = 1</script>" in text for text in seen.text["li"]), "the failed run's"
    whole = "".join(seen.text["p"])
    assert HOSTILE in whole, "a caption"


def test_it_loads_nothing(seen: Seen) -> None:
    for tag, attributes in seen.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    (policy,) = [a["content"] for t, a in seen.tags if t == "meta" and "http-equiv" in a]
    assert policy is not None and policy.startswith("default-src 'none'") and "http" not in policy


def test_warnings_stand_before_the_results(page: Path, seen: Seen) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.index('role="alert"') < text.index("<h2>Results") < text.index("<table")
    assert any(item.startswith("ctx154: unfinished (400/1.0 k), crashed: ") for item in seen.text["li"])


def test_single_queries(seen: Seen) -> None:
    titles = [text for text in seen.text["h3"] if ": " in text]
    assert titles == ["found by ctx512 only: 15", "found by both: 10", "found by neither: 15"]
    pictures = [a["src"] or "" for t, a in seen.tags if t == "img"]
    assert len(pictures) == 12
    first = Image.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2])))
    assert first.size == (144, 96) and first.format == "JPEG"
    red = first.getpixel((70, 50))
    assert isinstance(red, tuple) and abs(red[0] - 5 * 10) <= 3, "query 10 is the first that 77 misses"
    assert "ctx77: caption at 2, image at 2; ctx512: caption at 1, image at 1" in seen.text["strong"]
    assert sum(text.startswith("pair0") for text in seen.text["code"]) == 12


def test_what_it_takes_to_do_it_again(sweep: list[RunFolder], seen: Seen) -> None:
    said = "\n".join(seen.text["pre"])
    assert "longclip collect 'a<b>&c'" in said
    for run in sweep:
        assert f"longclip submit {run.path}/experiment.yaml" in said
        assert run.uid in seen.text["td"]
        assert run.experiment_file.read_text() in said
    hashes = "".join(seen.text["code"])
    assert read_json(sweep[0].evaluations / "test.json")["dataset"] in hashes
    assert "c0dec0de" in seen.text["td"] and "9f31c02" in seen.text["td"]


def test_no_examples_without_their_reason(sweep: list[RunFolder], tmp_path: Path) -> None:
    data = shards(tmp_path / "data")
    runs = [
        ranked(finished_run(tmp_path, experiment(w), {1000: 0.5}, sweep="s", i2t=0.1, t2i=0.1), data, h)
        for w, h in ((77, 10), (512, 25))
    ]

    def why() -> str:
        text = "".join(Seen(report(compare(gather(runs)))).text["p"])
        found = re.search(r"None are shown: (.*?)\.(?=Written|This page|The runs|$)", text)
        return found[1] if found else ""

    assert why() == ""
    (data / "a.tar").rename(tmp_path / "a.tar")
    assert "not readable where it was" in why()
    (tmp_path / "a.tar").rename(data / "a.tar")
    for run in runs:
        record = read_json(run.evaluations / "test.json")
        write_json(run.evaluations / "test.json", {**record, "dataset": "0" * 64})
    assert "not those that were scored" in why()
    for run in runs:
        (run.evaluations / "test.npz").unlink()
    assert "ranks of single queries were not kept" in why()
    assert "no two windows" in report(compare(gather(runs[:1])))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("47.2 [44.1, 50.3]", 47.2),
        ("+1.8 [+1.1, +2.5]", 1.8),
        ("-6.4", -6.4),
        ("12.7 k", 12_700),
        ("6.3 M (2 of 3)", 6.3e6),
        ("2.2%", 2.2),
        ("0.042 (0.0)", 0.042),
        ("finished", None),
        ("", None),
    ],
)
def test_what_a_cell_is_sorted_by(text: str, value: float | None) -> None:
    assert number(text) == (None if value is None else pytest.approx(value))


def test_windows_are_sorted_by_both() -> None:
    cells = ["512 / 512", "77 / 512", "77 / 77", "512 / 77"]
    assert sorted(cells, key=number) == ["77 / 77", "77 / 512", "512 / 77", "512 / 512"]


def test_the_command_has_no_password() -> None:
    said = typed(["collect", "a b", "--mlflow", "https://me:secret@host/x"])
    assert said == "longclip collect 'a b' --mlflow https://host/x"


def test_means_for_mlflow(sweep: list[RunFolder]) -> None:
    found = headlines(compare(gather(sweep)))
    assert found == {"a<b>&c": {"sweep/Recall at 1/77": 0.25, "sweep/Recall at 1/512": 0.625}}


# ---- in a browser --------------------------------------------------------------------------------------------------

needs_chromium = pytest.mark.skipif(chromium.FOUND is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def opened(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile"), "--host-resolver-rules=MAP * ~NOTFOUND") as there:
        there.send(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0
        )
        there.open(page.resolve().as_uri())
        yield there


@needs_chromium
def test_it_opens_without_a_network(page: Path, opened: Page) -> None:
    assert opened.run("document.querySelectorAll('.plot .main-svg').length") > 0
    assert opened.run("window.owned") is None
    assert opened.errors() == []
    asked = [url for url in opened.requests() if not url.startswith("data:")]
    assert asked == [page.resolve().as_uri()], "and asks for nothing but itself"


COLUMN = """(name => {
  const table = document.querySelector('table'), heads = [...table.querySelectorAll('th')];
  const i = heads.findIndex(h => h.textContent === name);
  return [heads[i].getAttribute('aria-sort'), ...[...table.tBodies[0].rows].map(r => r.cells[i].textContent)];
})"""


@needs_chromium
def test_a_click_on_a_heading_sorts(opened: Page) -> None:
    def click(name: str) -> list[str]:
        find = f"[...document.querySelectorAll('th button')].find(b => b.textContent === '{name}')"
        opened.run(f"{find}.scrollIntoView({{block: 'center', inline: 'center'}})")
        box = opened.run(f"(b => ({{x: b.x + b.width / 2, y: b.y + b.height / 2}}))({find}.getBoundingClientRect())")
        for what in ("mousePressed", "mouseReleased"):
            opened.mouse(what, box["x"], box["y"])
        return list(opened.run(f"{COLUMN}('{name}')"))

    assert click("window") == ["descending", "512", "154", "77"]
    assert click("window") == ["ascending", "77", "154", "512"]
    falling, rising = click("i2t R@1"), click("i2t R@1")
    assert [cell[:4] for cell in falling] == ["desc", "62.5", "25.0", ""]
    assert [cell[:4] for cell in rising] == ["asce", "25.0", "62.5", ""], "what says nothing stays last"
    assert click("run") == ["descending", "ctx512", "ctx154", "ctx77"], "numbers in names count as numbers"


@needs_chromium
def test_dragging_a_box_zooms_and_a_double_click_shows_all(opened: Page) -> None:
    opened.run("document.querySelectorAll('.plot')[1].scrollIntoView({block: 'center'})")
    span = "(a => a[1] - a[0])(document.querySelectorAll('.plot')[1]._fullLayout.xaxis.range)"
    box = opened.run(
        "(b => ({x: b.x, y: b.y, w: b.width, h: b.height}))"
        "(document.querySelectorAll('.plot')[1].querySelector('.nsewdrag').getBoundingClientRect())"
    )
    before = opened.run(span)
    places = [(box["x"] + f * box["w"], box["y"] + f * box["h"]) for f in (0.3, 0.45, 0.6)]
    opened.mouse("mousePressed", *places[0], buttons=1)
    for place in places[1:]:
        opened.mouse("mouseMoved", *place, buttons=1)
    opened.mouse("mouseReleased", *places[-1])
    settled = "new Promise(done => setTimeout(done, 400))"
    opened.run(settled)
    assert opened.run(span) == pytest.approx(0.3 * before, rel=0.05)
    for _ in range(5):  # on a busy machine two clicks may be too far apart to be a double one
        for count in (1, 2):
            for what in ("mousePressed", "mouseReleased"):
                opened.mouse(what, *places[1], clickCount=count)
        opened.run(settled)
        if opened.run(span) > 0.9 * before:
            break
    assert opened.run(span) == pytest.approx(before, rel=0.01)


@needs_chromium
def test_it_prints(opened: Page) -> None:
    pdf = base64.b64decode(opened.send("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"])
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000
    opened.run("new Promise(done => setTimeout(done, 400))")
    assert opened.run("document.querySelector('.plot').clientWidth") > 490, "as it was on the screen"
    assert opened.errors() == []
