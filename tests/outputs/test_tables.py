"""What is written of whole slides: the slides table and the attention of a slide's tiles."""

from __future__ import annotations

import csv
import io

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from wsi_mmm.outputs.overlay import attention_png, levels
from wsi_mmm.outputs.report import SlideRow, report_html
from wsi_mmm.outputs.tables import SLIDE_FACTS, slides_csv, slides_parquet
from wsi_mmm.types import Grid


def row(name: str, status: str = "done", **extra: object) -> SlideRow:
    return SlideRow(name, f"{name}.svs", status, None, 0.5, None if status == "failed" else 0.5, 4, 0, 0, 1.0, 4.0, 0.5,
                    10, 0, 1.0, extra)  # fmt: skip


ROWS = [
    row("b", answers={"grade": 'a "b", c', "grade:high": 0.25, "age": None}),
    row("broken", "failed"),
    row("a", answers={"grade": None, "grade:high": 1e-7, "age": None}),
]


def test_slides_keep_their_order_and_what_is_not_known_is_empty() -> None:
    """A slide that failed has its row; a column without any value is there and empty."""
    table = pq.read_table(io.BytesIO(slides_parquet(ROWS))).to_pydict()
    assert list(table) == [*SLIDE_FACTS, "grade", "grade:high", "age"]
    assert table["id"] == ["b", "broken", "a"]
    assert table["grade"] == ['a "b", c', None, None]
    assert table["grade:high"] == [0.25, None, 1e-7]
    assert table["age"] == [None] * 3
    lines = list(csv.DictReader(io.StringIO(slides_csv(ROWS).decode())))
    assert [line["grade"] for line in lines] == ['a "b", c', "", ""]
    assert [line["grade:high"] for line in lines] == ["0.25", "", "1e-07"]
    assert [line["mpp_effective"] for line in lines] == ["0.5", "", "0.5"]


def test_the_report_says_what_was_said_of_a_slide() -> None:
    """Escaped, with a dash for what is not known; nothing where no bag task was asked."""
    page = report_html({}, ROWS[:1]).decode()
    assert "Predictions for the slide" in page
    assert "<b>grade</b> a &quot;b&quot;, c" in page
    assert "<b>age</b> –" in page
    assert "Predictions for the slide" not in report_html({}, ROWS[1:2]).decode()


def test_attention_is_drawn_where_the_tiles_are() -> None:
    """The most heeded tile is yellow, the least violet; where there is no share or no tile the slide shows."""
    grid = Grid(tile=64, overlap=0, columns=3, rows=2, width=160, height=128, scale_x=2.0, scale_y=2.0, mpp=1.0)
    index = np.array([[0, 0], [0, 1], [1, 2]])
    png = attention_png(np.full((64, 80, 3), 255, np.uint8), grid, index, np.array([0.9, 0.1, np.nan], np.float32))
    shown = np.asarray(Image.open(io.BytesIO(png)))
    assert shown.shape == (64, 80, 3)
    assert (shown[32:] == 255).all() and (shown[:, 64:] == 255).all()
    yellow, violet = shown[16, 16].astype(int), shown[16, 48].astype(int)
    assert yellow[1] > 200 > yellow[2]
    assert violet[2] > violet[1]
    assert (shown[:32, :32] == shown[16, 16]).all()


def test_attention_is_ranked() -> None:
    """Equal shares are alike; one tile, or tiles that are all alike, stand out nowhere."""
    assert levels(np.array([0.1, 0.8, 0.1, 0.4], np.float32)).tolist() == [0.0, 1.0, 0.0, 0.6]
    assert levels(np.full(3, 0.2, np.float32)).tolist() == [0.0] * 3
    assert levels(np.zeros(0, np.float32)).shape == (0,)
