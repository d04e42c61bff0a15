"""What a manifest names never leads a run out of its output folder, whatever it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import wsi_mmm
from wsi_mmm.config import SlideSpec
from wsi_mmm.inputs import expand_inputs, safe_id

EVIL = [
    "../up",
    "/etc/passwd",
    "..",
    ".",
    "a/../../b",
    "a\\..\\b",
    "a\0b",
    "~root",
    "C:\\x",
    "report.json",
    "-rf",
    "a\nb",
    "\u202ex",
]


@pytest.mark.parametrize("name", EVIL)
def test_an_id_of_a_manifest_is_one_folder_in_the_output(name: str, tmp_path: Path) -> None:
    """Parents, absolute paths, NUL, drives, line breaks: each becomes one plain name."""
    [spec] = expand_inputs([SlideSpec("slide.svs", id=name)])
    place = tmp_path / spec.id
    assert place.parent == tmp_path and place.resolve().parent == tmp_path.resolve()
    assert spec.id not in (".", "..", "report.json") and not spec.id.startswith("~")


@given(st.text(max_size=300))
def test_any_text_becomes_one_component(text: str) -> None:
    """Of letters, digits and ``._-``, neither empty nor a step upwards."""
    name = safe_id(text)
    assert name and len(name) <= 130
    assert not set(name) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert name.strip(".") != ""


def test_a_manifest_of_evil_rows_fails_row_by_row(tmp_path: Path) -> None:
    """Every slide that cannot be read is one line of the report; nothing is written beside the output folder."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    rows = ["slide,id", *(f'"{name}","{name}"' for name in EVIL), '"no\0such.svs",plain']
    (inside / "m.csv").write_text("\n".join(rows), encoding="utf-8")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    report = wsi_mmm.run(inside / "m.csv", output=inside / "out", tasks="stain")
    assert all(row.status == "failed" and row.error and "\n" not in row.error for row in report.slides)
    assert len(report.slides) == len(EVIL) + 1
    after = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    assert [path for path in after if path not in before and "out" not in path.parts] == []


def test_a_link_in_the_output_folder_is_not_followed(tiny_slide: Path, tmp_path: Path) -> None:
    """A folder of results that is a link to somewhere else: that slide fails, nothing is written there."""
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    out.mkdir()
    (out / "tiny").symlink_to(elsewhere)
    [row] = wsi_mmm.run(tiny_slide, output=out, tasks="stain").slides
    assert row.status == "failed" and "is a link that leads to" in (row.error or "")
    assert list(elsewhere.iterdir()) == []


def test_an_output_folder_may_be_a_link_itself(tmp_path: Path) -> None:
    """Results on another disk: what the user names is followed."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    [row] = wsi_mmm.run(tmp_path / "none.svs", output=tmp_path / "out", tasks="stain").slides
    assert "no such file" in (row.error or "")
