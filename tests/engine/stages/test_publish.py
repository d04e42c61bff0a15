"""A slide is published once and whole, whenever the tidying up afterwards is cut short."""

from __future__ import annotations

from pathlib import Path

import pytest

import wsi_mmm
from wsi_mmm.errors import TransientCause, TransientError
from wsi_mmm.storage import store


def left(folder: Path) -> list[Path]:
    """Files of a slide's works that are still there."""
    return [path for path in folder.rglob("*") if ".work" in path.parts and path.is_file()]


def test_tidying_up_that_fails_does_not_fail_the_slide(
    tiny_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan is removed, then the storage fails once: the next try finds the results, tidies up, and all is well."""
    delete, calls = store.delete, list[str]()

    def fails_once(uri: str) -> None:
        if ".work" in uri:
            calls.append(uri)
            if len(calls) == 2:
                raise TransientError(f"{uri}: away", TransientCause.OVERLOADED)
        delete(uri)

    monkeypatch.setattr(store, "delete", fails_once)
    [row] = wsi_mmm.run(tiny_slide, output=tmp_path, tasks=["stain"]).slides
    assert len(calls) > 2, "nothing failed"
    assert row.status == "done", row.error
    assert row.extra["classes"] and left(tmp_path) == []


def test_what_a_dead_run_left_is_removed_by_the_next(tiny_slide: Path, tmp_path: Path) -> None:
    """Results are kept; the rest of its works goes, unless a plan says that somebody is at it."""
    [row] = wsi_mmm.run(tiny_slide, output=tmp_path, tasks=["stain"]).slides
    part = tmp_path / row.id / ".work" / "hash" / "part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"left")
    [again] = wsi_mmm.run(tiny_slide, output=tmp_path, tasks=["stain"]).slides
    assert again.extra["resumed"] and left(tmp_path) == []
