"""Plots of figures against shares of the data."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsi_mmm.errors import MissingPackage, OutputError
from wsi_mmm.training.plot import Panel, draw_panels

PANELS = [
    Panel(title, "f1", {"scratch": {1: [0.1, 0.2], 100: [0.6]}, "joint": {1: [0.4, 0.5], 100: [0.7, 0.6]}})
    for title in ("tuned", "frozen", "more")
]


def test_panels_are_drawn_beside_each_other(tmp_path: Path) -> None:
    """Two in a row, a row for the third, every one with something in it; SVG beside it names the curves."""
    png, svg = draw_panels(tmp_path, "ways", PANELS, columns=2)
    with Image.open(png) as image:
        px = np.asarray(image.convert("L"))
    height, width = (side // 2 for side in px.shape)
    assert width > 500 and (px[:height, :width] < 128).any() and (px[height:, :width] < 128).any()
    assert all(word in svg.read_text() for word in ("scratch", "joint", "frozen"))


def test_what_is_in_the_way_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file where the folder should be, no matplotlib."""
    (tmp_path / "no").touch()
    with pytest.raises(OutputError, match=r"no/ways\.png: file exists; choose another folder"):
        draw_panels(tmp_path / "no", "ways", PANELS[:1], columns=1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackage, match="it needs matplotlib"):
        draw_panels(tmp_path, "ways", PANELS[:1], columns=1)
