"""Slides behind a WSI service: the pixels of the file behind it, in few requests, and errors that say what to do."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.certificates import certificates
from helpers.made_slides import Board, Made
from helpers.wsi_service import FakeService, described, encoded, level_pixels
from wsi_mmm.errors import (
    ConfigError,
    NotFound,
    OptionError,
    SlideDamaged,
    SlideNotFound,
    StorageError,
    TransientCause,
    TransientError,
    WsiError,
)
from wsi_mmm.inputs import expand_inputs
from wsi_mmm.slides import open_slide
from wsi_mmm.slides.service.cuts import GRID_CUTS
from wsi_mmm.slides.service.info import parse_slide_info, storage_path
from wsi_mmm.slides.service.reader import PictureRoutes, ServiceReader, decode_picture
from wsi_mmm.slides.service.wsi_service import _service_token, parse_address
from wsi_mmm.storage.base import is_service
from wsi_mmm.tiles.stream import stream
from wsi_mmm.types import Block, Grid, Level

TOKEN = "very.secret-token"


@pytest.fixture
def web(small_slide: Made, board: Board) -> Iterator[FakeService]:
    """A service with two slides."""
    with (
        open_slide(str(small_slide.path), reader="openslide") as small,
        open_slide(str(board.path), reader="openslide") as large,
        FakeService({"small": small, "board": large}) as service,
    ):
        yield service


def at(web: FakeService, name: str = "small", query: str = "") -> str:
    return f"{web.url}/v3/slides/{name}{query}"


# ---------------------------------------------------------------- pixels and requests


@pytest.mark.parametrize("scale", [1.0, 1.9011, 4.0, 7.9, 0.7])
def test_pixels_are_those_of_the_file_behind_the_service(web: FakeService, board: Board, scale: float) -> None:
    """Lossless pictures, the same levels: the same bits as OpenSlide, edges and outside included."""
    block = Block(-20, -10, int(3100 / scale), int(2300 / scale), scale, scale)
    with open_slide(at(web, "board")) as far, open_slide(str(board.path), reader="openslide") as near:
        assert np.array_equal(far.reader.read(block).pixels, near.reader.read(block).pixels)
        assert far.info.levels == near.info.levels
        assert (far.info.mpp_x, far.info.reader, far.info.vendor) == (0.25, "wsi-service", "fake")


def test_jpeg_is_smaller_close_and_another_slide_to_the_cache(web: FakeService, small_slide: Made) -> None:
    """Colours are within a few grey levels on average; the fingerprint tells lossy pictures from lossless ones."""
    block = Block(0, 0, 1100, 820, 1.0, 1.0)
    with open_slide(at(web)) as full, open_slide(at(web, query="?image_format=jpeg&image_quality=95")) as lossy:
        want, got = full.reader.read(block).pixels, lossy.reader.read(block).pixels
        assert 0 < np.abs(want.astype(int) - got).mean() < 4
        assert lossy.reader.stats().bytes_read < full.reader.stats().bytes_read / 2
        assert lossy.info.fingerprint != full.info.fingerprint
        assert all("image_format=jpeg&image_quality=95" in path for path in web.pictures()[1:3])


def test_opening_is_one_request_and_the_fingerprint_another(web: FakeService) -> None:
    """The fingerprint is the same every time and found once."""
    with open_slide(at(web)) as slide, open_slide(at(web)) as again:
        assert len(web.log) == 2
        assert slide.info.fingerprint == again.info.fingerprint
        assert len(slide.info.fingerprint) == 32
        assert slide.info.fingerprint
        assert len(web.pictures()) == 2


def test_small_levels_are_one_picture_and_large_ones_are_cut_in_whole_native_tiles() -> None:
    """No picture is of more than 25 megapixels, whatever the tiles are said to be."""
    assert GRID_CUTS.sides(Level(2048, 2048, 1, 1, 256, 256)) == (2048, 2048)
    assert GRID_CUTS.sides(Level(2049, 2048, 1, 1, 256, 256)) == (1024, 1024)
    assert GRID_CUTS.sides(Level(9999, 9999, 1, 1, 240, 300)) == (960, 900)
    assert GRID_CUTS.sides(Level(9999, 9999, 1, 1, 2048, 2048)) == (2048, 2048)
    assert GRID_CUTS.sides(Level(10**6, 10**6, 1, 1, 10**6, 1)) == (1024, 1024)


def test_a_run_over_tissue_asks_once_for_what_it_needs(web: FakeService, board: Board) -> None:
    """Two islands of tiles: the pictures under them and no others, each once, the same pixels as OpenSlide's."""
    index = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [7, 10], [7, 11], [8, 10]])
    grid = Grid(256, 32, 14, 10, 3000, 2200, 1.0, 1.0, 0.25)
    for query in ("", "?image_format=jpeg"):
        web.log.clear()
        with open_slide(at(web, "board", query)) as far, open_slide(str(board.path), reader="openslide") as near:
            got = list(stream(far.reader, grid, index, batch_size=3))
            want = list(stream(near.reader, grid, index, batch_size=3))
        asked = web.pictures()
        assert len(asked) == len(set(asked)) == 2  # of the 9 that the level has
        if not query:
            assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(got, want, strict=True))


def test_large_native_tiles_are_asked_for_as_tiles(board: Board) -> None:
    """A picture that is one native tile has an address of its own; at the edge its padding is cut off."""
    near = open_slide(str(board.path))
    routes = PictureRoutes("/r/{level}/{x}/{y}/{width}/{height}", "/t/{level}/{x}/{y}", "image_format=png")

    paths: list[str] = []

    class Asked:
        def get_many(self, urls: list[str], most: list[int], **_: Any) -> list[bytes]:
            paths.extend(urls)
            found = [tuple(map(int, url.split("?")[0].split("/")[2:])) for url in urls]
            windows = [(x * 1024, y * 1024, 1024, 1024) for _, x, y in found]
            return [encoded(level_pixels(near, 0, w), {"image_format": ["png"]}) for w in windows]

    said = described(near, "x") | {"tile_extent": {"x": 1024, "y": 1024, "z": 1}}
    reader = ServiceReader(said, routes, Asked(), uri="x")  # type: ignore[arg-type]
    block = Block(1900, 1100, 1100, 1100, 1.0, 1.0)
    assert np.array_equal(reader.read(block).pixels, near.reader.read(block).pixels)
    assert sorted(paths) == [f"/t/0/{x}/{y}?image_format=png" for x in (1, 2) for y in (1, 2)]
    near.close()


# ---------------------------------------------------------------- addresses


def test_which_addresses_are_slides_of_a_service() -> None:
    """Any wsi:// with the path of a slide; http(s) too, unless the last part looks like a file."""
    assert all(map(is_service, ["wsi://h/v3/slides/a", "https://h:8/x/v3/slides/a/", "wsi://h/v3/slides/a.svs"]))
    assert not any(map(is_service, ["https://h/v3/slides/a.svs", "https://h/slides/a", "wsi://h/a", "/v3/slides/a"]))
    address = parse_address("wsi://h:8443/base/v3/slides/a%2Fb c?plugin=x")
    assert address.slide == "https://h:8443/base/v3/slides/a%2Fb%20c"
    assert address.query == "image_format=png&plugin=x"
    assert [spec.uri for spec in expand_inputs(["wsi://h/v3/slides/a"])] == ["wsi://h/v3/slides/a"]


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        (f"wsi://me:{TOKEN}@h/v3/slides/a", "a login in the address"),
        (f"wsi://h/v3/slides/a?token={TOKEN}", "a parameter that is not one of"),
        ("wsi://h/slides/a", "names no slide"),
        ("wsi://h:99999/v3/slides/a", "names no host and port"),
        ("wsi:///v3/slides/a", "names no host and port"),
        ("wsi://h/v3/slides/a?image_format=bmp", "one of png, jpeg"),
        ("wsi://h/v3/slides/a?image_quality=101", "from 0 to 100"),
    ],
)
def test_wrong_addresses_are_told_before_anything_is_sent(uri: str, why: str) -> None:
    """In one line that names the shape wanted, without what may be a secret."""
    with pytest.raises(OptionError, match=why) as caught:
        open_slide(uri)
    assert TOKEN not in str(caught.value)


# ---------------------------------------------------------------- token and TLS


def test_the_token_opens_the_slide_and_is_nowhere_else(
    web: FakeService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes in the header alone: not in addresses, logs, errors, what is known of the slide, or the reader's text."""
    caplog.set_level(logging.DEBUG)
    web.token = TOKEN
    with pytest.raises(StorageError, match=r"wants a token \(401\); set WSI_MMM_SERVICE_TOKEN"):
        open_slide(at(web))
    monkeypatch.setenv("WSI_MMM_SERVICE_TOKEN", "wrong." + TOKEN)
    with pytest.raises(StorageError, match=r"access denied \(403\)") as caught:
        open_slide(at(web))
    monkeypatch.setenv("WSI_MMM_SERVICE_TOKEN", TOKEN)
    with open_slide(at(web)) as slide:
        shown = [repr(slide.info), repr(vars(slide.reader)), str(caught.value), caplog.text, *web.log]
        assert slide.thumbnail(100).shape == (75, 100, 3)
    assert not any(TOKEN in text for text in shown)


def test_the_token_goes_to_hosts_that_are_named_and_never_in_the_clear() -> None:
    """Another host gets none; http:// beyond this machine is refused."""
    env = {"WSI_MMM_SERVICE_TOKEN": TOKEN, "WSI_MMM_SERVICE_HOST": "good.org, other.org:8443"}
    assert _service_token(parse_address("wsi://good.org/v3/slides/a"), env) == TOKEN
    assert _service_token(parse_address("wsi://other.org:8443/v3/slides/a"), env) == TOKEN
    assert _service_token(parse_address("wsi://evil.org/v3/slides/a"), env) is None
    assert _service_token(parse_address("wsi://other.org/v3/slides/a"), env) is None
    with pytest.raises(ConfigError, match="could be read on the way") as caught:
        _service_token(parse_address("http://good.org/v3/slides/a"), env)
    with pytest.raises(ConfigError, match="holds characters"):
        _service_token(parse_address("wsi://h/v3/slides/a"), {"WSI_MMM_SERVICE_TOKEN": "a\nb"})
    assert TOKEN not in str(caught.value)


def test_a_certificate_of_nobodys_is_refused(web: FakeService, tmp_path: Path) -> None:
    """wsi:// speaks TLS and checks who answers; a service without TLS is told apart."""
    with (
        FakeService(web.slides, certificate=certificates(tmp_path)) as secure,
        pytest.raises(StorageError, match="certificate is not trusted"),
    ):
        open_slide(f"wsi://127.0.0.1:{secure.port}/v3/slides/small")
    assert secure.log == []
    with pytest.raises(StorageError, match="does not speak TLS"):
        open_slide(f"wsi://127.0.0.1:{web.port}/v3/slides/small")


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("status", "kind", "why"),
    [
        (401, StorageError, "token"), (403, StorageError, "ask for access"),
        (404, (NotFound, SlideNotFound), "no such slide"),
        (422, StorageError, "WSI service of v3"), (400, StorageError, "400"), (413, StorageError, "megapixel"),
        (429, TransientError, "fewer requests"), (500, StorageError, "its log says why"), (302, StorageError, "moved"),
        (418, StorageError, "418"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("word", ["/info", "/region/"])
def test_refusals_are_errors_at_once(
    web: FakeService, word: str, status: int, kind: type[WsiError] | tuple[type[WsiError], ...], why: str
) -> None:
    """Nothing is tried again; the error is one line with the slide's address."""
    web.answers[word] = [status]
    with pytest.raises(kind, match=why) as caught, open_slide(at(web)) as slide:
        slide.read_region(0, 0, 10, 10)
    assert "\n" not in str(caught.value)
    assert "/v3/slides/small" in str(caught.value)
    assert sum(word in path for path in web.log) == 1


def test_what_fails_in_passing_is_asked_for_again(web: FakeService, small_slide: Made) -> None:
    """502, 503, 504 and broken connections cost time, no pixels."""
    web.answers.update({"/info": [503, "reset"], "/region/": [502, "reset", 504]})
    with open_slide(at(web)) as far, open_slide(str(small_slide.path), reader="openslide") as near:
        block = Block(0, 0, 300, 200, 1.0, 1.0)
        assert np.array_equal(far.reader.read(block).pixels, near.reader.read(block).pixels)
    assert len(web.log) == 3 + 4


def test_a_service_that_stays_away_is_given_up_in_time(web: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the time-out the error says what was last heard, and that it may pass."""
    monkeypatch.setenv("WSI_MMM_STORAGE_TIMEOUT", "0.3")
    web.answers["/info"] = [503] * 1000
    with pytest.raises(StorageError, match=r"overloaded .*\(503\)") as caught:
        open_slide(at(web))
    assert isinstance(caught.value, TransientError) and caught.value.cause is TransientCause.OVERLOADED
    with pytest.raises(StorageError, match="cannot be resolved or reached"):
        open_slide("http://127.0.0.1:9/v3/slides/a")


@pytest.mark.parametrize(
    ("word", "body", "kind", "why"),
    [
        ("/info", b"<html>login</html>", StorageError, "no JSON"),
        ("/info", b"[" * 100_000, StorageError, "no JSON"),
        ("/info", b'{"id": "a"}', SlideDamaged, "description of the slide"),
        ("/info", b" " * (1 << 20) + b"{}", StorageError, "more than the"),
        ("/region/", b"<html>login</html>", StorageError, "no PNG or JPEG"),
        ("/region/", b"", StorageError, "no PNG or JPEG"),
        ("/region/", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\0\0\0\1\0\0\x08\2\0\0\0", StorageError, "65536 x 65536"),
        ("/region/", bytes(9_000_000), StorageError, "more than the"),
    ],
)
def test_garbage_is_told_and_never_decoded(
    web: FakeService, word: str, body: bytes, kind: type[WsiError], why: str
) -> None:
    """Pages of a login, bombs and endless answers are one line each."""
    web.answers[word] = [(200, body)]
    with pytest.raises(kind, match=why) as caught, open_slide(at(web)) as slide:
        slide.read_region(0, 0, 10, 10)
    assert "\n" not in str(caught.value)


def test_a_damaged_picture_is_white_and_listed(web: FakeService) -> None:
    """As a native tile that cannot be decoded: the rest of the slide goes on."""
    with open_slide(at(web, "board")) as slide:
        whole = slide.reader.read(Block(0, 0, 900, 900, 1.0, 1.0)).pixels
    web.answers["/start/0/0/"] = [(200, encoded(np.zeros((1024, 1024, 3), np.uint8), {"image_format": ["png"]})[:900])]
    with open_slide(at(web, "board")) as slide:
        canvas = slide.reader.read(Block(0, 0, 1200, 900, 1.0, 1.0))
        assert canvas.failed.tolist() == [[0, 0, 1024, 1024]]
        assert (canvas.pixels[:, :1024] == 255).all()
        assert not (canvas.pixels[:, 1024:] == 255).all()
        with pytest.raises(SlideDamaged):
            slide.read_region(0, 0, 10, 10)
    assert not (whole == 255).all()


def test_pictures_with_transparency_are_put_on_white() -> None:
    """RGBA and grey pictures become RGB."""
    for pixels, want in (
        (np.array([[[9, 9, 9, 0], [10, 20, 30, 255]]], np.uint8), [[[255] * 3, [10, 20, 30]]]),
        (np.array([[7, 8]], np.uint8), [[[7] * 3, [8] * 3]]),
    ):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        got = decode_picture(buffer.getvalue(), 2, 1, name="x")
        assert np.array_equal(got, want)


# ---------------------------------------------------------------- descriptions


SAID = {
    "id": "a", "extent": {"x": 100, "y": 80, "z": 1}, "num_levels": 1, "pixel_size_nm": {"x": 499.0, "y": 499.0},
    "tile_extent": {"x": 64, "y": 64, "z": 1}, "levels": [{"extent": {"x": 100, "y": 80}, "downsample_factor": 1.0}],
}  # fmt: skip


def test_what_may_be_missing_may_be_missing() -> None:
    """Format, channels, tiles and resolution are optional; an unknown resolution is None, never a guess."""
    info = parse_slide_info(SAID | {"tissue": "KIDNEY", "stain": None}, uri="u", fingerprint=lambda: "m")
    assert (info.mpp_x, info.vendor, dict(info.properties)) == (0.499, "unknown", {"id": "a", "tissue": "KIDNEY"})
    for size in (None, {}, {"x": 0, "y": 0}, {"x": "1", "y": True}, {"x": float("nan"), "y": float("inf")}):
        bare = parse_slide_info(SAID | {"pixel_size_nm": size, "tile_extent": None}, uri="u", fingerprint=lambda: "m")
        assert (bare.mpp_x, bare.mpp_y, bare.levels[0].tile_width) == (None, None, 256)


@pytest.mark.parametrize(
    "change",
    [
        {"extent": {"x": 0, "y": 80}}, {"extent": {"x": 2**40, "y": 80}}, {"extent": {"x": "100", "y": 80}},
        {"extent": None}, {"levels": []}, {"levels": None}, {"levels": [{}]}, {"levels": SAID["levels"] * 65},
        {"levels": [{"extent": {"x": 50, "y": 80}}]}, {"channel_depth": 16},
        {"levels": [*SAID["levels"], {"extent": {"x": 101, "y": 80}}]},
    ],
)  # fmt: skip
def test_descriptions_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    """Sizes that are none, levels that contradict the slide, and depths that would lose what they say."""
    with pytest.raises(SlideDamaged, match="description of the slide"):
        parse_slide_info(SAID | change, uri="u", fingerprint=lambda: "m")


OLD = {
    "slide_id": "m", "storage_type": "fs",
    "storage_addresses": [
        {"address": "/data/b.svs", "main_address": False}, {"address": "/data/a.svs", "main_address": True},
    ],
}  # fmt: skip
NEW = {
    "slide_id": "m",
    "main_storage_address": {"storage_address_id": "1", "path": "/data/a.svs"},
    "secondary_storage_addresses": [],
}


@pytest.mark.parametrize("said", [OLD, NEW])
def test_a_storage_mapper_of_either_generation_is_recognised(web: FakeService, said: dict[str, object]) -> None:
    """Its address names no pictures: the error says what it is, and where the slide lies."""
    web.storage = {"m": said}
    assert storage_path(said) == "/data/a.svs"
    with pytest.raises(StorageError, match=r"is a storage mapper.*/data/a\.svs"):
        open_slide(at(web, "m"))
    with pytest.raises(SlideNotFound, match="no such slide"):
        open_slide(at(web, "none"))
    assert storage_path([]) == storage_path({"storage_addresses": [3]}) == ""
