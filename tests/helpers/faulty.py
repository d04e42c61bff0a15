"""A web server that delays, counts and fails on purpose: in front of an S3 server, or serving files by itself.

    with Faulty(files={"/a.svs": path}) as web: open_slide(f"{web.url}/a.svs")
    with Faulty(upstream="http://127.0.0.1:9004", delay=0.02, share=0.1, kinds=("503", "reset")) as web: ...

As an S3 server, ``AWS_ENDPOINT_URL`` names this one: the Host header that the client signed is passed on, so signatures
hold. As a process of its own (``python tests/helpers/faulty.py --upstream URL --delay 20``) it prints its address, and
is asked and told at ``/faulty?share=0.1&kinds=503,reset&delay=20`` (answers what it has counted).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qsl, unquote, urlsplit

KINDS = ("503", "reset", "truncated", "stall")
_BUFFER = 256 << 10


class _GoneError(Exception):
    """The connection ended, or is to end."""


@dataclass
class Faulty:
    """The server; its fields may be changed while it runs. ``delay``, ``stall``: seconds.

    ``share`` of the requests by one of ``methods`` fails. What is "truncated" has been done, but for a GET is only half
    answered, and else not at all.
    """

    upstream: str | None = None
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    delay: float = 0.0
    share: float = 0.0
    kinds: tuple[str, ...] = KINDS
    methods: tuple[str, ...] = ("GET",)
    stall: float = 30.0
    seed: int = 0
    tag: str | None = None  # replaces the ETag of served files
    requests: int = 0
    bytes_sent: int = 0
    faults: int = 0
    log: list[str] = field(default_factory=list)  # "GET /path bytes=0-9", when ``keep_log``
    keep_log: bool = False
    port: int = 0

    def __enter__(self) -> Faulty:
        self._random, self._lock, self._stopped = random.Random(self.seed), threading.Lock(), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def reset(self) -> None:
        """Count from zero."""
        with self._lock:
            self.requests = self.bytes_sent = self.faults = 0
            self.log.clear()

    def counted(self) -> dict[str, int]:
        """Return requests, bytes_sent (of bodies) and faults so far."""
        return {"requests": self.requests, "bytes_sent": self.bytes_sent, "faults": self.faults}

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        line = _Line(client)
        onward: _Line | None = None
        try:
            while not self._stopped.is_set():
                head = line.head()
                if head.path.startswith("/faulty"):
                    self._told(client, head)
                    continue
                fault = self._next(head)
                if self.delay:
                    time.sleep(self.delay)
                if fault == "stall":
                    self._stopped.wait(self.stall)
                elif fault == "503":
                    _refuse(client, "503 Slow Down")
                    line.discard(head.length)
                    continue
                elif fault == "reset":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                cut = fault == "truncated"
                if self.upstream is None:
                    self._file(client, head, cut=cut)
                else:
                    onward = onward or _Line(_connected(self.upstream))
                    self._forward(line, onward, head, cut=cut)
        except (_GoneError, OSError):
            pass  # either side may leave at any time: that is what this server is for
        finally:
            client.close()
            if onward is not None:
                onward.socket.close()

    def _next(self, head: _Head) -> str | None:
        """Count a request, and say how it fails, if it does."""
        with self._lock:
            self.requests += 1
            if self.keep_log:
                self.log.append(f"{head.method} {head.path} {head.headers.get('range', '')}".strip())
            if head.method not in self.methods or self._random.random() >= self.share:
                return None
            self.faults += 1
            return self._random.choice(self.kinds)

    def _sent(self, size: int) -> None:
        with self._lock:
            self.bytes_sent += size

    def _forward(self, line: _Line, onward: _Line, head: _Head, *, cut: bool) -> None:
        onward.socket.sendall(head.raw)
        line.pump(onward.socket, head.length)
        answer = onward.head(answer_to=head.method)
        line.socket.sendall(answer.raw)
        if cut:
            onward.pump(line.socket, answer.length // 2)
            raise _GoneError
        onward.pump(line.socket, answer.length)
        self._sent(answer.length)

    def _file(self, client: socket.socket, head: _Head, *, cut: bool) -> None:
        content = self.files.get(unquote(urlsplit(head.path).path))
        if content is None:
            _refuse(client, "404 Not Found")
            return
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        tag = self.tag or (
            f'"{hash(content):x}"' if isinstance(content, bytes) else f'"{content.stat().st_mtime_ns:x}"'
        )
        if head.headers.get("if-match", tag) != tag:
            _refuse(client, "412 Precondition Failed")
            return
        start, stop = _asked(head, size)
        if start >= stop and "range" in head.headers:
            _refuse(client, "416 Range Not Satisfiable")
            return
        partial = "range" in head.headers
        first = "206 Partial Content" if partial else "200 OK"
        where = f"Content-Range: bytes {start}-{stop - 1}/{size}\r\n" if partial else ""
        client.sendall(
            f"HTTP/1.1 {first}\r\n{where}Content-Length: {stop - start}\r\nAccept-Ranges: bytes\r\nETag: {tag}\r\n"
            "Last-Modified: Mon, 02 Jan 2023 00:00:00 GMT\r\n\r\n".encode()
        )
        if head.method == "HEAD":
            return
        _send(client, content, start, start + (stop - start) // 2 if cut else stop)
        if cut:
            raise _GoneError
        self._sent(stop - start)

    def _told(self, client: socket.socket, head: _Head) -> None:
        told = dict(parse_qsl(urlsplit(head.path).query))
        self.share = float(told.get("share", self.share))
        self.delay = float(told["delay"]) / 1000 if "delay" in told else self.delay
        self.stall = float(told.get("stall", self.stall))
        self.kinds = tuple(told["kinds"].split(",")) if "kinds" in told else self.kinds
        body = json.dumps(self.counted()).encode()
        if "reset" in told:
            self.reset()
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


@dataclass(frozen=True)
class _Head:
    """The head of a request or an answer; ``length`` of the body that follows."""

    raw: bytes
    method: str
    path: str
    headers: Mapping[str, str]
    length: int


class _Line:
    """A connection, with what was read too much."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._rest = b""

    def head(self, answer_to: str | None = None) -> _Head:
        """Read up to the empty line. Raises _GoneError."""
        data = self._rest
        while b"\r\n\r\n" not in data:
            more = self.socket.recv(_BUFFER)
            if not more:
                raise _GoneError
            data += more
        raw, _, self._rest = data.partition(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").split("\r\n")
        headers = {n.strip().lower(): v.strip() for n, _, v in (line.partition(":") for line in lines)}
        words = first.split(" ")
        bodiless = answer_to == "HEAD" or (answer_to is not None and words[1] in ("204", "304"))
        if "chunked" in headers.get("transfer-encoding", ""):
            raise _GoneError  # no S3 client or server that is used here needs it
        length = 0 if bodiless else int(headers.get("content-length", 0))
        return _Head(raw + b"\r\n\r\n", words[0], words[1], headers, length)

    def pump(self, target: socket.socket, length: int) -> None:
        """Send ``length`` bytes on. Raises _GoneError."""
        if length and self._rest:
            part, self._rest = self._rest[:length], self._rest[length:]
            target.sendall(part)
            length -= len(part)
        buffer = memoryview(bytearray(min(_BUFFER, length)))
        while length > 0:
            got = self.socket.recv_into(buffer, min(len(buffer), length))
            if not got:
                raise _GoneError
            target.sendall(buffer[:got])
            length -= got

    def discard(self, length: int) -> None:
        """Read a body that nobody wants."""
        part, self._rest = self._rest[:length], self._rest[length:]
        left = length - len(part)
        while left > 0:
            left -= len(self.socket.recv(min(left, _BUFFER))) or left


def _connected(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port or 80))


def _refuse(client: socket.socket, status: str) -> None:
    client.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())


def _asked(head: _Head, size: int) -> tuple[int, int]:
    asked = head.headers.get("range")
    if asked is None:
        return 0, size
    first, _, last = asked.removeprefix("bytes=").partition("-")
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(int(last) + 1 if last else size, size)


def _send(client: socket.socket, content: Path | bytes, start: int, stop: int) -> None:
    if isinstance(content, bytes):
        client.sendall(memoryview(content)[start:stop])
        return
    with content.open("rb") as file:
        while start < stop:
            start += os.sendfile(client.fileno(), file.fileno(), start, stop - start)


def tell(url: str, **told: object) -> dict[str, int]:
    """Ask a server in another process what it has counted; tell it ``share``, ``kinds``, ``delay`` (ms), ``reset``."""
    query = "&".join(f"{name}={value}" for name, value in told.items())
    with urllib.request.urlopen(f"{url}/faulty?{query}") as answer:
        counted: dict[str, int] = json.load(answer)
        return counted


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description="A server that delays, counts and fails on purpose.")
    parser.add_argument("--upstream", help="address of the server to pass requests on to")
    parser.add_argument("--file", type=Path, help="file to serve under its name, in place of an upstream")
    parser.add_argument("--delay", type=float, default=0.0, help="milliseconds before each answer")
    parser.add_argument("--share", type=float, default=0.0, help="share of requests that fail")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--methods", default="GET", help="those that may fail, with commas")
    parser.add_argument("--stall", type=float, default=30.0, help="seconds that a stalled request takes")
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    files = {f"/{args.file.name}": args.file} if args.file else {}
    kinds, methods = tuple(args.kinds.split(",")), tuple(args.methods.split(","))
    with Faulty(
        args.upstream, files, args.delay / 1000, args.share, kinds, methods, stall=args.stall, port=args.port
    ) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
