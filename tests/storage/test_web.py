"""HTTP: answers that are not what was asked for, statuses by name, and where redirects may lead."""

from __future__ import annotations

import base64
import gzip
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from wsi_mmm.errors import NotFound, OutputError, StorageError, TransientError
from wsi_mmm.storage import addresses, store, web

DATA = np.random.default_rng(8).integers(0, 256, 400_000, np.uint8).tobytes()
Answer = tuple[int, dict[str, str], bytes]
Reply = Callable[[str, str, tuple[int, int] | None], Answer]  # method, path, range


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        first, _, last = asked.partition("-")
        self.server.seen.append((self.command, self.path, dict(self.headers)))
        status, headers, body = self.server.reply(
            self.command, self.path, (int(first), int(last) + 1) if asked else None
        )
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet."""


@contextmanager
def _server(reply: Reply, host: str = "127.0.0.1") -> Iterator[Any]:
    server: Any = ThreadingHTTPServer((host, 0), _Handler)
    server.reply, server.seen, server.url = reply, [], f"http://{host}:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _part(asked: tuple[int, int] | None, said: str | None = None, **headers: str) -> Answer:
    """The bytes asked for, and ``said`` as Content-Range (with fields a, b, n)."""
    if asked is None:
        return 200, headers, DATA
    a, b = asked[0], min(asked[1], len(DATA))
    text = "bytes {a}-{b}/{n}" if said is None else said
    where = {"Content-Range": text.format(a=a, b=b - 1, n=len(DATA), a1=a + 1, b1=b)} if text else {}
    return 206, where | headers, DATA[a:b]


def _read_all(uri: str) -> bytes:
    opened = store.open_store(uri)
    return b"".join(map(bytes, opened.get_ranges([(0, 100), (300_000, 50_000), (399_990, 100)])))


WANTED = DATA[:100] + DATA[300_000:350_000] + DATA[399_990:]


@pytest.fixture(autouse=True)
def _soon_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSI_MMM_STORAGE_TIMEOUT", "3")


# ---------------------------------------------------------------- answers


RIGHT: dict[str, Reply] = {
    "plain": lambda method, path, asked: _part(asked),
    "capitals": lambda method, path, asked: _part(asked, "Bytes {a}-{b}/{n}"),
    "spaces": lambda method, path, asked: _part(asked, "  bytes {a}-{b}/{n} "),
    "identity": lambda method, path, asked: _part(asked, **{"Content-Encoding": "identity"}),
    "no size": lambda method, path, asked: _part(asked, "bytes {a}-{b}/*"),
    "weak tag": lambda method, path, asked: _part(asked, ETag='W/"a"'),
}


@pytest.mark.parametrize("name", RIGHT)
def test_unusual_answers_that_say_enough_are_right(name: str) -> None:
    """A size that ranges do not say comes from HEAD."""
    with _server(RIGHT[name]) as server:
        assert _read_all(f"{server.url}/a") == WANTED


WRONG: dict[str, tuple[Reply, str]] = {
    "no Content-Range": (lambda method, path, asked: _part(asked, ""), "Content-Range missing"),
    "begins one later": (lambda method, path, asked: _part(asked, "bytes {a1}-{b}/{n}"), "other bytes"),
    "ends one later": (lambda method, path, asked: _part(asked, "bytes {a}-{b1}/{n}"), "other bytes"),
    "always the first": (lambda method, path, asked: _part(asked and (0, asked[1] - asked[0])), "other bytes"),
    "too much": (lambda method, path, asked: (*_part(asked)[:2], _part(asked)[2] + b"x"), "more bytes"),
    "size below": (lambda method, path, asked: _part(asked, "bytes {a}-{b}/7"), "other bytes"),
    "no number": (lambda method, path, asked: _part(asked, "bytes {a}-{b}/many"), "other bytes"),
    "reversed": (lambda method, path, asked: _part(asked, "bytes {b}-{a}/{n}"), "other bytes"),
    "several parts": (
        lambda method, path, asked: (206, {"Content-Type": "multipart/byteranges; boundary=x"}, b"--x"), "missing"),
    "whole file": (lambda method, path, asked: (200, {}, DATA), "does not serve byte ranges"),
    "other success": (lambda method, path, asked: (203, {}, DATA), "does not serve byte ranges"),
    "login page": (lambda method, path, asked: (200, {"Content-Type": "text/html"}, b"<html>"), "web page"),
    "gzip": (lambda method, path, asked: _part(asked, **{"Content-Encoding": "gzip"}), r"compresses.*gzip"),
    "br": (lambda method, path, asked: _part(asked, **{"Content-Encoding": "br"}), r"compresses.*br"),
    "no size at all": (
        lambda method, path, asked: _part(asked, "bytes {a}-{b}/*") if method == "GET" else (405, {}, b""), "the size"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_may_be_other_bytes_is_refused(name: str) -> None:
    """One line, never wrong bytes, and asked once."""
    reply, words = WRONG[name]
    with _server(reply) as server:
        with pytest.raises(StorageError, match=words) as caught:
            _read_all(f"{server.url}/a?sig=hidden")
        assert len(server.seen) <= 3
    assert not isinstance(caught.value, TransientError)
    assert "\n" not in str(caught.value) and "hidden" not in str(caught.value)


def test_a_size_that_changes_is_another_version() -> None:
    """Even without a tag or a date."""
    sizes = iter([len(DATA), len(DATA) + 5, len(DATA) + 5])
    with (
        _server(lambda method, path, asked: _part(asked, f"bytes {{a}}-{{b}}/{next(sizes)}")) as server,
        pytest.raises(StorageError, match="replaced"),
    ):
        _read_all(f"{server.url}/a")


def test_whole_objects_come_unpacked_and_ranges_are_not_asked_for() -> None:
    """A manifest that the server stores compressed is its text; what is damaged or of another kind is refused."""
    text = b"slide,mpp\na.svs,0.5\n" * 50
    packed = gzip.compress(text)
    bodies = {"/z": packed, "/cut": packed[:-9], "/lies": text, "/br": packed}
    codes = {"/br": "br"}
    with _server(
        lambda method, path, asked: (200, {"Content-Encoding": codes.get(path, "gzip")}, bodies[path])
    ) as server:
        assert store.read_bytes(f"{server.url}/z") == text
        assert store.read_bytes(f"{server.url}/lies") == text
        with pytest.raises(StorageError, match="damaged"):
            store.read_bytes(f"{server.url}/cut")
        with pytest.raises(StorageError, match="compresses"):
            store.read_bytes(f"{server.url}/br")
        assert all("Range" not in headers and headers["Accept-Encoding"] == "identity" for *_, headers in server.seen)


# ---------------------------------------------------------------- statuses


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (404, NotFound, "no such object"), (410, NotFound, "no such object"), (401, StorageError, r"denied \(401\)"),
        (403, StorageError, r"denied \(403\)"), (400, StorageError, r"refuses the request \(400\)"),
        (418, StorageError, r"\(418\)"), (429, TransientError, "fewer requests"), (500, TransientError, r"\(500\)"),
        (503, TransientError, "overloaded"), (504, TransientError, "gateway"), (507, TransientError, r"\(507\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("query", ["", "?sig=hidden"])
def test_a_status_is_said_by_name(status: int, error: type[StorageError], words: str, query: str) -> None:
    """The same for plain and signed addresses; what may pass was tried again."""
    with _server(lambda method, path, asked: (status, {}, b"")) as server:
        for ask in (store.open_store, store.read_bytes):
            with pytest.raises(error, match=words) as caught:
                ask(f"{server.url}/a{query}")
            assert type(caught.value) is error
            assert "AWS" not in str(caught.value) and "hidden" not in str(caught.value)
        assert (len(server.seen) > 2) == (error is TransientError)


def test_servers_that_know_no_head_are_asked_otherwise_whether_something_is_there() -> None:
    """As those behind a signature for GET are."""
    there: Reply = lambda method, path, asked: (403, {}, b"") if method == "HEAD" else _part(asked)  # noqa: E731
    with _server(lambda m, p, asked: there(m, p, asked) if p == "/a" else (404, {}, b"")) as server:
        assert store.exists(f"{server.url}/a")
        assert not store.exists(f"{server.url}/none")


def test_the_web_is_read_only() -> None:
    """Writing, deleting and searching say what to do."""
    for act in (lambda: store.write_bytes("http://h/a", b"x"), lambda: store.delete("https://h/a")):
        with pytest.raises(OutputError, match=r"folder or s3://"):
            act()
    with pytest.raises(StorageError, match="manifest"):
        store.list_uris("http://h/folder/")


@pytest.mark.parametrize(
    "address", ["http://[bad/a", "http://host:port/a", "http:///a", "https://h:99999/a", "http://?x"]
)
def test_an_address_that_is_none_is_named(address: str) -> None:
    """One line, no traceback."""
    with pytest.raises(StorageError, match="is no address"):
        store.open_store(address)


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        ("/a b.tif", "/a%20b.tif"), ("/a%20b.tif", "/a%20b.tif"), ("/100%.tif", "/100%25.tif"),
        ("/ü.tif", "/%C3%BC.tif"),
        ("/a%2Fb//c/../d.tif", "/a%2Fb//c/../d.tif"), ("/a?sig=a%2Fb%3D%3D&x=a+b#part", "/a?sig=a%2Fb%3D%3D&x=a+b"),
        ("", "/"), ("/[1]{2}.tif", "/%5B1%5D%7B2%7D.tif"),
    ],
)  # fmt: skip
def test_an_address_is_sent_as_it_was_given(typed: str, sent: str) -> None:
    """What may stand in an address is left alone, since a signature covers it; the rest is quoted."""
    with _server(lambda method, path, asked: _part(asked)) as server:
        store.open_store(server.url + typed)
        assert server.seen[0][1] == sent


# ---------------------------------------------------------------- redirects


def _redirect(to: str, status: int = 302) -> Answer:
    return status, {"Location": to}, b"moved"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("place", ["/real?x=1", "real", "//{host}/real", "http://{host}/real"])
def test_a_redirect_is_followed(status: int, place: str) -> None:
    """Absolute and relative ones, for the first bytes and every range."""

    def reply(method: str, path: str, asked: tuple[int, int] | None) -> Answer:
        return _part(asked) if "real" in path else _redirect(place.format(host=host), status)

    with _server(reply) as server:
        host = server.url.removeprefix("http://")
        assert _read_all(f"{server.url}/a") == WANTED


def test_redirects_have_an_end() -> None:
    """A circle, and a chain that is too long, are errors that say so; asked once."""
    replies: dict[str, Reply] = {
        "circle": lambda method, path, asked: _redirect(path),
        "chain": lambda method, path, asked: _redirect(path + "x"),
    }
    for reply in replies.values():
        with _server(reply) as server:
            with pytest.raises(StorageError, match="more than 5 redirects"):
                store.open_store(f"{server.url}/a")
            assert len(server.seen) == 6


@pytest.mark.parametrize(
    ("place", "words"),
    [("", "does not say where"), ("ftp://127.0.0.1/a", "something else"), ("file:///etc/passwd", "something else"),
     ("http://[bad/a", "no address"), ("http://h:port/", "no address"), ("s3://bucket/key", "something else")],
)  # fmt: skip
def test_a_redirect_leads_to_a_web_server(place: str, words: str) -> None:
    """Nothing else is followed."""
    with (
        _server(lambda method, path, asked: _redirect(place)) as server,
        pytest.raises(StorageError, match=words),
    ):
        store.open_store(f"{server.url}/a")


@pytest.mark.parametrize(
    "place",
    ["http://127.0.0.1:{port}/k", "http://2130706433:{port}/k", "http://0x7f.1:{port}/k", "http://0177.0.0.1:{port}/k",
     "http://localhost:{port}/k", "http://[::ffff:127.0.0.1]:{port}/k", "http://0.0.0.0:{port}/k",
     "http://169.254.169.254/latest/meta-data", "http://[fd00:ec2::254]/latest", "http://10.0.0.1/a",
     "http://[64:ff9b::a9fe:a9fe]/a", "http://192.168.0.1/a", "http://100.100.100.200/a"],
)  # fmt: skip
def test_a_redirect_from_outside_reaches_no_inner_address(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is written; the server there is not asked."""
    real = addresses.kinds_of
    monkeypatch.setattr(web, "kinds_of", lambda host: frozenset() if host == "127.0.0.2" else real(host))
    with (
        _server(lambda method, path, asked: _part(asked)) as inner,
        _server(lambda method, path, asked: _redirect(place.format(port=inner.server_port)), "127.0.0.2") as outer,
    ):
        with pytest.raises(StorageError, match="inner address") as caught:
            store.open_store(f"{outer.url}/a")
        assert inner.seen == []
        assert len(outer.seen) == 1
    assert not isinstance(caught.value, TransientError)


def test_a_name_that_changes_its_address_reaches_no_inner_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was public when it was looked at, and is this machine when it is connected to."""
    monkeypatch.setattr(web, "kinds_of", lambda host: frozenset())
    with (
        _server(lambda method, path, asked: _part(asked)) as inner,
        _server(lambda method, path, asked: _redirect(f"http://localhost:{inner.server_port}/k"), "127.0.0.2") as outer,
    ):
        with pytest.raises(StorageError):
            store.open_store(f"{outer.url}/a")
        assert inner.seen == []


def test_an_inner_address_redirects_to_its_own_kind_only() -> None:
    """This machine to this machine; not to the service that gives machines of a cloud their keys."""
    with (
        _server(lambda method, path, asked: _part(asked)) as other,
        _server(lambda method, path, asked: _redirect(f"{other.url}{path}"), "127.0.0.2") as first,
    ):
        assert _read_all(f"{first.url}/a") == WANTED
        first.reply = lambda method, path, asked: _redirect("http://169.254.169.254/latest")
        with pytest.raises(StorageError, match="link-local"):
            store.open_store(f"{first.url}/a")


def test_a_login_stays_with_the_server_it_is_for() -> None:
    """It is sent again after a redirect on that server, and neither to another one nor to the same under a new port."""
    login = "Basic " + base64.b64encode(b"me:pass word").decode()

    def sent(server: Any) -> list[str | None]:
        return [headers.get("Authorization") for *_, headers in server.seen]

    with (
        _server(lambda method, path, asked: _part(asked)) as other,
        _server(lambda method, path, asked: _part(asked) if path == "/real" else _redirect("/real")) as first,
    ):
        host = first.url.removeprefix("http://")
        store.open_store(f"http://me:pass%20word@{host}/a")
        assert sent(first) == [login, login]
        first.reply = lambda method, path, asked: _redirect(f"http://evil:login@{other.url.removeprefix('http://')}/b")
        store.open_store(f"http://me:pass%20word@{host}/a")
        assert sent(other) == [None]
        assert not {"Cookie", "Referer"} & set(other.seen[0][2])


def test_a_redirect_never_leaves_tls() -> None:
    """What was asked for under TLS is not fetched without."""
    import yarl

    class Moved:
        status, headers = 302, {"Location": "http://example.org/a"}

    begun = yarl.URL("https://example.org/a")
    with pytest.raises(StorageError, match="leave TLS"):
        web._redirect_target(Moved, str(begun), begun, begun)  # type: ignore[arg-type]


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by other tools; hosts in NO_PROXY are asked directly."""
    with _server(lambda method, path, asked: _part(asked)) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        store.open_store("http://slides.invalid/a.svs")
        assert proxy.seen[0][1] == "http://slides.invalid/a.svs"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        store.open_store(f"{proxy.url}/b.svs")
        assert proxy.seen[1][1] == "/b.svs"
