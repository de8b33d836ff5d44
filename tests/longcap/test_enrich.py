"""Rewriting against an endpoint that speaks the protocol, misbehaves, and invents."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from longclip.data.index import index_folder
from longclip.data.shards import Sample, open_dataset, write_shard
from longclip.errors import LongclipError, SiteError, UserError
from longclip.longcap.enrich import Budget, Endpoint, Rewritten, rewrite
from longclip.longcap.polite import Manners

FAST = Manners(rate=1000, timeout=1.0, attempts=3, backoff=0.02)
UNBOUND = Budget()
PROMPT = "Write one paragraph."
TOKEN = "sk-very-secret-1234567890"


@dataclass
class Chat:
    """A server of chat completions. ``faults`` are spent one a request, in their order."""

    answer: Callable[[str], str] = lambda text: f"Shown here: {text}"
    faults: list[Any] = field(default_factory=list)
    always: Any = None
    usage: bool = True
    pause: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    agents: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    url: str = ""
    released: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    chat: Chat

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        chat = self.chat
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with chat.lock:
            chat.asked.append({"path": self.path, "token": self.headers.get("Authorization"), **question})
            fault = chat.faults.pop(0) if chat.faults else chat.always
            chat.at_once += 1
            chat.most_at_once = max(chat.most_at_once, chat.at_once)
        time.sleep(chat.pause)
        if fault == "silence":
            chat.released.wait()
        with chat.lock:
            chat.at_once -= 1
        text = question["messages"][-1]["content"]
        message = {"role": "assistant", "content": chat.answer(text)}
        body: Any = {"choices": [{"message": message, "finish_reason": "stop"}]}
        if chat.usage:
            body["usage"] = {"total_tokens": 100}
        if fault in ("length", "content_filter"):
            body["choices"][0]["finish_reason"] = fault
        if isinstance(fault, dict):
            body = fault
        status, headers = fault if isinstance(fault, tuple) else (200, {})
        data = fault if isinstance(fault, bytes) else json.dumps(body).encode()
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            if fault == "chunked":  # no length: how servers answer that write while they think
                headers = {"Transfer-Encoding": "chunked"}
                data = b"".join(b"1\r\n%c\r\n" % byte for byte in data) + b"0\r\n\r\n"
            else:
                headers = {"Content-Length": str(len(data)), **headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if fault == "cut":
                data, self.close_connection = data[:10], True
            self.wfile.write(data)


@pytest.fixture
def chat() -> Iterator[Chat]:
    made = Chat()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"chat": made}))
    server.daemon_threads = True
    made.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield made
    finally:
        made.released.set()
        server.shutdown()
        server.server_close()


def long_caption(number: int) -> str:
    return f"Lung section {number}. Cells were stained with eosin for {number} min."


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of four samples with long captions."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "JPEG")
    for shard in range(3):
        samples = [
            Sample(
                f"s{n}", buffer.getvalue(), f"Lung section {n}.", {"long_caption": long_caption(n), "doi": f"10.1/{n}"}
            )
            for n in range(4 * shard, 4 * shard + 4)
        ]
        write_shard(tmp_path / "src" / f"train-{shard:06d}.tar", samples)
    index_folder(tmp_path / "src")
    return tmp_path / "src"


def run(
    chat: Chat, shards: Path, dest: Path, budget: Budget = UNBOUND, manners: Manners = FAST, **more: Any
) -> Rewritten:
    endpoint = Endpoint(
        chat.url, more.pop("model", "tiny"), more.pop("prompt", PROMPT), manners, more.pop("token", None)
    )
    return rewrite(shards, dest, endpoint, budget, **more)


def samples(folder: Path) -> dict[str, Sample]:
    dataset = open_dataset(folder)
    read = (dataset.read(s, i) for s in range(len(dataset.names)) for i in range(dataset.sizes[s]))
    return {sample.key: sample for sample in read}


def test_every_sample_is_rewritten_and_keeps_what_it_had(chat: Chat, shards: Path, tmp_path: Path) -> None:
    done = run(chat, shards, tmp_path / "out", token=TOKEN)
    assert (done.samples, done.outcomes, done.requests, done.tokens) == (12, {"rewritten": 12}, 12, 1200)
    before, after = samples(shards), samples(tmp_path / "out")
    assert list(before) == list(after)
    for key, sample in after.items():
        assert sample.image == before[key].image and sample.text == before[key].text
        assert sample.fields["long_caption"] == f"Shown here: {before[key].fields['long_caption']}"
        assert sample.fields["long_caption_extractive"] == before[key].fields["long_caption"]
        assert sample.fields["doi"] == before[key].fields["doi"]
        assert sample.fields["rewrite"]["model"] == "tiny" and sample.fields["rewrite"]["outcome"] == "rewritten"
    question = chat.asked[0]
    assert question["path"] == "/v1/chat/completions" and question["token"] == f"Bearer {TOKEN}"
    assert [m["role"] for m in question["messages"]] == ["system", "user"]
    assert question["messages"][0]["content"] == PROMPT and question["model"] == "tiny"


@pytest.mark.parametrize(
    "fault",
    [
        (429, {"Retry-After": "0"}),
        (500, {}),
        b"<html>garbage</html>",
        b"",
        b"[" * 100_000,
        {"choices": []},
        {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]},
        {"choices": [{"message": {"content": "\ud800"}}]},
        {"choices": [{"message": {"content": "x"}}], "usage": {"total_tokens": float("inf")}},
        {"error": {"message": "overloaded"}},
        "silence",
        "cut",
    ],
    ids=lambda fault: repr(fault)[:40],
)
def test_what_passes_is_outlasted(chat: Chat, shards: Path, tmp_path: Path, fault: Any) -> None:
    chat.faults = [fault, fault]
    done = run(chat, shards, tmp_path / "out", connections=1)
    assert done.outcomes == {"rewritten": 12} and done.requests == 14


def test_an_answer_in_chunks_is_one(chat: Chat, shards: Path, tmp_path: Path) -> None:
    chat.always = "chunked"
    done = run(chat, shards, tmp_path / "out")
    assert done.outcomes == {"rewritten": 12} and done.requests == 12


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        ((400, {}), "failed: 400 Bad Request"),
        ((302, {"Location": "http://127.0.0.1:9/"}), "failed: 302 Found"),
        ("length", "the answer was cut off"),
        ("content_filter", "the answer was cut off"),
    ],
    ids=repr,
)
def test_what_cannot_be_had_stays_extractive_and_is_counted(
    chat: Chat, shards: Path, tmp_path: Path, fault: Any, outcome: str
) -> None:
    chat.faults = [fault]
    done = run(chat, shards, tmp_path / "out", connections=1)
    assert done.outcomes == {"rewritten": 11, outcome: 1}
    kept = samples(tmp_path / "out")["s0"].fields
    assert kept["long_caption"] == kept["long_caption_extractive"] == long_caption(0)
    assert kept["rewrite"]["outcome"] == outcome


@pytest.mark.parametrize(
    "invention", ["It was 7 mg.", "The patient had Crohn disease.", "Staining: CD31.", "Three cells were seen."]
)
def test_invented_facts_are_not_taken(chat: Chat, shards: Path, tmp_path: Path, invention: str) -> None:
    chat.answer = lambda text: f"{text} {invention}" if "section 5" in text else text
    done = run(chat, shards, tmp_path / "out")
    assert done.outcomes == {"rewritten": 11, "the answer has what its source has not": 1} and done.invented
    assert samples(tmp_path / "out")["s5"].fields["long_caption"] == long_caption(5)


def test_a_server_out_of_order_stops_it_and_the_same_call_goes_on(chat: Chat, shards: Path, tmp_path: Path) -> None:
    chat.always = (503, {})
    with pytest.raises(SiteError, match="503 Service Unavailable, 3 times"):
        run(chat, shards, tmp_path / "out", connections=1)
    assert len(chat.asked) < 12 * 3 and not (tmp_path / "out" / "index.json").exists()
    chat.always = None
    assert run(chat, shards, tmp_path / "out").outcomes["rewritten"] > 0


@pytest.mark.parametrize("budget", [Budget(requests=7), Budget(tokens=700)])
def test_the_budget_holds_over_calls(chat: Chat, shards: Path, tmp_path: Path, budget: Budget) -> None:
    for _ in range(2):
        with pytest.raises(LongclipError, match="budget is used up: 7 answers, 700 tokens"):
            run(chat, shards, tmp_path / "out", budget, connections=1)
        assert len(chat.asked) == 7
    assert [p.name for p in (tmp_path / "out").glob("*.tar")] == ["train-000000.tar"]
    done = run(chat, shards, tmp_path / "out")
    assert done.outcomes == {"rewritten": 12} and len(chat.asked) == 12  # none asked twice


def test_retries_are_requests_too(chat: Chat, shards: Path, tmp_path: Path) -> None:
    chat.faults = [(500, {})] * 2
    with pytest.raises(LongclipError, match="4 answers, 400 tokens, 6 requests now"):
        run(chat, shards, tmp_path / "out", Budget(requests=6), connections=1)


@pytest.mark.parametrize("fault", [(500, {}), "silence", "cut"], ids=str)
def test_requests_without_an_answer_count_in_later_calls_too(
    chat: Chat, shards: Path, tmp_path: Path, fault: Any
) -> None:
    """The endpoint may bill them."""
    chat.always = fault
    for _ in range(2):
        with pytest.raises(LongclipError, match="0 answers, 0 tokens, 5 requests"):
            run(chat, shards, tmp_path / "out", Budget(requests=5), connections=1)
        assert len(chat.asked) == 5
    chat.always = None
    with pytest.raises(LongclipError, match="2 answers, 200 tokens, 7 requests"):
        run(chat, shards, tmp_path / "out", Budget(requests=7), connections=1)
    assert len(chat.asked) == 7
    assert run(chat, shards, tmp_path / "out").requests == 10  # of this call
    assert run(chat, shards, tmp_path / "out", Budget(requests=1)).requests == 0


def test_a_folder_of_before_counts_its_answers(chat: Chat, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(LongclipError, match="7 answers"):
        run(chat, shards, tmp_path / "out", Budget(requests=7), connections=1)
    (tmp_path / "out" / "requests").unlink()
    with pytest.raises(LongclipError, match="8 answers, 800 tokens, 8 requests"):
        run(chat, shards, tmp_path / "out", Budget(requests=8), connections=1)


def test_a_token_budget_needs_a_server_that_counts(chat: Chat, shards: Path, tmp_path: Path) -> None:
    chat.usage = False
    with pytest.raises(UserError, match="does not say how many tokens"):
        run(chat, shards, tmp_path / "out", Budget(tokens=10**6))
    assert run(chat, shards, tmp_path / "out").outcomes == {"rewritten": 12}


def test_concurrency_is_bounded_and_changes_no_byte(chat: Chat, shards: Path, tmp_path: Path) -> None:
    chat.pause = 0.03
    for connections in (1, 3):
        chat.most_at_once = 0
        run(chat, shards, tmp_path / str(connections), connections=connections, manners=Manners(rate=1000))
        assert chat.most_at_once == connections
    for path in (tmp_path / "1").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "3" / path.name).read_bytes()


def test_another_model_prompt_or_source_is_not_mixed_in(chat: Chat, shards: Path, tmp_path: Path) -> None:
    run(chat, shards, tmp_path / "out")
    with pytest.raises(UserError, match="another model: tiny, not large"):
        run(chat, shards, tmp_path / "out", model="large")
    with pytest.raises(UserError, match="another prompt_sha256"):
        run(chat, shards, tmp_path / "out", prompt="Write two.")
    with pytest.raises(UserError, match="holds the source"):
        run(chat, shards, shards)
    with pytest.raises(UserError, match="holds other shards"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "x.tar").touch()
        run(chat, shards, tmp_path / "other")
    assert len(chat.asked) == 12


def test_samples_without_a_long_caption_are_kept_and_counted(chat: Chat, shards: Path, tmp_path: Path) -> None:
    one = samples(shards)["s1"]
    write_shard(shards / "train-000000.tar", [one, Sample("bare", one.image, "short", {"doi": "10.1/b"})])
    index_folder(shards)
    assert run(chat, shards, tmp_path / "out").outcomes == {"rewritten": 9, "no long_caption": 1}
    assert "long_caption" not in samples(tmp_path / "out")["bare"].fields
    for path in shards.glob("*.tar"):
        write_shard(path, [Sample("bare" + path.stem, one.image, "short", {})])
    index_folder(shards)
    with pytest.raises(UserError, match=r"no sample of train-000000\.tar has a long_caption"):
        run(chat, shards, tmp_path / "none")


def command(chat: Chat, shards: Path, dest: Path, *more: str) -> list[str]:
    (dest.parent / "prompt.txt").write_text(PROMPT)
    words = ["rewrite", shards, dest, "--url", chat.url, "--model", "tiny", "--prompt", dest.parent / "prompt.txt"]
    return [sys.executable, "-m", "longclip.cli", "longcap", *map(str, words), *more]


def test_killed_anywhere_it_ends_as_if_it_had_not_been(chat: Chat, shards: Path, tmp_path: Path) -> None:
    run(chat, shards, tmp_path / "whole")
    chat.asked.clear()
    chat.pause = 0.05
    for how in (signal.SIGKILL, signal.SIGINT):
        words = command(chat, shards, tmp_path / "out", "--connections", "1")
        running = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        seen, deadline = len(chat.asked), time.monotonic() + 300
        while len(chat.asked) < seen + 5:
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.005)
        running.send_signal(how)
        _, stderr = running.communicate(timeout=60)
        assert how == signal.SIGKILL or (running.returncode == 1 and "stopped: interrupted" in stderr), stderr
    with open(tmp_path / "out" / "rewrites.jsonl", "ab") as file:
        file.write(b'{"key": "torn')
    assert run(chat, shards, tmp_path / "out").outcomes == {"rewritten": 12}
    for path in (tmp_path / "whole").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert len(chat.asked) <= 12 + 2  # what was on its way at each kill


def test_the_token_is_in_no_file_and_in_no_word(chat: Chat, shards: Path, tmp_path: Path) -> None:
    env = {**os.environ, "MY_TOKEN": TOKEN}
    chat.answer = lambda text: f"{text} And 99 rats."
    words = command(chat, shards, tmp_path / "out", "--token-env", "MY_TOKEN")
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "rewrote 0 of 12" in done.stdout, done
    assert "! kept 12 as they were: the answer has what its source has not" in done.stdout
    assert "most often invented: '99' 12" in done.stdout
    assert chat.asked[0]["token"] == f"Bearer {TOKEN}"
    chat.always = (401, {})
    words[words.index("tiny")] = "other"
    words[words.index(str(tmp_path / "out"))] = str(tmp_path / "refused")
    refused = subprocess.run([*words[:3], "--debug", *words[3:]], env=env, capture_output=True, text=True, timeout=300)
    assert refused.returncode != 0 and "401 Unauthorized" in refused.stderr
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert TOKEN not in done.stdout + done.stderr + refused.stdout + refused.stderr and TOKEN.encode() not in written
    broken = subprocess.run(words, env={**env, "MY_TOKEN": f"{TOKEN}\nx"}, capture_output=True, text=True, timeout=300)
    assert broken.returncode == 2 and TOKEN not in broken.stderr
    del env["MY_TOKEN"]
    unset = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert unset.returncode == 2 and "$MY_TOKEN is not set" in unset.stderr


def test_the_tars_stay_plain_webdataset(chat: Chat, shards: Path, tmp_path: Path) -> None:
    run(chat, shards, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "train-000001.tar") as tar:
        assert tar.getnames() == [f"s{n}.{e}" for n in range(4, 8) for e in ("jpg", "json", "txt")]
