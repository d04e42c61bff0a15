"""Who takes part in `make bench-read`: ours, what users would pick instead, and the limit. Each used as it is fastest.

A contestant is a context manager: entering opens its handles (not timed), what it yields reads every tile of a job and
hands it to a sink. Its imports are in its function: a peer that is not installed is left out, with the reason.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from wsi_mmm.slides import open_slide
from wsi_mmm.slides.base import Reader
from wsi_mmm.tiles.stream import stream
from wsi_mmm.types import I64, U8, Grid

CHUNK = 16  # tiles a thread takes at a time
Sink = Callable[[int, Any], None]  # position of the first tile in the job, uint8[k, size, size, 3]
Run = Callable[[Sink], None]


class NotForThisError(Exception):
    """The contestant cannot do this job; the text says why."""


@dataclass(frozen=True, slots=True)
class Job:
    """Tiles ``index`` of ``grid`` in the order of blocks; ``boxes`` int64[n, 4] (x, y, width, height), level-0 px."""

    path: str
    grid: Grid
    index: I64
    boxes: I64
    block_tiles: int = 8

    @property
    def native(self) -> bool:
        """Whether target px are level-0 px."""
        return self.grid.scale_x == self.grid.scale_y == 1.0


Contestant = Callable[[Job, int], Any]  # -> context manager of Run


def in_threads(handles: Sequence[Any], read: Callable[[Any, I64], U8], job: Job, sink: Sink) -> None:
    """Call ``read(handle, box)`` for every box, one thread per handle; a thread takes a few tiles at a time."""
    todo = itertools.count(0, CHUNK)
    broken: list[BaseException] = []

    def work(handle: Any) -> None:
        try:
            for start in iter(lambda: next(todo), None):
                if start >= len(job.boxes):
                    return
                for i in range(start, min(start + CHUNK, len(job.boxes))):
                    sink(i, read(handle, job.boxes[i])[None])
        except Exception as error:  # noqa: BLE001  (raised below, in the main thread)
            broken.append(error)

    threads = [threading.Thread(target=work, args=(handle,)) for handle in handles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if broken:
        raise broken[0]


def resized(pixels: Any, job: Job) -> U8:
    """RGB of a region, resized by Pillow where the job is not at level 0."""
    from PIL import Image

    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if not job.native:
        picture = picture.resize((job.grid.tile, job.grid.tile), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def streamed(reader: Reader, job: Job, threads: int) -> Run:
    """The way a user reads: batches of the stream."""

    def run(sink: Sink) -> None:
        at = 0
        for batch in stream(reader, job.grid, job.index, block_tiles=job.block_tiles, batch_size=64, workers=threads):
            if batch.failed.any():
                raise RuntimeError("some tiles could not be read")
            sink(at, batch.pixels)
            at += len(batch.pixels)

    return run


@contextmanager
def ours(job: Job, threads: int) -> Iterator[Run]:
    """A reader of its own each time."""
    with open_slide(job.path) as slide:
        yield streamed(slide.reader, job, threads)


@contextmanager
def by_openslide(job: Job, threads: int) -> Iterator[Run]:
    import openslide

    def read(slide: Any, box: I64) -> U8:
        x, y, width, height = box.tolist()
        return resized(slide.read_region((x, y), 0, (width, height)).convert("RGB"), job)

    with ExitStack() as stack:
        handles = [stack.enter_context(openslide.OpenSlide(job.path)) for _ in range(threads)]
        yield lambda sink: in_threads(handles, read, job, sink)


@contextmanager
def by_tiffslide(job: Job, threads: int) -> Iterator[Run]:
    import tiffslide

    def read(slide: Any, box: I64) -> U8:
        x, y, width, height = box.tolist()
        return resized(slide.read_region((x, y), 0, (width, height), as_array=True), job)

    with ExitStack() as stack:
        handles = [stack.enter_context(closing(tiffslide.TiffSlide(job.path))) for _ in range(threads)]
        yield lambda sink: in_threads(handles, read, job, sink)


@contextmanager
def by_fastslide(job: Job, threads: int) -> Iterator[Run]:
    import fastslide

    def read(slide: Any, box: I64) -> U8:
        x, y, width, height = box.tolist()
        return resized(slide.read_region((x, y), 0, (width, height)).numpy(), job)

    handles = [fastslide.FastSlide.from_file_path(job.path) for _ in range(threads)]
    yield lambda sink: in_threads(handles, read, job, sink)


@contextmanager
def by_pyvips(job: Job, threads: int) -> Iterator[Run]:
    """Regions of a libvips image: the way without a pipeline per tile. OpenSlide's loader where libtiff's fails."""
    import pyvips

    def opened() -> Any:
        try:
            return pyvips.Region.new(pyvips.Image.tiffload(job.path, page=0))
        except pyvips.Error:
            return pyvips.Region.new(pyvips.Image.openslideload(job.path, level=0))

    def read(region: Any, box: I64) -> U8:
        x, y, width, height = box.tolist()
        pixels = np.frombuffer(region.fetch(x, y, width, height), np.uint8).reshape(height, width, -1)
        return resized(pixels[..., :3], job)

    handles = [opened() for _ in range(threads)]
    yield lambda sink: in_threads(handles, read, job, sink)


@contextmanager
def by_dlup(job: Job, threads: int) -> Iterator[Run]:
    """dlup with its quickest backend, FastSlide, and without its filter, which blurs at the slide's own resolution."""
    from dlup import SlideImage
    from dlup._image import Resampling
    from dlup.backends import FastSlideSlide

    def read(slide: Any, box: I64) -> U8:
        x, y, width, height = box.tolist()
        return resized(slide.read_region((x, y), 1.0, (width, height)).to_numpy()[..., :3], job)

    handles = [
        SlideImage.from_file_path(job.path, backend=FastSlideSlide, interpolator=Resampling.NEAREST)
        for _ in range(threads)
    ]
    yield lambda sink: in_threads(handles, read, job, sink)


@contextmanager
def by_cucim(job: Job, threads: int) -> Iterator[Run]:
    """cuCIM's own loader: batches of regions read by its threads, on the CPU."""
    from cucim import CuImage

    image = CuImage(job.path)
    places, size = [tuple(xy) for xy in job.boxes[:, :2].tolist()], tuple(job.boxes[0, 2:].tolist())

    def run(sink: Sink) -> None:
        at = 0
        for batch in image.read_region(places, size, level=0, batch_size=64, num_workers=threads):
            pixels = np.asarray(batch)
            pixels = pixels if pixels.ndim == 4 else pixels[None]
            sink(at, pixels)
            at += len(pixels)

    yield run


@contextmanager
def by_async_tiff(job: Job, threads: int) -> Iterator[Run]:
    """Native tiles, fetched through obstore and decoded by its pool: only for jobs on the tile grid."""
    import async_tiff
    from obstore.store import LocalStore

    folder, _, name = os.path.abspath(job.path).rpartition("/")
    store, pool = LocalStore(folder or "/"), async_tiff.ThreadPool(threads)

    async def opened() -> Any:
        return await async_tiff.TIFF.open(name, store=store)

    tiff = asyncio.run(opened())
    check_aligned(job, tiff.ifds[0].tile_width, tiff.ifds[0].tile_height)
    places = [(x // job.grid.tile, y // job.grid.tile) for x, y in job.boxes[:, :2].tolist()]

    async def batch(some: list[tuple[int, int]]) -> list[Any]:
        return await asyncio.gather(*(tile.decode(pool=pool) for tile in await tiff.fetch_tiles(some, 0)))

    async def everything(sink: Sink) -> None:
        starts = range(0, len(places), 64)
        ahead = asyncio.create_task(batch(places[:64]))
        for start in starts:
            now, ahead = ahead, asyncio.create_task(batch(places[start + 64 : start + 128]))
            for i, tile in enumerate(await now):
                sink(start + i, np.asarray(tile)[None])
        await ahead

    yield lambda sink: asyncio.run(everything(sink))


def check_aligned(job: Job, width: int, height: int) -> None:
    """Refuse a job whose tiles are not the native ones."""
    if not job.native or (job.boxes % (width, height, width, height)).any() or job.grid.tile != width:
        raise NotForThisError(f"the tiles are not the slide's native {width} x {height} px tiles")


@dataclass(frozen=True, slots=True)
class NativeTiles:
    """Where the JPEG tiles of level 0 lie, and what to put before each."""

    width: int
    height: int
    columns: int
    offsets: Sequence[int]
    counts: Sequence[int]
    head: bytes

    def under(self, boxes: I64) -> list[int]:
        """The numbers of the tiles under ``boxes``, each once, row-major within a box."""
        found: dict[int, None] = {}
        for x, y, width, height in boxes.tolist():
            for row in range(y // self.height, -(-(y + height) // self.height)):
                for column in range(x // self.width, -(-(x + width) // self.width)):
                    number = row * self.columns + column
                    if column < self.columns and number < len(self.offsets):
                        found[number] = None
        return list(found)


def native_tiles(path: str, *, jpeg: bool = True) -> NativeTiles:
    """The tile table of level 0 of a TIFF. Raises NotForThisError where there are no JPEG tiles."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        if not page.is_tiled or (jpeg and page.compression != 7):
            raise NotForThisError("the slide's native tiles are not JPEG")
        ycc = b"\x01" if page.photometric == 6 else b"\x00"
        tables = (page.jpegtables or b"\xff\xd8\xff\xd9")[2:-2]
        head = b"\xff\xd8\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + ycc + tables
        columns = -(-page.imagewidth // page.tilewidth)
        return NativeTiles(
            page.tilewidth, page.tilelength, columns, list(page.dataoffsets), list(page.databytecounts), head
        )


@contextmanager
def the_limit(job: Job, threads: int) -> Iterator[Run]:
    """The bytes of every native tile under the job, each read and decoded once, at half scale where that is enough."""
    import simplejpeg

    tiles = native_tiles(job.path)
    shrink = 2 if min(job.grid.scale_x, job.grid.scale_y) >= 2 else 1
    numbers = tiles.under(job.boxes)
    side = tiles.height // shrink, tiles.width // shrink
    file = os.open(job.path, os.O_RDONLY)

    def read(handle: int, box: I64) -> U8:
        number = int(box[0])
        data = os.pread(handle, tiles.counts[number], tiles.offsets[number])
        return simplejpeg.decode_jpeg(tiles.head + data[2:], min_height=side[0], min_width=side[1], min_factor=shrink)

    table = Job(job.path, job.grid, job.index, np.array(numbers, np.int64)[:, None])
    try:
        yield lambda sink: in_threads([file] * threads, read, table, sink)
    finally:
        os.close(file)


PEERS: dict[str, Contestant] = {
    "openslide-python": by_openslide,
    "tiffslide": by_tiffslide,
    "fastslide": by_fastslide,
    "pyvips": by_pyvips,
    "dlup": by_dlup,
    "cucim (CPU)": by_cucim,
    "async-tiff": by_async_tiff,
}
OURS, LIMIT = "wsi-mmm", "decode limit"
