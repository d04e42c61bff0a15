"""Slides on S3 (moto, in this process) and HTTP: few ranged requests, the same pixels, errors without secrets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from helpers.made_slides import Made
from helpers.moto import SECRET
from wsi_mmm.errors import NotASlide, OutputError, SlideChanged, SlideNotFound, StorageError, WsiError
from wsi_mmm.slides import open_slide
from wsi_mmm.storage import store
from wsi_mmm.storage.remote import Endpoint, RemoteStore
from wsi_mmm.types import Block


def test_objects_on_s3_are_written_read_listed_and_deleted(bucket: str) -> None:
    """The same helpers as for local files, keys with spaces and signs included."""
    uri = store.join(bucket, "out", "a b+c#1.bin")
    assert not store.exists(uri)
    assert store.list_uris(store.join(bucket, "out")) == []
    store.write_bytes(uri, b"hello")
    store.write_bytes(store.join(bucket, "out", "deep", "z"), b"x")
    store.write_bytes(store.join(bucket, "outside"), b"x")
    assert store.exists(uri)
    assert store.read_bytes(uri) == b"hello"
    assert store.list_uris(store.join(bucket, "out")) == [uri, store.join(bucket, "out", "deep", "z")]
    assert len(store.list_uris(bucket)) == 3
    store.delete(uri)
    store.delete(uri)
    assert not store.exists(uri)


def test_a_slide_on_s3_is_the_slide_on_disk_in_few_requests(bucket: str, small_slide: Made) -> None:
    """Pixels and fingerprint are equal; directories come in few requests, tiles in merged ranges."""
    store.write_bytes(f"{bucket}/a.tiff", small_slide.path.read_bytes())
    with open_slide(f"{bucket}/a.tiff") as far, open_slide(str(small_slide.path)) as near:
        opened = far.reader.stats().requests
        assert opened <= 5
        assert far.info.fingerprint == near.info.fingerprint
        assert far.info.uri == "s3://slides/a.tiff"
        block = Block(0, 0, 1100, 820, 1.0, 1.0)
        assert np.array_equal(far.reader.read(block).pixels, near.reader.read(block).pixels)
        assert far.reader.stats().requests - opened <= 2


def test_an_object_replaced_while_it_is_read_is_noticed(bucket: str, small_slide: Made) -> None:
    """The ETag of every answer is compared."""
    data = small_slide.path.read_bytes()
    store.write_bytes(f"{bucket}/a.tiff", data)
    with open_slide(f"{bucket}/a.tiff") as slide:
        store.write_bytes(f"{bucket}/a.tiff", data[:-8] + bytes(8))
        with pytest.raises(SlideChanged, match="replaced"):
            slide.read_region(0, 0, 300, 300)


def test_missing_objects_and_buckets_are_not_found(bucket: str) -> None:
    """Both say what to check."""
    for uri in (f"{bucket}/none.svs", "s3://no-such-bucket/a.svs"):
        with pytest.raises(SlideNotFound, match="check bucket, key"):
            open_slide(uri)
    with pytest.raises(OutputError, match="no-such-bucket"):
        store.write_bytes("s3://no-such-bucket/a", b"x")
    with pytest.raises(StorageError, match="no such bucket"):
        store.list_uris("s3://no-such-bucket/a")


def test_what_only_openslide_reads_is_refused_over_the_network(bucket: str, small_slide: Made) -> None:
    """A forced OpenSlide and a remote DICOM say that a local copy is needed."""
    store.write_bytes(f"{bucket}/a.tiff", small_slide.path.read_bytes())
    with pytest.raises(NotASlide, match="needs a local file"):
        open_slide(f"{bucket}/a.tiff", reader="openslide")
    store.write_bytes(f"{bucket}/a.dcm", bytes(128) + b"DICM" + bytes(50))
    with pytest.raises(NotASlide, match="DICOM"):
        open_slide(f"{bucket}/a.dcm")


def test_an_unreachable_server_is_one_line_without_the_secret(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names what to check; neither it nor its causes hold the key."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WSI_MMM_STORAGE_TIMEOUT", "1")
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL") as caught:
        store.read_bytes(f"{bucket}/a")
    told: BaseException | None = caught.value
    assert "\n" not in str(told)
    while told is not None:
        assert SECRET not in str(told)
        told = told.__cause__


@pytest.mark.parametrize(
    "step", [store.open_store, store.exists, store.list_uris, lambda uri: store.write_bytes(uri, b"")]
)
def test_a_file_system_that_connects_at_once_and_cannot_is_one_line(step: Callable[[str], object]) -> None:
    """FTP is asked for its greeting before anything else; its login stays out of the error."""
    with pytest.raises(StorageError, match=r"^ftp://127\.0\.0\.1:9/a\.svs: the server cannot be reached"):
        step("ftp://me:password@127.0.0.1:9/a.svs")


class _Ranges(BaseHTTPRequestHandler):
    """Serves one body; honours ranges, HEAD and If-Match as the server's ``ranged``, ``heads`` and ``tag`` say."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        data: bytes = self.server.data
        if "none" in self.path:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        refused = 405 if not body and not self.server.heads else 0
        if self.headers.get("If-Match", self.server.tag) != self.server.tag:
            refused = 412
        if refused:
            self.send_response(refused)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = self.headers.get("Range")
        if asked and self.server.ranged:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            data = data[start:stop]
        else:
            self.send_response(200)
        if self.server.ranged:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", self.server.tag)
        self.send_header("Last-Modified", "Mon, 02 Jan 2023 00:00:00 GMT")
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet."""


@pytest.fixture
def web(small_slide: Made) -> Iterator[Any]:
    """A web server with the small slide at any path."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Ranges)
    server.data, server.ranged, server.heads, server.tag = small_slide.path.read_bytes(), True, True, '"v1"'
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("query", ["", "?X-Amz-Signature=hidden"])
def test_a_slide_over_http_is_read_in_ranges(web: Any, small_slide: Made, query: str) -> None:
    """Plain and signed addresses work; the signature is not shown."""
    uri = f"http://127.0.0.1:{web.server_port}/folder/my%20slide.tiff{query}"
    with open_slide(uri) as far, open_slide(str(small_slide.path)) as near:
        assert "hidden" not in far.info.uri
        assert far.info.fingerprint == near.info.fingerprint
        assert np.array_equal(far.read_region(200, 100, 500, 300), near.read_region(200, 100, 500, 300))


def test_http_errors_are_words(web: Any) -> None:
    """A missing page is SlideNotFound; a server without ranges says what to do."""
    base = f"http://127.0.0.1:{web.server_port}"
    with pytest.raises(SlideNotFound):
        open_slide(f"{base}/none.tiff")
    web.ranged = False
    for query in ("", "?sig=hidden"):
        with pytest.raises(WsiError, match="ranges") as caught, open_slide(f"{base}/a.tiff{query}") as slide:
            slide.read_region(0, 0, 10, 10)
        assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("query", ["", "?sig=hidden"])
def test_a_page_replaced_while_it_is_read_is_noticed(web: Any, query: str) -> None:
    """Plain addresses compare the ETag of every answer, signed ones ask for the version they began with."""
    with open_slide(f"http://127.0.0.1:{web.server_port}/a.tiff{query}") as slide:
        web.tag = '"v2"'
        with pytest.raises(SlideChanged, match="replaced"):
            slide.read_region(0, 0, 300, 300)


@pytest.mark.parametrize("query", ["", "?sig=hidden"])
def test_a_server_that_refuses_head_is_read_all_the_same(web: Any, small_slide: Made, query: str) -> None:
    """Size and version then come with the first bytes."""
    web.heads = False
    with open_slide(f"http://127.0.0.1:{web.server_port}/a.tiff{query}") as far:
        assert (far.info.width, far.info.height) == (1100, 820)


@pytest.mark.parametrize(
    ("size", "error", "words"), [(100, StorageError, "byte ranges"), (5, StorageError, "end early")]
)
def test_an_answer_of_another_length_is_never_taken_for_the_bytes_asked_for(
    size: int, error: type[WsiError], words: str
) -> None:
    """Too much means no ranges; too little, again and again, that something cuts the answers off."""

    async def get(start: int, stop: int, begins: object) -> tuple[bytes, None]:
        return bytes(size), None

    opened = RemoteStore("http://x/a?key=hidden", 100, None, get, Endpoint(5.0))
    with pytest.raises(StorageError, match=words) as caught:
        opened.get_ranges([(10, 20)])
    assert "hidden" not in str(caught.value)
    assert opened.get_ranges([(100, 20)]) == [b""]


def test_folders_of_a_prefix_are_listed_without_what_is_in_them(bucket: str) -> None:
    """Their names, as the tables of all slides want them; through fsspec, too."""
    for root in (f"{bucket}/out", f"memory://{bucket.partition('//')[2]}/out"):
        assert store.list_folders(root) == []
        for name in ("b/slide.json", "a/slide.json", "a/features.zarr/c/0", "report.json"):
            store.write_bytes(store.join(root, name), b"{}")
        assert store.list_folders(root) == store.list_folders(root + "/") == ["a", "b"]
