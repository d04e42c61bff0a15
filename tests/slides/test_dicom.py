"""DICOM folders: one slide per series."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from wsi_mmm.inputs import expand_inputs
from wsi_mmm.slides.dicom import one_per_series, series_of


def dicom(path: Path, series: str) -> str:
    """A file that begins as DICOM does, with a SeriesInstanceUID."""
    path.parent.mkdir(parents=True, exist_ok=True)
    attribute = b"\x20\x00\x0e\x00UI" + len(series).to_bytes(2, "little") + series.encode()
    path.write_bytes(bytes(128) + b"DICM" + bytes(300) + attribute + bytes(50))
    return str(path)


def test_a_series_counts_once_in_each_folder(tmp_path: Path) -> None:
    """Levels of one series are one slide; another series, another folder and other formats stay; the order is kept."""
    a, b = dicom(tmp_path / "x" / "a.dcm", "1.2.3"), dicom(tmp_path / "x" / "b.dcm", "1.2.3")
    c, d = dicom(tmp_path / "x" / "c.dcm", "1.2.4"), dicom(tmp_path / "y" / "a.dcm", "1.2.3")
    assert one_per_series([a, "x/s.svs", b, c, d]) == [a, "x/s.svs", c, d]


def test_what_is_no_dicom_is_kept(tmp_path: Path) -> None:
    """Files without a series are not taken for one another: opening them says what is wrong with each."""
    for name in ("a.dcm", "b.dcm"):
        (tmp_path / name).write_bytes(b"nothing")
    paths = [str(tmp_path / "a.dcm"), str(tmp_path / "b.dcm"), str(tmp_path / "gone.dcm")]
    assert one_per_series(paths) == paths


def test_a_folder_of_dicom_files_is_listed_by_series(real_data: Any, tmp_path: Path) -> None:
    """Two real files of two series, one of them there twice, are two slides."""
    for name in ("multi_frame_jpeg_camelyon_challenge_image.dcm", "multi_frame_jpeg2000_camelyon_challenge_image.dcm"):
        shutil.copy(real_data.file(f"dicom/{name}"), tmp_path / name)
    shutil.copy(tmp_path / "multi_frame_jpeg_camelyon_challenge_image.dcm", tmp_path / "z-again.dcm")
    assert series_of(tmp_path / "z-again.dcm")
    assert len(expand_inputs([tmp_path])) == 2
