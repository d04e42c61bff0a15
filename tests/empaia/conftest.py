"""A platform that serves a small slide, the environment of the job on it, and the command that does the job."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.main import get_command
from typer.testing import CliRunner

from helpers.empaia_platform import FakePlatform, served
from helpers.wsi_service import described
from wsi_mmm.cli.main import app
from wsi_mmm.config import empaia_job
from wsi_mmm.empaia import app as job
from wsi_mmm.empaia.app import App, JobEnd, run_app
from wsi_mmm.empaia.transport import Patience
from wsi_mmm.engine.stages import context
from wsi_mmm.slides import open_slide
from wsi_mmm.slides.service import reader
from wsi_mmm.storage import retry
from wsi_mmm.tiles import tissue
from wsi_mmm.tiles.find import find_tissue
from wsi_mmm.types import U8, Mask

WSI_ID = "b10648a7-340d-43fc-a2d9-4d91cc86f33f"
ROIS = [f"1111111{i}-1111-4111-8111-111111111111" for i in range(9)]
QUICK = Patience(total=30.0, attempts=3, pause=0.01)

Start = Callable[..., FakePlatform]
Command = Callable[..., Result]


def run(**options: Any) -> JobEnd:
    """The app in this process, as `App` with these fields, not as patient as usual."""
    return run_app(empaia_job(), App(**options), patience=QUICK)


def posted(platform: FakePlatform, key: str) -> list[dict[str, Any]]:
    """The items of a collection that was posted as the output ``key``."""
    return platform.items[platform.outputs[key]["id"]]


def regions(*shapes: dict[str, Any]) -> dict[str, Any]:
    """A collection of regions of interest as an input."""
    items = [{"id": ROIS[i], "name": "roi", "reference_id": WSI_ID, **shape} for i, shape in enumerate(shapes)]
    return {"id": ROIS[-1], "type": "collection", "item_type": "rectangle", "items": items, "item_count": len(items)}


def rectangle(x: int, y: int, width: int, height: int) -> dict[str, Any]:
    """A rectangle as the platform writes it."""
    return {"type": "rectangle", "upper_left": [x, y], "width": width, "height": height}


@pytest.fixture
def start(tiny_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Serve a job over the tiny slide; its variables are this process's. ``inputs`` and the rest replace fields."""
    with platforms(tiny_slide, tmp_path, monkeypatch) as begin:
        yield begin


@contextmanager
def platforms(path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """What `start` gives, over the slide at ``path``."""
    with ExitStack() as stack:
        slide = stack.enter_context(open_slide(str(path)))

        def begin(*, inputs: dict[str, Any] | None = None, **told: Any) -> FakePlatform:
            given = {"slide": described(slide, WSI_ID), "regions": regions(rectangle(500, 300, 300, 200))}
            made = FakePlatform(inputs=given | (inputs or {}), slides={WSI_ID: slide}, **told)
            platform = stack.enter_context(served(made))
            for name, value in (
                ("APP_API", platform.job.api),
                ("JOB_ID", platform.job.id),
                ("TOKEN", platform.job.token),
            ):
                monkeypatch.setenv(f"EMPAIA_{name}", value)
            monkeypatch.setattr("tempfile.tempdir", str(temporary))
            return platform

        yield begin
        context.release(models=False)


@pytest.fixture(scope="session")
def published(tiny_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a standalone job that has done the slide and has posted nothing."""
    work = tmp_path_factory.mktemp("published") / "work"
    with pytest.MonkeyPatch.context() as patch, platforms(tiny_slide, work.parent, patch) as begin:
        platform = begin()
        assert run(folder=str(work)) == JobEnd("finalized") and platform.ends == ["finalize"]
        assert platform.refused == []
    (work / "posting.json").unlink()
    return work


@pytest.fixture
def half_done(published: Path, tmp_path: Path) -> str:
    """The same for one test: the job has died before it posted anything."""
    return str(shutil.copytree(published, tmp_path / "half-done"))


# These take half of the time of a job on a small slide, and give the same each time.
_made = functools.cache(get_command)
_decoded = functools.lru_cache(8)(reader.decode_picture)
_found = functools.lru_cache(8)(
    lambda data, shape, um_per_px: find_tissue(np.frombuffer(data, np.uint8).reshape(shape), um_per_px)
)


def _find_tissue(pixels: U8, um_per_px: float) -> Mask:
    found: Mask = _found(pixels.tobytes(), pixels.shape, um_per_px)
    return found.copy()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Command:
    """`wsi-mmm empaia run` in this process: not as patient as usual, telling its progress all the time, logging all."""
    caplog.set_level(logging.DEBUG)
    for name, value in (("since", None), ("proven", False)):  # storage has not failed yet, whatever other tests did
        monkeypatch.setattr(retry.process_outage, name, value)
    monkeypatch.setattr(job, "App", functools.partial(App, pause=0.0))
    monkeypatch.setattr(job, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr("typer.testing._get_command", _made)
    monkeypatch.setattr(reader, "decode_picture", _decoded)
    monkeypatch.setattr(tissue, "find_tissue", _find_tissue)

    def invoke(*words: str, patient: Patience = QUICK) -> Result:
        monkeypatch.setattr("wsi_mmm.empaia.client.Patience", lambda: patient)
        return CliRunner().invoke(app, ["empaia", "run", *words])

    return invoke
