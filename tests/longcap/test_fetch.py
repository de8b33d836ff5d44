"""Fetching from a bucket that stalls, cuts off, refuses and lies, over real sockets."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from longclip.errors import LongclipError, UserError
from longclip.longcap.fetch import Outcome, fetch
from longclip.longcap.pmc import ArticleId, choose, inventory, parse_id, read_ids
from longclip.longcap.polite import Manners
from longclip.longcap.store import open_store
from tests.longcap.bucket import PmcBucket, md5, serve

DATA = Path(os.environ.get("LONGCLIP_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
FAST = Manners(rate=1000, timeout=1.0, attempts=3, backoff=0.02)
IMAGE = random.Random(0).randbytes(300_000)
FIGURE = "PMC1.1/fig1.jpg"


@pytest.fixture
def bucket() -> Iterator[PmcBucket]:
    made = PmcBucket()
    made.add("PMC1", {"fig1.jpg": IMAGE, "table.xlsx": b"numbers"})
    made.add("PMC2", {"g001.png": b"png" * 999}, license="CC BY-NC")
    with serve(made):
        yield made


def get(bucket: PmcBucket, dest: Path, *ids: str, manners: Manners = FAST, **more: object) -> Outcome:
    store = open_store(bucket.url, manners)
    return fetch(store, [parse_id(i) for i in ids or ("PMC1",)], dest, **more)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, by path, but for records that say where from."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "source.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def longclip(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longclip.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_articles_land_with_their_images_and_a_record(bucket: PmcBucket, tmp_path: Path) -> None:
    outcome = get(bucket, tmp_path, "PMC1", "PMC2")
    assert (outcome.fetched, outcome.files, outcome.failed, outcome.stopped) == (2, 4, {}, "")
    assert files(tmp_path) == {
        "PMC1/PMC1.1.xml": bucket.objects["PMC1.1/PMC1.1.xml"],
        "PMC1/fig1.jpg": IMAGE,
        "PMC2/PMC2.1.xml": bucket.objects["PMC2.1/PMC2.1.xml"],
        "PMC2/g001.png": b"png" * 999,
    }
    record = json.loads((tmp_path / "PMC1" / "source.json").read_text())
    assert (record["article"], record["license"], record["source"]) == ("PMC1.1", "CC BY", bucket.url)
    assert {"name": "fig1.jpg", "bytes": 300_000, "md5": md5(IMAGE)} in record["files"]
    assert record["left_out"] == ["table.xlsx"] and outcome.left_out == {".xlsx": 1}


def test_the_second_call_asks_for_what_is_missing_only(bucket: PmcBucket, tmp_path: Path) -> None:
    get(bucket, tmp_path, "PMC1", "PMC2")
    bucket.requests.clear()
    again = get(bucket, tmp_path, "PMC1", "PMC2")
    assert (again.fetched, again.there, bucket.requests) == (0, 2, [])
    (tmp_path / "PMC2" / "g001.png").unlink()
    healed = get(bucket, tmp_path, "PMC1", "PMC2")
    assert (healed.fetched, healed.there, healed.files) == (1, 1, 1)
    assert [r.key for r in bucket.requests if not r.key.endswith(".json")] == ["?PMC2.", "PMC2.1/g001.png"]
    assert (tmp_path / "PMC2" / "g001.png").read_bytes() == b"png" * 999


@pytest.mark.parametrize(
    "fault",
    [
        "stall",
        "silence",
        "cut",
        "trickle",
        "trickling header",
        "wrong length",
        "garbage",
        (503, {}),
        (429, {"Retry-After": "0"}),
        (500, {}),
        (429, {"Retry-After": "nonsense"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("key", [FIGURE, "PMC1.1/PMC1.1.json"])
def test_what_passes_is_outlasted(bucket: PmcBucket, tmp_path: Path, fault: object, key: str) -> None:
    bucket.faults[key] = [fault]
    outcome = get(bucket, tmp_path)
    assert (outcome.fetched, outcome.failed) == (1, {})
    assert (tmp_path / "PMC1" / "fig1.jpg").read_bytes() == IMAGE
    # A file of which more was announced than there is has all its bytes, and the right hash.
    assert len(bucket.asked(key)) == (1 if fault == "wrong length" and key == FIGURE else 2)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("fault", "reason", "attempts"),
    [
        ("silence", "no answer within 1 s, 3 times", 3),
        ("garbage", f"not {md5(IMAGE)}, 3 times", 3),
        ((503, {}), "503 Service Unavailable, 3 times", 3),
        ((404, {}), "404 Not Found", 1),
        ((403, {}), "403 Forbidden", 1),
        ((799, {}), "799", 1),
        ((429, {"Retry-After": "86400"}), "429 Too Many Requests, asks to wait 86,400 s", 1),
    ],
    ids=str,
)
def test_what_does_not_pass_is_named_and_stops_no_other(
    bucket: PmcBucket, tmp_path: Path, fault: object, reason: str, attempts: int
) -> None:
    bucket.faults[FIGURE] = [fault, ...]
    outcome = get(bucket, tmp_path, "PMC1", "PMC2")
    assert outcome.fetched == 1 and list(outcome.failed) == ["PMC1"]
    assert outcome.failed["PMC1"].startswith(FIGURE) and outcome.failed["PMC1"].endswith(reason)
    assert len(bucket.asked(FIGURE)) == attempts
    assert not (tmp_path / "PMC1" / "fig1.jpg").exists() and not (tmp_path / "PMC1" / "source.json").exists()
    assert (tmp_path / "failed.txt").read_text() == f"PMC1  {outcome.failed['PMC1']}\n"
    bucket.faults.clear()
    healed = get(bucket, tmp_path, *map(str, read_ids(tmp_path / "failed.txt")))
    assert healed.fetched == 1 and not (tmp_path / "failed.txt").exists()


def test_a_cut_file_is_continued_where_it_ended(bucket: PmcBucket, tmp_path: Path) -> None:
    bucket.faults[FIGURE] = ["cut"]
    get(bucket, tmp_path)
    first, second = bucket.asked(FIGURE)
    assert (first.range, second.range) == ("", "bytes=150000-")
    assert bucket.sent[FIGURE] == len(IMAGE)  # no byte twice
    assert (tmp_path / "PMC1" / "fig1.jpg").read_bytes() == IMAGE


@pytest.mark.parametrize("part", [IMAGE[:1000], b"x" * 1000, IMAGE, IMAGE + b"x", b""], ids=len)
@pytest.mark.parametrize("fault", [[], ["no ranges"]], ids=str)
def test_whatever_part_is_there_the_file_is_right(
    bucket: PmcBucket, tmp_path: Path, part: bytes, fault: list[str]
) -> None:
    (tmp_path / "PMC1").mkdir()
    (tmp_path / "PMC1" / "fig1.jpg.part").write_bytes(part)
    bucket.faults[FIGURE] = fault
    assert get(bucket, tmp_path).failed == {}
    assert (tmp_path / "PMC1" / "fig1.jpg").read_bytes() == IMAGE and not list(tmp_path.rglob("*.part"))
    if part == IMAGE:
        assert bucket.asked(FIGURE) == []


def test_without_a_known_hash_the_etag_is_verified_and_nothing_continued(bucket: PmcBucket, tmp_path: Path) -> None:
    bucket.add("PMC1", {}, media_urls=["s3://pmc-oa-opendata/PMC1.1/fig1.jpg"])
    bucket.faults[FIGURE] = ["cut", "garbage"]
    assert get(bucket, tmp_path).failed == {}
    assert [r.range for r in bucket.asked(FIGURE)] == ["", "", ""]
    assert (tmp_path / "PMC1" / "fig1.jpg").read_bytes() == IMAGE


@pytest.mark.parametrize("date", [False, True])
def test_a_wait_that_the_server_asks_for_holds_back_every_connection(
    bucket: PmcBucket, tmp_path: Path, date: bool
) -> None:
    for number in range(3, 9):
        bucket.add(f"PMC{number}", {})
    bucket.faults["?PMC1."] = [(429, {"Retry-After": formatdate(time.time() + 3, usegmt=True) if date else "2"})]
    get(bucket, tmp_path, *(f"PMC{n}" for n in range(1, 9)), manners=Manners(rate=10, timeout=5, attempts=3))
    times = [r.time for r in bucket.requests]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    # But for those on the wire when it spoke nobody asks on; then all do: more than the four requests left of PMC1.
    assert max(gaps) > 0.8 and len(times) - gaps.index(max(gaps)) - 1 > 8


@pytest.mark.parametrize("fault", ["silence", "trickling header"])
def test_an_answer_that_never_comes_is_given_up_by_name(bucket: PmcBucket, tmp_path: Path, fault: str) -> None:
    bucket.faults[FIGURE] = [fault, ...]
    outcome = get(bucket, tmp_path, manners=Manners(rate=1000, timeout=0.5, attempts=2, backoff=0.02))
    assert outcome.failed == {"PMC1": f"{FIGURE}: no answer within 0.5 s, 2 times"}


def test_requests_keep_the_pace(bucket: PmcBucket, tmp_path: Path) -> None:
    get(bucket, tmp_path, "PMC1", "PMC2", manners=Manners(rate=20, timeout=5, contact="me@example.org"))
    times = [r.time for r in bucket.requests]
    assert len(times) == 8 and times[-1] - times[0] > 0.9 * 7 / 20
    assert all(re.fullmatch(r"longclip/\S+ \(me@example\.org\)", r.agent) for r in bucket.requests)


def test_a_server_that_is_gone_is_not_asked_eight_million_times(tmp_path: Path) -> None:
    with serve(PmcBucket()) as gone:
        pass
    once = Manners(rate=1000, timeout=1.0, attempts=1)
    outcome = get(gone, tmp_path, *(f"PMC{n}" for n in range(1, 1000)), manners=once)
    assert outcome.stopped == f"{gone.url} is out of reach"
    assert 10 <= len(outcome.failed) < 30 and set(outcome.failed.values()) == {"Connection refused"}


BAD_URLS = [
    "s3://pmc-oa-opendata/PMC1.1/../../evil.jpg",
    "s3://pmc-oa-opendata/PMC1.1/..",
    "s3://pmc-oa-opendata/PMC1.1/.evil.jpg",
    "s3://pmc-oa-opendata/PMC1.1/sub/evil.jpg",
    "s3://pmc-oa-opendata/PMC1.1/sub\\evil.jpg",
    "s3://pmc-oa-opendata/PMC1.1//etc/evil.jpg",
    "s3://pmc-oa-opendata/PMC2.1/evil.jpg",
    "s3://pmc-oa-opendata/../evil.jpg",
    "s3://pmc-oa-opendata/PMC1.1/evil\x00.jpg",
    "s3://pmc-oa-opendata/PMC1.1/evil\n.jpg",
    "s3://pmc-oa-opendata/PMC1.1/" + "e" * 5000 + ".jpg",
    "s3://pmc-oa-opendata/PMC1.1/source.json",
    "s3://pmc-oa-opendata/PMC1.1/evil.jpg.part",
    "s3://pmc-oa-opendata/PMC1.1/evil.jpg?md5=../../evil",
    "s3://pmc-oa-opendata/PMC1.1/",
    "file:///etc/passwd",
    "http://127.0.0.1/PMC1.1/evil.jpg",
    "",
    17,
    None,
]


@pytest.mark.parametrize("url", BAD_URLS, ids=lambda u: repr(u)[:50])
def test_a_hostile_name_fails_its_article_and_leaves_the_folder(bucket: PmcBucket, tmp_path: Path, url: object) -> None:
    dest = tmp_path / "deep" / "down"
    bucket.add("PMC1", {}, media_urls=[url])
    outcome = get(bucket, dest, "PMC1", "PMC2")
    assert list(outcome.failed) == ["PMC1"] and outcome.fetched == 1, outcome
    assert set(files(tmp_path)) == {f"deep/down/{f}" for f in ("PMC2/PMC2.1.xml", "PMC2/g001.png", "failed.txt")}
    assert (dest / "failed.txt").read_text().count("\n") == 1


@pytest.mark.parametrize(
    "metadata",
    [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", b'{"pmcid": "PMC2", "version": 1, "xml_url": "x"}']
    + [json.dumps({"pmcid": "PMC1", "version": 1, "xml_url": u}).encode() for u in BAD_URLS[:3]],
    ids=lambda m: repr(m[:40]),
)
def test_metadata_that_are_none_fail_their_article(bucket: PmcBucket, tmp_path: Path, metadata: bytes) -> None:
    bucket.objects["PMC1.1/PMC1.1.json"] = metadata
    outcome = get(bucket, tmp_path, "PMC1", "PMC2")
    assert outcome.fetched == 1 and "metadata cannot be used" in outcome.failed["PMC1"]


def test_licences_are_kept_or_skipped_and_counted(bucket: PmcBucket, tmp_path: Path) -> None:
    bucket.add("PMC3", {}, license=None)
    outcome = get(bucket, tmp_path, "PMC1", "PMC2", "PMC3", licenses=frozenset({"CC BY"}))
    assert (outcome.fetched, outcome.failed) == (1, {})
    assert outcome.skipped == {"licence CC BY-NC": 1, "licence unknown": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["PMC1"]


def test_the_newest_version_unless_one_is_named(bucket: PmcBucket, tmp_path: Path) -> None:
    for version in (2, 10):
        bucket.add("PMC1", {"fig1.jpg": b"v%d" % version}, version=version)
    bucket.add("PMC11", {}, version=99)
    get(bucket, tmp_path / "newest", "PMC1")
    get(bucket, tmp_path / "named", "PMC1.2")
    assert set(files(tmp_path / "newest")) == {"PMC1/PMC1.10.xml", "PMC1/fig1.jpg"}
    assert files(tmp_path / "named")["PMC1/fig1.jpg"] == b"v2"
    other = get(bucket, tmp_path / "named", "PMC1.10")
    assert "holds PMC1.2; remove it" in other.failed["PMC1.10"]
    assert files(tmp_path / "named")["PMC1/fig1.jpg"] == b"v2"


def test_what_an_interrupted_fetch_of_another_version_left_is_removed(bucket: PmcBucket, tmp_path: Path) -> None:
    bucket.add("PMC1", {"fig1.jpg": IMAGE, "fig2.jpg": b"old" * 999, "fig3.tif": IMAGE, "g4": b"x"})
    bucket.faults["PMC1.1/fig3.tif"] = ["cut", ...]
    assert "PMC1" in get(bucket, tmp_path, manners=Manners(rate=1000, timeout=1.0, attempts=1)).failed
    assert set(files(tmp_path)) >= {"PMC1/PMC1.1.xml", "PMC1/fig2.jpg", "PMC1/fig3.tif.part"}
    (tmp_path / "PMC1" / "notes.txt").write_text("mine")
    bucket.add("PMC1", {"fig1.jpg": IMAGE, "fig2.png": b"new" * 999}, version=2)
    assert get(bucket, tmp_path).failed == {}
    assert set(files(tmp_path)) == {f"PMC1/{f}" for f in ("PMC1.2.xml", "fig1.jpg", "fig2.png", "notes.txt")}
    record = json.loads((tmp_path / "PMC1" / "source.json").read_text())
    assert record["article"] == "PMC1.2" and bucket.asked("PMC1.2/fig1.jpg") == []  # the same bytes as before


def test_an_article_that_is_not_there_and_a_mirror_that_cannot_list(bucket: PmcBucket, tmp_path: Path) -> None:
    assert get(bucket, tmp_path, "PMC404").failed == {"PMC404": f"is not in {bucket.url}"}
    bucket.lists = False
    outcome = get(bucket, tmp_path, "PMC1", "PMC2.1")
    assert outcome.fetched == 1 and "name one, as in PMC13901.1" in outcome.failed["PMC1"]


def test_a_folder_laid_out_like_the_bucket_gives_the_same(bucket: PmcBucket, tmp_path: Path) -> None:
    bucket.write(tmp_path / "mirror")
    (tmp_path / "mirror" / "PMC2.1" / "g001.png").write_bytes(b"bad disk")
    get(bucket, tmp_path / "web", "PMC1")
    outcome = fetch(open_store(str(tmp_path / "mirror"), FAST), [ArticleId(1), ArticleId(2)], tmp_path / "copy")
    assert "md5 is" in outcome.failed["PMC2"]
    assert set(files(tmp_path / "copy")) == {*files(tmp_path / "web"), "PMC2/PMC2.1.xml", "failed.txt"}
    assert files(tmp_path / "copy")["PMC1/fig1.jpg"] == IMAGE


@pytest.mark.skipif(not (DATA / "jats" / "with-images").is_dir(), reason="no real articles here")
def test_real_articles_arrive_as_they_are(tmp_path: Path) -> None:
    real = [p for p in sorted((DATA / "jats" / "with-images").iterdir()) if p.is_dir()]
    made, expected = PmcBucket(), {}
    for number, folder in enumerate(real, 1):
        media = {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix not in (".xml", ".nxml")}
        made.add(f"PMC{number}", media)
        made.faults[f"PMC{number}.1/{min(media)}"] = ["cut", (503, {})]
        expected |= {f"PMC{number}/{name}": data for name, data in media.items()}
    with serve(made):
        outcome = get(
            made, tmp_path, *(f"PMC{n}" for n in range(1, len(real) + 1)), manners=Manners(1000, backoff=0.02)
        )
    got = {name: data for name, data in files(tmp_path).items() if not name.endswith(".xml")}
    assert outcome.fetched == len(real) == 11 and got == expected


def test_by_licence_walks_the_newest_inventory_in_a_lasting_order(bucket: PmcBucket, tmp_path: Path) -> None:
    for number in range(3, 60):
        bucket.add(f"PMC{number}", {}, license="CC0" if number % 2 else "CC BY")
    bucket.add("PMC3", {}, version=2, license="CC0")
    bucket.add_inventory()
    bucket.objects["inventory-reports/pmc-oa-opendata/metadata/hive/x"] = b""
    store = open_store(bucket.url, FAST)
    order = list(inventory(store, tmp_path / "list"))
    assert sorted(map(str, order)) == sorted([f"PMC{n}.1" for n in range(1, 60) if n != 3] + ["PMC3.2"])
    assert order != sorted(order, key=lambda a: a.number)
    bucket.add("PMC60", {}, license="CC0")
    bucket.add_inventory("2026-01-19T01-00Z")
    later = list(inventory(store, tmp_path / "list"))
    assert [a for a in later if a.number != 60] == order
    outcome = fetch(store, iter(later), tmp_path / "out", frozenset({"CC0"}), limit=5)
    assert outcome.fetched == 5 and outcome.skipped.keys() == {"licence CC BY"}
    chosen = [a for a in later if json.loads(bucket.objects[f"{a}/{a}.json"])["license_code"] == "CC0"][:5]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {a.pmcid for a in chosen}


def test_no_inventory_is_one_error(bucket: PmcBucket, tmp_path: Path) -> None:
    with pytest.raises(LongclipError, match="inventory cannot be had: lists none"):
        list(inventory(open_store(bucket.url, FAST), tmp_path))
    bucket.add_inventory()
    bucket.objects["inventory-reports/pmc-oa-opendata/metadata/data/one.csv.gz"] = b"not gzip"
    with pytest.raises(LongclipError, match="inventory cannot be had: md5 is"):
        list(inventory(open_store(bucket.url, FAST), tmp_path))


def test_lists_of_articles(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("# mine\nPMC1\n\nPMC22.3  some reason with PMC9 in it\nPMC1\n")
    (tmp_path / "b.csv").write_text("Article File,Accession ID\noa/xx.tar.gz,PMC7,\n")
    (tmp_path / "c.json").write_text(json.dumps({"esearchresult": {"count": "2", "idlist": ["12810641", "5"]}}))
    assert list(map(str, read_ids(tmp_path / "a.txt"))) == ["PMC1", "PMC22.3"]
    assert list(map(str, read_ids(tmp_path / "b.csv"))) == ["PMC7"]
    assert list(map(str, choose(["PMC5"], tmp_path / "c.json") or [])) == ["PMC5", "PMC12810641"]
    for text in ("PMC1\nPCM2\n", "", "{}", '{"esearchresult": {"idlist": ["../x"]}}', "\x00\xff", "PMC1.2.x\nhello"):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(UserError):
            read_ids(tmp_path / "bad")


def test_the_command_says_what_came_of_it_and_what_to_type_next(bucket: PmcBucket, tmp_path: Path) -> None:
    bucket.faults["PMC2.1/g001.png"] = [(404, {}), ...]
    words = ("longcap", "fetch", tmp_path / "out", "--from", bucket.url, "--rate", "1000")
    done = longclip(*words, "PMC1", "PMC2", "--licenses", "CC BY,CC BY-NC")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done
    assert "fetched 1 articles (2 files, 0.3 MB)" in done.stdout and "1 .xlsx" in done.stdout
    assert "! PMC2: PMC2.1/g001.png: 404 Not Found\n! failed 1" in done.stdout
    bucket.faults.clear()
    next_command = shlex.split(done.stdout.partition("next: longclip ")[2])
    again = longclip(*next_command)
    assert again.returncode == 0 and "fetched 1 articles (1 files" in again.stdout, again
    assert "0 articles (0 files, 0.0 MB)" in longclip(*words, "PMC1", "PMC2").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "fetch what?"),
        (("PCM1",), "not a PMCID: 'PCM1'"),
        (("--ids", "nothing.txt"), "cannot read nothing.txt"),
        (("PMC1", "--licenses", "CCBY"), "'CCBY' is none of CC0, CC BY"),
        (("PMC1", "--from", "ftp://ftp.ncbi.nlm.nih.gov/pub/pmc"), "cannot fetch from ftp://"),
        (("PMC1", "--from", "no/such/folder"), "no such folder"),
        (("PMC1", "--rate", "0"), "rate 0.0: must be above 0"),
        (("PMC1", "--contact", "me\r\nHost: evil"), "contact"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    done = longclip("longcap", "fetch", tmp_path / "out", *words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_the_middle_it_goes_on_where_it_was(bucket: PmcBucket, tmp_path: Path, how: signal.Signals) -> None:
    bucket.faults[FIGURE] = ["stall"]
    words = ("longcap", "fetch", tmp_path, "PMC1", "PMC2", "--from", bucket.url, "--rate", "1000")
    command = [sys.executable, "-m", "longclip.cli", *map(str, words)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    part, deadline = tmp_path / "PMC1" / "fig1.jpg.part", time.monotonic() + 300
    while not (part.exists() and part.stat().st_size and (tmp_path / "PMC2" / "source.json").exists()):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.02)
    running.send_signal(how)
    _, stderr = running.communicate(timeout=60)
    if how == signal.SIGINT:
        assert running.returncode == 1 and "stopped: interrupted\n  next: the same command continues" in stderr
    kept = part.stat().st_size
    done = longclip(*words)
    assert done.returncode == 0 and "fetched 1 articles (1 files" in done.stdout and "1 were there" in done.stdout, done
    assert bucket.asked(FIGURE)[-1].range == f"bytes={kept}-"
    assert (tmp_path / "PMC1" / "fig1.jpg").read_bytes() == IMAGE


def test_a_file_in_the_way_is_one_error(bucket: PmcBucket, tmp_path: Path) -> None:
    (tmp_path / "PMC1").write_text("not a folder")
    done = longclip("longcap", "fetch", tmp_path, "PMC1", "--from", bucket.url)
    assert done.returncode == 3 and f"{tmp_path / 'PMC1'}: File exists" in done.stderr, done
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_one_error(bucket: PmcBucket, tmp_path: Path) -> None:
    (tmp_path / "PMC1").mkdir()
    bucket.add("PMC1", {}, media_urls=["s3://pmc-oa-opendata/PMC1.1/fig1.jpg"])  # no hash: written, not read first
    (tmp_path / "PMC1" / "fig1.jpg.part").symlink_to("/dev/full")
    done = longclip("longcap", "fetch", tmp_path, "PMC1", "--from", bucket.url)
    assert done.returncode == 3 and "no room left" in done.stderr and "the same command continues" in done.stderr, done
