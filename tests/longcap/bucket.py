"""A server for the tests that answers as the PMC bucket does, until it is told to misbehave."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

INVENTORY = "inventory-reports/pmc-oa-opendata/metadata/"


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Request:
    key: str
    range: str
    agent: str
    time: float


@dataclass
class PmcBucket:
    """Objects by key; ``faults[key]`` are spent one a request, the last one for ever if it is a list ending in ..."""

    objects: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    requests: list[Request] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """bytes of bodies by key"""
    lists: bool = True
    etags: bool = True
    url: str = ""
    released: threading.Event = field(default_factory=threading.Event)

    def add(
        self, pmcid: str, files: dict[str, bytes], version: int = 1, license: str | None = "CC BY", **more: Any
    ) -> None:
        """An article version: ``files`` beside its XML, which is made here."""
        name = f"{pmcid}.{version}"
        all_files = {f"{name}.xml": f"<article><!-- {name} --></article>".encode(), **files}
        for file, data in all_files.items():
            self.objects[f"{name}/{file}"] = data
        urls = {f: f"s3://pmc-oa-opendata/{name}/{f}?md5={md5(d)}" for f, d in all_files.items()}
        metadata = {
            "pmcid": pmcid,
            "version": version,
            "license_code": license,
            "doi": f"10.1/{name}",
            "is_retracted": False,
            "xml_url": urls.pop(f"{name}.xml"),
            "media_urls": list(urls.values()),
            **more,
        }
        self.objects[f"{name}/{name}.json"] = json.dumps(metadata).encode()
        self.objects[f"metadata/{name}.json"] = json.dumps(metadata).encode()

    def add_inventory(self, day: str = "2026-01-18T01-00Z") -> None:
        rows = "".join(
            f'"pmc-oa-opendata","{key}","2026-01-08T11:47:59.000Z","{md5(data)}"\n'
            for key, data in self.objects.items()
            if key.startswith("metadata/")
        )
        data = gzip.compress(rows.encode())
        self.objects[f"{INVENTORY}data/one.csv.gz"] = data
        files = [{"key": f"{INVENTORY}data/one.csv.gz", "size": len(data), "MD5checksum": md5(data)}]
        self.objects[f"{INVENTORY}{day}/manifest.json"] = json.dumps({"fileFormat": "CSV", "files": files}).encode()

    def write(self, folder: Path) -> None:
        """The bucket as a folder, as ``aws s3 sync`` would leave it."""
        for key, data in self.objects.items():
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(data)

    def asked(self, key: str) -> list[Request]:
        return [r for r in self.requests if r.key == key]

    def fault(self, key: str) -> Any:
        waiting = self.faults[key]
        if not waiting:
            return None
        return waiting[0] if len(waiting) == 2 and waiting[1] is ... else waiting.pop(0)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: PmcBucket

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        with contextlib.suppress(ConnectionError):
            self._get()

    def _get(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        key = f"?{query['prefix'][0]}" if "prefix" in query else unquote(url.path[1:])
        asked = self.headers.get("Range", "")
        self.bucket.requests.append(Request(key, asked, self.headers.get("User-Agent", ""), time.monotonic()))
        fault = self.bucket.fault(key)
        if fault == "silence":
            self.bucket.released.wait()
            self.close_connection = True
            return
        if fault == "trickling header":
            for byte in b"HTTP/1.1 200 OK\r\n" + b"X-More: 1\r\n" * 10**6:
                self.wfile.write(bytes([byte]))
                if self.bucket.released.wait(0.05):
                    break
            self.close_connection = True
            return
        if isinstance(fault, tuple):  # status, headers
            self._answer(fault[0], b"the server's own words", fault[1])
            return
        if "prefix" in query:
            self._answer(200, self._listing(query["prefix"][0]) if self.bucket.lists else b"<html>hello</html>", {})
            return
        data = self.bucket.objects.get(key)
        if data is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>", {})
            return
        headers = {"ETag": f'"{md5(data)}"'} if self.bucket.etags else {}
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if fault == "no ranges":
            start = 0
        if start >= len(data) and asked and start:
            self._answer(416, b"", {})
            return
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if fault == "garbage":
            body = bytes(b ^ 0xFF for b in body)
        self._answer(206 if start else 200, body, headers, fault, key)

    def _listing(self, prefix: str) -> bytes:
        under = {
            k[: k.index("/", len(prefix)) + 1]
            for k in self.bucket.objects
            if k.startswith(prefix) and "/" in k[len(prefix) :]
        }
        found = "".join(f"<CommonPrefixes><Prefix>{p}</Prefix></CommonPrefixes>" for p in sorted(under))
        return (
            f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Prefix>{prefix}</Prefix><IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
        ).encode()

    def _answer(self, status: int, body: bytes, headers: dict[str, str], fault: Any = None, key: str = "") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        announced = len(body) * 2 if fault == "wrong length" else len(body)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        if fault in ("cut", "wrong length", "stall", "trickle"):
            self.close_connection = True
            body, rest = (body, b"") if fault == "wrong length" else (body[: len(body) // 2], body[len(body) // 2 :])
        self.bucket.sent[key] += len(body)  # before: the reader may be done before this thread goes on
        self.wfile.write(body)
        self.wfile.flush()
        if fault == "stall":
            self.bucket.released.wait()
        if fault == "trickle":
            for i in range(len(rest)):
                self.wfile.write(rest[i : i + 1])
                self.wfile.flush()
                if self.bucket.released.wait(0.05):
                    return


@contextlib.contextmanager
def serve(bucket: PmcBucket) -> Iterator[PmcBucket]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"bucket": bucket}))
    server.daemon_threads = True
    bucket.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        bucket.released.set()
        server.shutdown()
        server.server_close()
