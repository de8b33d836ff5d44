"""A headless Chromium that a test talks to: the DevTools protocol over a pipe, so nothing but the browser is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOUND = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--window-size=1280,900",
    "--remote-debugging-pipe",
)
PATIENCE = 60.0


class Page:
    """One page; ``events`` has what the browser told since it was opened: (method, parameters)."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._rest, self._last = read, write, b"", 0
        self._session: str | None = None
        self.events: list[tuple[str, dict[str, Any]]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's answer. Raises RuntimeError with the browser's words if it refuses."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            assert time.monotonic() < deadline, "the browser does not answer"
            chunk = os.read(self._read, 1 << 20)
            assert chunk, "the browser has gone"
            self._rest += chunk
        one, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(one)
        if "method" in answer:
            self.events.append((answer["method"], answer["params"]))
        return answer

    def open(self, url: str) -> None:
        """Goes there and waits until it has loaded."""
        known = len(self.events)
        self.send("Page.navigate", url=url)
        while not any(method == "Page.loadEventFired" for method, _ in self.events[known:]):
            self._next()

    def run(self, script: str) -> Any:
        """The value of an expression, promises awaited. Raises RuntimeError if it throws."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"].get("exception", {}).get("description")))
        return answer["result"].get("value")

    def mouse(self, what: str, x: float, y: float, **more: Any) -> None:
        """``mousePressed``, ``mouseMoved`` or ``mouseReleased`` with the left button."""
        self.send("Input.dispatchMouseEvent", type=what, x=x, y=y, button="left", **{"clickCount": 1, **more})

    def errors(self) -> list[str]:
        """What the console shows in red, and what a script threw."""
        found = [e["entry"]["text"] for m, e in self.events if m == "Log.entryAdded" and e["entry"]["level"] == "error"]
        found += [str(e["exceptionDetails"]) for m, e in self.events if m == "Runtime.exceptionThrown"]
        return found + [
            str(e["args"]) for m, e in self.events if m == "Runtime.consoleAPICalled" and e["type"] == "error"
        ]

    def requests(self) -> list[str]:
        return [e["request"]["url"] for m, e in self.events if m == "Network.requestWillBeSent"]


@contextmanager
def browser(profile: Path, *flags: str) -> Iterator[Page]:
    """A page of a new browser, which ends with the block. ``profile`` is an empty folder."""
    assert FOUND is not None
    ours_out, theirs_in = os.pipe()[::-1]
    theirs_out, ours_in = os.pipe()[::-1]
    # Chromium reads commands from descriptor 3 and answers on 4.
    shell = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$0" "$@"'
    command = ["bash", "-c", shell, FOUND, *FLAGS, f"--user-data-dir={profile}", *flags]
    with (profile / "browser.log").open("wb") as log:
        process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stdout=log, stderr=log)
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Page(ours_in, ours_out)
    finally:
        process.terminate()
        process.wait(timeout=30)
        os.close(ours_out)
        os.close(ours_in)
