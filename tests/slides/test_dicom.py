"""DICOM folders: one slide per series."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from wsi_mmm.inputs import expand_inputs
from wsi_mmm.slides import open_slide
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


def test_a_folder_s_index_and_other_objects_are_no_slides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A DICOMDIR names the series of its slides, and sorts before them; a report in the folder is none either."""
    slide, index, report = (
        Path(dicom(tmp_path / name, "1.2.3")) for name in ("I0000001", "DICOMDIR", "annotations.dcm")
    )
    for path, kind in ((slide, "5.1.4.1.1.77.1.6"), (index, "1.3.10"), (report, "5.1.4.1.1.91.1")):
        value = f"1.2.840.10008.{kind}".encode()
        data = bytearray(path.read_bytes())
        data[132 : 140 + len(value)] = b"\x02\x00\x02\x00UI" + len(value).to_bytes(2, "little") + value
        path.write_bytes(data)
    assert [Path(spec.uri).name for spec in expand_inputs([tmp_path])] == ["I0000001"]
    assert "2 DICOM of other kinds" in caplog.text


def test_real_slides_without_a_suffix_are_found(real_data: Any, tmp_path: Path) -> None:
    """As scanners and archives name them."""
    for number, name in enumerate(
        ("multi_frame_jpeg_camelyon_challenge_image.dcm", "multi_frame_jpeg2000_camelyon_challenge_image.dcm")
    ):
        shutil.copy(real_data.file(f"dicom/{name}"), tmp_path / f"1.2.840.{number}")
    assert [Path(spec.uri).name for spec in expand_inputs([tmp_path])] == ["1.2.840.0", "1.2.840.1"]
    for spec in expand_inputs([tmp_path]):
        with open_slide(spec.uri) as slide:
            assert slide.info.vendor == "dicom"


def test_a_folder_of_dicom_files_is_listed_by_series(real_data: Any, tmp_path: Path) -> None:
    """Two real files of two series, one of them there twice, are two slides."""
    for name in ("multi_frame_jpeg_camelyon_challenge_image.dcm", "multi_frame_jpeg2000_camelyon_challenge_image.dcm"):
        shutil.copy(real_data.file(f"dicom/{name}"), tmp_path / name)
    shutil.copy(tmp_path / "multi_frame_jpeg_camelyon_challenge_image.dcm", tmp_path / "z-again.dcm")
    assert series_of(tmp_path / "z-again.dcm")
    assert len(expand_inputs([tmp_path])) == 2
