"""A small WSI service over a real reader, which counts, can refuse and can fail. Pictures are cut as the real one does.

    with FakeService({"s1": open_slide(path)}) as web: open_slide(f"{web.url}/v3/slides/s1")

``token``: the bearer token it wants. ``answers``: what is answered first to a request whose path holds a word,
in order: a status, or (status, body); "reset" breaks the connection.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import socket
import ssl
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

from wsi_mmm.slides import Slide
from wsi_mmm.slides.resample.scaled import sources_of
from wsi_mmm.types import U8, Block

MOST_PIXELS = 25_000_000
_REGION = re.compile(r"/v3/slides/([^/]+)/region/level/(\d+)/start/(-?\d+)/(-?\d+)/size/(\d+)/(\d+)")
_TILE = re.compile(r"/v3/slides/([^/]+)/tile/level/(\d+)/tile/(\d+)/(\d+)")
_INFO = re.compile(r"/v3/slides/([^/]+)/info")
Answer = int | tuple[int, bytes] | str


@dataclass
class FakeService:
    """The service; fields may be changed while it runs. ``log``: paths with queries; ``bytes_sent``: of bodies."""

    slides: Mapping[str, Slide]
    token: str | None = None
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    storage: Mapping[str, object] = field(default_factory=dict)  # what a storage mapper says, by id
    info: dict[str, object] = field(default_factory=dict)  # replaces fields of every description
    certificate: Path | None = None  # a folder with tls.crt and tls.key: speaks TLS
    log: list[str] = field(default_factory=list)
    bytes_sent: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def __enter__(self) -> FakeService:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.service = self  # type: ignore[attr-defined]
        if self.certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate / "tls.crt", self.certificate / "tls.key")
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.port}"

    def pictures(self) -> list[str]:
        """Requests for regions and tiles so far."""
        return [path for path in self.log if "/region/" in path or "/tile/" in path]


def level_pixels(slide: Slide, level: int, window: tuple[int, int, int, int]) -> U8:
    """A window (x, y, width, height) of a stored level, white beyond it; asked for so that it is read as stored: at the
    spacing of its px, which the ratio of rounded sizes is not."""
    x, y, width, height = window
    found = sources_of(slide.info.levels)[level]
    return slide.reader.read(Block(x, y, width, height, found.downsample_x, found.downsample_y)).pixels


def described(slide: Slide, name: str) -> dict[str, object]:
    """The SlideInfo of a slide."""
    info = slide.info
    top = info.levels[0]
    return {
        "id": name, "channels": None, "channel_depth": 8, "extent": {"x": info.width, "y": info.height, "z": 1},
        "num_levels": len(info.levels), "pixel_size_nm": {"x": (info.mpp_x or 0) * 1000, "y": (info.mpp_y or 0) * 1000},
        "tile_extent": {"x": top.tile_width, "y": top.tile_height, "z": 1},
        "levels": [
            {"extent": {"x": v.width, "y": v.height, "z": 1}, "downsample_factor": v.downsample_x} for v in info.levels
        ],
        "format": "fake", "raw_download": False,
    }  # fmt: skip


def encoded(pixels: U8, query: Mapping[str, list[str]]) -> bytes:
    """A picture in the format that is asked for; JPEG when none is."""
    kind = query.get("image_format", ["jpeg"])[0]
    buffer = io.BytesIO()
    more = {"quality": int(query.get("image_quality", ["90"])[0])} if kind == "jpeg" else {"compress_level": 1}
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, kind, **more)
    return buffer.getvalue()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def service(self) -> FakeService:
        return self.server.service  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client left, or does not trust us
            super().handle()

    def do_GET(self) -> None:
        answer = self._planned()
        if answer == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True
            return
        status, body = answer if isinstance(answer, tuple) else (answer, b'{"detail": "planned"}')
        if answer is None:
            status, body = self._answer()
        self._send(int(status), body)

    def _planned(self) -> Any:
        with self.service.lock:
            self.service.log.append(self.path)
            for word, waiting in self.service.answers.items():
                if word in self.path and waiting:
                    return waiting.pop(0)
        return None

    def _send(self, status: int, body: bytes) -> None:
        with self.service.lock:
            self.service.bytes_sent += len(body)
        self.send_response(status)
        # As real services stream: no Content-Length.
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(body), body) if body else b"")
        self.wfile.write(b"0\r\n\r\n")

    def _answer(self) -> tuple[int, bytes]:
        if self.service.token is not None and self.headers.get("Authorization") != f"Bearer {self.service.token}":
            return (403 if "Authorization" in self.headers else 401), b"{}"
        parts = urlsplit(self.path)
        name = parts.path.split("/")[3] if parts.path.startswith("/v3/slides/") else ""
        if name in self.service.storage and parts.path == f"/v3/slides/{name}":
            return 200, json.dumps(self.service.storage[name]).encode()
        if name not in self.service.slides:
            return 404, b"{}"
        slide = self.service.slides[name]
        if _INFO.fullmatch(parts.path):
            return 200, json.dumps(described(slide, name) | self.service.info).encode()
        window = _window(slide, parts.path)
        if window is None or window[0] >= len(slide.info.levels) or window[3] * window[4] > MOST_PIXELS:
            return 422, b"{}"
        with self.service.lock:
            pixels = level_pixels(slide, window[0], window[1:])
        return 200, encoded(pixels, parse_qs(parts.query))


def _window(slide: Slide, path: str) -> tuple[int, int, int, int, int] | None:
    """Level, x, y, width, height of a region or a tile."""
    region, tile = _REGION.fullmatch(path), _TILE.fullmatch(path)
    if region:
        level, x, y, width, height = map(int, region.groups()[1:])
        return level, x, y, width, height
    if tile:
        level, column, row = map(int, tile.groups()[1:])
        width, height = slide.info.levels[0].tile_width, slide.info.levels[0].tile_height
        return level, column * width, row * height, width, height
    return None
