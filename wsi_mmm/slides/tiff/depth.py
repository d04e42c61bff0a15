"""How many of its bits a slide of 16 bits uses: cameras give 8, 10, 12 or 14, which are nearly black out of 65535."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from wsi_mmm.slides.tiff.codecs import sample_reader
from wsi_mmm.slides.tiff.planes import PALETTE, Plane
from wsi_mmm.slides.tiff.samples import UndecodableError
from wsi_mmm.slides.tiff.tables import tile_fetcher
from wsi_mmm.storage.store import ByteStore

_USED = (8, 10, 12, 14, 16)
_TILES = 24  # native tiles of the finest level that are looked at
_MOST_PIXELS = 1 << 24  # in all of them


def with_used_bits(store: ByteStore, planes: Sequence[Plane], declared: int = 0) -> tuple[Plane, ...]:
    """Return the planes with their ``white``: of 16 bits the least that hold the slide's samples, and ``declared``.

    Raises StorageError, SlideDamaged.
    """
    top = planes[0]
    if top.bits != 16 or top.photometric == PALETTE:
        return tuple(planes)
    brightest = _brightest_sample(store, top)
    if brightest == 0:  # nothing to go by
        return tuple(planes)
    declared = declared if 8 <= declared <= 16 else 8
    white = next((1 << bits) - 1 for bits in _USED if bits >= declared and brightest < 1 << bits)
    return tuple(replace(plane, white=white) if plane.bits == 16 else plane for plane in planes)


def _brightest_sample(store: ByteStore, plane: Plane) -> int:
    """The largest sample of tiles spread over the slide; 0 when none can be decoded."""
    fetch = tile_fetcher(store, plane)
    if fetch is None:
        return 0
    total = plane.columns * plane.rows
    count = max(1, min(total, _TILES, _MOST_PIXELS // (plane.tile_width * plane.tile_height)))
    numbers = sorted({int(n) for n in np.linspace(0, total - 1, count)})
    read, brightest = sample_reader(plane), 0
    for number, data in fetch(numbers).items():
        with suppress(UndecodableError):
            brightest = max(brightest, int(read(bytes(data), plane.stored_rows(number))[0].max()))
    return brightest
