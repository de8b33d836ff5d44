"""Manners toward a server that others use too: a pace, the waits that it asks for, and retries that back off."""

from __future__ import annotations

import email.utils
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

from longclip import __version__
from longclip.errors import SiteError, UserError

try:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.exceptions import HTTPError
except ImportError:
    raise SiteError("talking to servers needs requests", 'pip install "longclip[longcap]"') from None

T = TypeVar("T")
RETRIED = (408, 425, 429, 500, 502, 503, 504)
"""statuses that may pass; every other one of 300 or more is an answer"""
SLOWEST = 1024
"""bytes per second; a body that comes more slowly over a whole timeout has stalled, if not quite"""
CHUNK = 2**16


@dataclass(frozen=True)
class Manners:
    """How a server is treated."""

    rate: float = 10.0
    """requests a second, over all connections"""
    connections: int = 4
    timeout: float = 30.0
    """seconds without a byte, or until the whole header is there, after which an answer is given up"""
    attempts: int = 5
    """how often one thing is asked for, the first time included"""
    backoff: float = 1.0
    """seconds before the second attempt; doubled for each further one, and shortened by up to half, by chance"""
    longest: float = 600.0
    """seconds; a server that asks for a longer wait is left alone"""
    contact: str = ""
    """who runs this, a mail address or a page, for the User-Agent"""
    seed: int = 0
    """of the backoff's chance"""

    def __post_init__(self) -> None:
        if not (self.contact.isascii() and self.contact.isprintable()):
            raise UserError(f"contact {self.contact!r}: valid is a mail address or a URL")
        for name in ("rate", "connections", "timeout", "attempts"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} {getattr(self, name)}: must be above 0")


class Failed(Exception):
    """What could not be had, after all attempts or at once where asking again would not help."""

    def __init__(self, reason: str, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.unreachable = unreachable
        """nothing came from the server at all: what is asked next would fare no better"""


class Again(Failed):
    """What another attempt may bring. ``after``: seconds that the server asked to wait for."""

    def __init__(self, reason: str, unreachable: bool = False, after: float | None = None) -> None:
        super().__init__(reason, unreachable)
        self.after = after


class Stopped(Exception):
    """Somebody has set ``Client.stop``."""


class _InTime:
    """Mixed into a connection: its answer's header has come within the timeout, or TimeoutError is raised.

    The socket's own timeout starts anew with each byte, and a header that trickles would never end.
    """

    sock: Any
    timeout: float

    def getresponse(self) -> Any:
        sock, late = self.sock, threading.Event()

        def give_up() -> None:
            late.set()
            with suppress(OSError):  # closed meanwhile
                # Not TLS's own shutdown, which another thread must not call: the reader sees the stream end.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

        timer = threading.Timer(self.timeout, give_up)
        timer.daemon = True
        timer.start()
        try:
            return super().getresponse()  # type: ignore[misc]
        finally:
            timer.cancel()
            if late.is_set():  # whatever it made of a header that was cut off
                raise TimeoutError


class _Adapter(HTTPAdapter):  # type: ignore[misc]
    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool = super().get_connection_with_tls_context(*args, **kwargs)
        if not issubclass(pool.ConnectionCls, _InTime):
            pool.ConnectionCls = type("Connection", (_InTime, pool.ConnectionCls), {})
        return pool


class Client:
    """Requests to one server, from any number of threads, at one pace."""

    def __init__(self, manners: Manners) -> None:
        self.manners = manners
        self.stop = threading.Event()
        """once set, waiting threads leave with Stopped"""
        self._lock, self._next = threading.Lock(), 0.0
        self._local = threading.local()

    def send(self, method: str, url: str, **kwargs: Any) -> Any:
        """One request, its body not read yet, on this thread's connection. Returns requests' Response.

        Raises Again or Failed by its status; 416, the answer to a range that is not there, is the caller's.
        """
        if not hasattr(self._local, "session"):  # requests promises nothing about sessions shared by threads
            self._local.session = requests.Session()
            for scheme in ("http://", "https://"):
                self._local.session.mount(scheme, _Adapter())
            contact = f" ({self.manners.contact})" if self.manners.contact else ""
            # Bytes as they are stored: that is what hashes and ranges are about.
            agent = {"User-Agent": f"longclip/{__version__}{contact}", "Accept-Encoding": "identity"}
            self._local.session.headers.update(agent)
        response = self._local.session.request(method, url, stream=True, timeout=self.manners.timeout, **kwargs)
        if response.status_code >= 300 and response.status_code != 416:
            response.close()
            # The phrase that came over the wire is the server's to choose, and goes into logs.
            known = response.status_code in HTTPStatus._value2member_map_
            phrase = f" {HTTPStatus(response.status_code).phrase}" if known else ""
            reason = f"{response.status_code}{phrase}"
            if response.status_code not in RETRIED:
                raise Failed(reason)
            after = _seconds(response.headers.get("Retry-After", ""))
            if after is not None and after > self.manners.longest:
                raise Failed(f"{reason}, asks to wait {after:,.0f} s")
            raise Again(reason, after=after)
        return response

    def body(self, response: Any, limit: int, write: Callable[[bytes], Any]) -> int:
        """Hands the body on piece by piece; returns its length in bytes.

        Raises:
            Failed: more than ``limit`` bytes.
            Again: fewer than were announced, or a trickle.
            Stopped: the client was told to stop.
        """
        announced = response.headers.get("Content-Length", "")
        length = int(announced) if announced.isdecimal() else None
        if length is not None and length > limit:
            raise Failed(f"{length:,} bytes, more than {limit:,}")
        got, before, since = 0, 0, time.monotonic()
        # read1, because read would sit out a trickle: each byte that comes starts the socket's timeout anew.
        while data := response.raw.read1(CHUNK, decode_content=False):
            got += len(data)
            if got > limit:
                raise Failed(f"more than {limit:,} bytes")
            write(data)
            if self.stop.is_set():
                raise Stopped
            if time.monotonic() - since > self.manners.timeout:
                if got - before < SLOWEST * self.manners.timeout:
                    raise Again(f"only {got - before:,} bytes in {self.manners.timeout:g} s")
                before, since = got, time.monotonic()
        if length is not None and got != length:
            raise Again(f"ended after {got:,} of {length:,} bytes")
        return got

    def insist(self, what: str, once: Callable[[], T]) -> T:
        """``once()``, and again while it raises Again or the connection fails, with growing pauses.

        A wait that the server asks for holds back all threads: it is the server that is busy, not this one thing.

        Raises:
            Failed: the last attempt failed too, or ``once`` raised it.
            Stopped: the client was told to stop.
        """
        manners = self.manners
        for attempt in range(1, manners.attempts + 1):
            self._pace()
            try:
                return once()
            except Again as error:
                failure = error
            except (requests.RequestException, HTTPError) as error:
                if isinstance(error, ValueError):  # requests' word for a URL or a header that cannot be
                    raise Failed(str(error)) from error
                failure = Again(_why(error, manners.timeout), unreachable=True)
            if attempt == manners.attempts:
                break
            if failure.after is not None:
                with self._lock:
                    self._next = max(self._next, time.monotonic() + failure.after)
            else:
                chance = random.Random(f"{manners.seed}/{what}/{attempt}").uniform(0.5, 1.0)
                self._wait(manners.backoff * 2 ** (attempt - 1) * chance)
        times = f", {manners.attempts} times" if manners.attempts > 1 else ""
        raise Failed(f"{failure.reason}{times}", failure.unreachable)

    def _pace(self) -> None:
        with self._lock:
            now = time.monotonic()
            mine = max(self._next, now)
            self._next = mine + 1 / self.manners.rate
        self._wait(mine - now)

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(max(0.0, seconds)):
            raise Stopped


def _seconds(retry_after: str) -> float | None:
    """Retry-After in seconds, given as such or as a date (RFC 9110, 10.2.3); None where it is neither."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _why(error: BaseException, timeout: float) -> str:
    """What the innermost error says: "Connection refused" rather than a pool and its retries."""
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    if any(isinstance(one, TimeoutError) for one in chain):
        return f"no answer within {timeout:g} s"
    for one in reversed(chain):
        if isinstance(one, OSError) and one.strerror:
            return one.strerror
    return "the connection broke off"
