"""Synthetic slides that tests of slides and storage share, and ways to damage them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from wsi_mmm.slides.fake import SyntheticNuclei, checkerboard_slide, synthetic_image, synthetic_slide
from wsi_mmm.slides.tiff.directories import read_directories, table
from wsi_mmm.storage.store import open_store
from wsi_mmm.types import U8


class Made(NamedTuple):
    """A synthetic slide on disk, its true nuclei, and its level 0 before compression."""

    path: Path
    truth: SyntheticNuclei
    image: U8


SIZE = {"width": 1100, "height": 820}


@pytest.fixture(scope="session")
def small_slide(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A JPEG slide 1100 x 820 px at 0.5 mpp with 60 nuclei, no multiple of its tiles; do not write to it."""
    path = tmp_path_factory.mktemp("small") / "small.tiff"
    truth = synthetic_slide(path, 3, mpp=0.5, nuclei=60, **SIZE)
    image, _ = synthetic_image(3, mpp=0.5, nuclei=60, **SIZE)
    return Made(path, truth, image)


class Board(NamedTuple):
    """A checkerboard slide and its level 0."""

    path: Path
    image: U8


@pytest.fixture(scope="session")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    """A lossless slide 3000 x 2200 px at 0.25 mpp, levels 1, 2, 4, 8; do not write to it."""
    path = tmp_path_factory.mktemp("board") / "board.tiff"
    return Board(path, checkerboard_slide(path))


@pytest.fixture
def copy_slide(small_slide: Made, tmp_path: Path) -> Path:
    """A copy of the small slide that the test may damage."""
    path = tmp_path / "copy.tiff"
    path.write_bytes(small_slide.path.read_bytes())
    return path


def tile_at(path: Path, level: int, number: int) -> tuple[int, int]:
    """Return offset and length of a native tile."""
    store = open_store(str(path))
    directory = read_directories(store)[level]
    offsets, counts = table(store, [directory] * 2, [324, 325])
    store.close()
    return int(offsets[number]), int(counts[number])


def overwrite(path: Path, at: int, data: bytes) -> None:
    """Change bytes of a file in place."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
