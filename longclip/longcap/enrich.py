"""Rewrite: long captions put into other words by a language model, and kept as they were where it invents.

Extractive descriptions are sentences of the article laid side by side. A model can make one text of them; any endpoint
that speaks OpenAI's chat completions will do (vLLM, llama.cpp, a service). BIOMEDICA-LongCAP's own model and prompt
were not published (arXiv 2510.03978): the prompt is a file of yours. It is the system message, the extractive
description the user's message.

    DEST/train-000000.tar   the same samples, in the same order; in their json ``long_caption`` is the rewrite,
                            ``long_caption_extractive`` what it was, ``rewrite`` {model, prompt, outcome}
    DEST/rewrites.jsonl     every answer, by the hash of model, prompt and text: none is asked for twice
    DEST/requests           a byte for each request that was sent, answered or not
    DEST/rewrite.json       model, prompt's hash, the source's hash, and at the end the outcomes

A shard is written when each of its texts has an answer or has failed, so a call that stops (budget, Ctrl-C, the server
gone) leaves whole shards and a cache, and the same call goes on. DEST has an index when, and only when, it is complete.
To have what failed tried again, remove its shard: the answers that it had are in the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longclip.data.index import index_folder
from longclip.data.shards import Dataset, Index, Sample, ShardEntry, open_dataset, write_aside, write_shard
from longclip.errors import LongclipError, SiteError, UserError, told_as_no_space
from longclip.longcap.abreast import abreast
from longclip.longcap.guard import invented
from longclip.longcap.polite import Again, Client, Failed, Manners
from longclip.longcap.progress import Tell, progress
from longclip.longcap.store import AGAIN
from longclip.track.lease import Lease

FIELD = "long_caption"
EXTRACTIVE = "long_caption_extractive"
LARGEST_ANSWER = 2**22
"""bytes"""
IN_A_ROW = 10
"""requests that failed one after the other, after which the server is taken to be out of order"""


@dataclass(frozen=True)
class Answer:
    text: str
    """white space collapsed"""
    tokens: int
    """prompt and answer together, as the server counts; 0 where it does not say"""
    cut: bool = False
    """the server ended it before the model did (length, content filter)"""


@dataclass(frozen=True)
class Budget:
    """What all calls for one DEST may use together; None: no bound."""

    requests: int | None = None
    """sent, whether or not an answer came: the endpoint may bill them all"""
    tokens: int | None = None
    """no request is sent once they are used; what is on its way then still comes"""


class OverBudget(Exception):
    pass


class Endpoint:
    """One model behind one URL, with one prompt."""

    def __init__(self, url: str, model: str, prompt: str, manners: Manners, token: str | None = None) -> None:
        """``url`` ends in /v1 (or in /v1/chat/completions). ``token``: bearer; it is never logged."""
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--url {url}: valid is http(s)://HOST[:PORT]/v1")
        # What requests says of a header that it refuses quotes the header.
        if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
            raise UserError("the token is empty, or has characters that no token has")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.prompt, self.client, self._token = model, prompt, Client(manners), token
        self.requests = 0
        self._lock = threading.Lock()

    def key(self, text: str) -> str:
        """sha256 (hex) of what decides the answer."""
        return hashlib.sha256(json.dumps([self.model, self.prompt, text]).encode()).hexdigest()

    def ask(self, text: str, most: int | None = None, sent: Callable[[], object] = lambda: None) -> Answer:
        """``text`` rewritten. ``most``: requests after which no more is sent, retries included. ``sent``: called
        before each, one at a time.

        Raises Failed, OverBudget.
        """
        question = {
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "system", "content": self.prompt}, {"role": "user", "content": text}],
        }

        def once() -> Answer:
            with self._lock:
                if most is not None and self.requests >= most:
                    raise OverBudget
                sent()
                self.requests += 1
            # auth, not headers: requests would let a ~/.netrc entry of that host replace a header.
            send = self.client.send("POST", self.url, json=question, auth=self._sign, allow_redirects=False)
            with send as response:
                body = bytearray()
                self.client.body(response, LARGEST_ANSWER, body.extend)
            return _answer(body)

        return self.client.insist(self.key(text), once)

    def _sign(self, request: Any) -> Any:
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _answer(body: bytes | bytearray) -> Answer:
    """Reads a chat completion (https://platform.openai.com/docs/api-reference/chat/object). Raises Again."""
    try:
        answer = json.loads(body)
        choice = answer["choices"][0]
        usage = answer.get("usage") or {}
        text = " ".join((choice["message"]["content"] or "").split())
        tokens = int(usage.get("total_tokens") or 0)
        text.encode()  # lone surrogates are JSON, but no text
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise Again("the answer is no chat completion") from error
    cut = choice.get("finish_reason") not in ("stop", None)
    if not text and not cut:
        raise Again("the answer is empty")
    return Answer(text, max(0, tokens), cut)


class Cache:
    """Answers by key, in a file that only grows. A last line torn by a kill is cut off. About 150 bytes of memory each.

    Raises SiteError where the file holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._places, self._lock = path, dict[bytes, int](), threading.Lock()
        self.tokens = 0
        """of all answers in it"""
        end = 0
        with open(path, "a+b") as file:
            file.seek(0)
            for line in file:
                if line.endswith(b"\n"):
                    try:
                        record = json.loads(line)
                        self._places[bytes.fromhex(record["key"])] = end
                        self.tokens += record["tokens"]
                    except (ValueError, KeyError, TypeError) as error:
                        raise SiteError(f"{path}: no answer at byte {end:,}", "move the file away") from error
                    end += len(line)
            file.truncate(end)
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115  (open for as long as the cache is)
        self._end = end

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> Answer | None:
        if (place := self._places.get(bytes.fromhex(key))) is None:
            return None
        with open(self._path, "rb") as file:
            file.seek(place)
            record = json.loads(file.readline())
        return Answer(record["text"], record["tokens"], record["cut"])

    def put(self, key: str, answer: Answer) -> None:
        record = {"key": key, "text": answer.text, "tokens": answer.tokens, "cut": answer.cut}
        line = json.dumps(record).encode() + b"\n"
        with self._lock, told_as_no_space(self._path, AGAIN):
            self._file.seek(self._end)
            done = 0
            while done < len(line):  # a full disk may take a part of it, and only then say so
                done += self._file.write(line[done:])
            self._places[bytes.fromhex(key)] = self._end
            self._end += len(line)
            self.tokens += answer.tokens

    def close(self) -> None:
        self._file.close()


class Sent:
    """How many requests all calls have sent, in a file of a byte each: a kill loses none."""

    def __init__(self, path: Path, answers: int) -> None:
        """``answers``: what a folder from before there was such a file has; each took at least one request."""
        self._path, self._file = path, open(path, "ab", buffering=0)  # noqa: SIM115  (open for as long as this is)
        self.total = self._file.tell()
        self.add(max(0, answers - self.total))

    def add(self, requests: int = 1) -> None:
        with told_as_no_space(self._path, AGAIN):
            self._file.write(b"." * requests)
        self.total += requests

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Rewritten:
    samples: int
    outcomes: dict[str, int]
    """outcome -> samples, most frequent first: "rewritten", or why a sample kept its extractive description"""
    invented: dict[str, int]
    """the most frequent of what the guard found, over this call"""
    requests: int
    """sent by this call"""
    tokens: int
    """of all calls for this folder"""
    unreadable: int
    """samples that the source's index lists as such: they are not in ``dest``"""


def rewrite(source: str | Path, dest: Path, endpoint: Endpoint, budget: Budget, connections: int = 4) -> Rewritten:
    """Rewrites the long captions of indexed shards into ``dest``; called again, it goes on.

    A rewrite that the guard rejects, and one that cannot be had, leaves the sample its extractive description; both are
    counted and stand in the sample's json.

    One process at a time works on a ``dest``; another one waits for it, or is told.

    Raises:
        UserError: no such shards, none with a long caption, or ``dest`` was begun with another model, prompt or source.
        LongclipError: the budget is used up, or it was interrupted.
        SiteError: the server fails every request, or another process is at it; NoSpace.
    """
    dataset = open_dataset(source)
    if dest.resolve() in (dataset.root.resolve(), dataset.folder.resolve()):
        raise UserError(f"{dest} holds the source", "give another folder")
    dest.mkdir(parents=True, exist_ok=True)
    with Lease(dest / ".rewrite.lock") as lease:
        return _rewrite(dataset, dest, endpoint, budget, connections, lease)


def _rewrite(
    dataset: Dataset, dest: Path, endpoint: Endpoint, budget: Budget, connections: int, lease: Lease
) -> Rewritten:
    prompt = hashlib.sha256(endpoint.prompt.encode()).hexdigest()
    _claim(dest / "rewrite.json", {"model": endpoint.model, "prompt_sha256": prompt, "source_hash": dataset.hash})
    cache = Cache(dest / "rewrites.jsonl")
    sent = Sent(dest / "requests", len(cache))
    work = _Work(dataset, endpoint, budget, cache, sent, prompt, lease)
    left = [s for s in range(len(dataset.names)) if dataset.sizes[s] and not (dest / dataset.names[s]).exists()]
    try:
        with progress("samples", sum(dataset.sizes[s] for s in left)) as tell:
            for shard in left:
                work.ask_all(shard, connections, tell)
                with told_as_no_space(dest, AGAIN):
                    write_shard(dest / dataset.names[shard], work.samples(shard))
    except KeyboardInterrupt:
        raise LongclipError("stopped: interrupted", "the same command continues") from None
    finally:
        endpoint.client.stop.set()
        cache.close()
        sent.close()
    index_folder(dest)
    outcomes = _outcomes(open_dataset(dest))
    result = Rewritten(
        sum(outcomes.values()),
        dict(outcomes.most_common()),
        dict(work.invented.most_common(20)),
        endpoint.requests,
        cache.tokens,
        sum(len(e.skipped) for e in _index(dataset) if e.name in dataset.names),
    )
    _write(dest / "rewrite.json", {**json.loads((dest / "rewrite.json").read_bytes()), "outcomes": result.outcomes})
    return result


class _Work:
    """The state of one call."""

    def __init__(
        self, dataset: Dataset, endpoint: Endpoint, budget: Budget, cache: Cache, sent: Sent, prompt: str, lease: Lease
    ) -> None:
        self.dataset, self.endpoint, self.budget, self.cache, self.prompt = dataset, endpoint, budget, cache, prompt
        self.lease, self.renewed = lease, time.monotonic()
        self.sent = sent
        self.most = None if budget.requests is None else budget.requests - sent.total
        self.failed: dict[str, str] = {}
        self.invented: Counter[str] = Counter()
        self.in_a_row = 0
        self.done = 0

    def ask_all(self, shard: int, connections: int, tell: Tell) -> None:
        """Sees to it that every text of a shard is in the cache or has failed."""
        self.failed.clear()
        stop: list[LongclipError] = []
        # Once it has to stop nothing more is asked, but what is on its way has been paid for.
        for _, answer in abreast(self._texts(shard), self._one, connections, lambda: 0 if stop else 2**63):
            if isinstance(answer, OverBudget):
                used = f"{len(self.cache):,} answers, {self.cache.tokens:,} tokens, {self.sent.total:,} requests"
                again = "with a larger one the same command continues; what was answered is kept"
                stop.append(LongclipError(f"the budget is used up: {used} now", again))
            elif isinstance(answer, BaseException):
                raise answer
            elif self.in_a_row >= IN_A_ROW:
                reason = next(reversed(self.failed.values()))
                stop.append(SiteError(f"{self.endpoint.url}: {reason}", "the same command continues where it stopped"))
            self._still_here()
            self.done += 1
            tell(self.done, f"{self.cache.tokens:,} tokens")
        if stop:
            raise stop[-1]

    def _still_here(self) -> None:
        if time.monotonic() - self.renewed > 60:
            self.renewed = time.monotonic()
            self.lease.renew()

    def _texts(self, shard: int) -> Iterator[str]:
        texts = 0
        for index in range(self.dataset.sizes[shard]):
            if text := _long_caption(self.dataset.fields_and_text(shard, index)[2]):
                texts += 1
                yield text
        if not texts:
            raise UserError(f"no sample of {self.dataset.names[shard]} has a {FIELD}", "longclip longcap build")

    def _one(self, text: str) -> None:
        key = self.endpoint.key(text)
        if self.cache.get(key) is not None:
            return
        if self.budget.tokens is not None and self.cache.tokens >= self.budget.tokens:
            raise OverBudget
        try:
            answer = self.endpoint.ask(text, self.most, self.sent.add)
        except Failed as error:
            self.failed[key] = error.reason
            self.in_a_row += 1
            return
        if self.budget.tokens is not None and not answer.tokens:
            raise UserError("the server does not say how many tokens it used", "--max-requests bounds it too")
        self.in_a_row = 0
        self.cache.put(key, answer)

    def samples(self, shard: int) -> Iterator[Sample]:
        for index in range(self.dataset.sizes[shard]):
            self._still_here()
            sample = self.dataset.read(shard, index)
            text = _long_caption(sample.fields)
            words, outcome = self._judge(text) if text else (text, f"no {FIELD}")
            fields = {**sample.fields, "rewrite": {"model": self.endpoint.model, "prompt": self.prompt[:16]}}
            fields["rewrite"]["outcome"] = outcome
            if text:
                fields |= {FIELD: words, EXTRACTIVE: text}
            yield Sample(sample.key, sample.image, sample.text, fields)

    def _judge(self, text: str) -> tuple[str, str]:
        """What the sample's description is to be, and what that came from."""
        key = self.endpoint.key(text)
        if (answer := self.cache.get(key)) is None:
            return text, f"failed: {self.failed[key]}"
        if answer.cut:
            return text, "the answer was cut off"
        if found := invented(answer.text, text):
            self.invented.update(found)
            return text, "the answer has what its source has not"
        return answer.text, "rewritten"


def _long_caption(fields: dict[str, Any]) -> str:
    text = fields.get(FIELD)
    return text if isinstance(text, str) and text.strip() else ""


def _claim(path: Path, asked: dict[str, str]) -> None:
    """DEST belongs to one model, prompt and source: rewrites of several are never mixed."""
    try:
        begun = json.loads(path.read_bytes())
    except FileNotFoundError:
        if any(path.parent.glob("*.tar")):
            raise UserError(f"{path.parent} holds other shards", "give another folder") from None
        _write(path, asked)
        return
    except (OSError, ValueError) as error:
        raise SiteError(f"cannot read {path}: {error}") from error
    for name, value in asked.items():
        if begun.get(name) != value:
            raise UserError(
                f"{path.parent} was begun with another {name}: {begun.get(name)}, not {value}", "give another folder"
            )


def _write(path: Path, record: dict[str, Any]) -> None:
    with write_aside(path) as file:
        file.write(json.dumps(record, indent=1).encode() + b"\n")


def _index(dataset: Dataset) -> tuple[ShardEntry, ...]:
    return Index.model_validate_json((dataset.folder / "index.json").read_bytes()).shards


def _outcomes(dataset: Dataset) -> Counter[str]:
    return Counter(
        dataset.fields_and_text(shard, index)[2]["rewrite"]["outcome"]
        for shard in range(len(dataset.names))
        for index in range(dataset.sizes[shard])
    )


def token_from(variable: str) -> str:
    """The token in an environment variable. Raises UserError."""
    if not (token := os.environ.get(variable, "").strip()):
        raise UserError(f"${variable} is not set", f"export {variable}=...: the token's place is not the command line")
    return token
