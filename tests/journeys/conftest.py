"""One quiet run of the default model over the tiny slide, which the other runs are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

import wsi_mmm
from wsi_mmm.api import RunReport


@pytest.fixture(scope="session")
def quiet_run(tiny_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunReport]:
    """The slide's result folder and the report of a run in this process with every default."""
    output = tmp_path_factory.mktemp("quiet")
    report = wsi_mmm.run(tiny_slide, output=output)
    [row] = report.slides
    assert row.status == "done", row.error
    return output / row.id, report


@pytest.fixture(scope="session")
def quiet_bytes(quiet_run: tuple[Path, RunReport]) -> bytes:
    """The GeoJSON of the quiet run, as it lies on disk."""
    return (quiet_run[0] / "result.geojson.gz").read_bytes()
