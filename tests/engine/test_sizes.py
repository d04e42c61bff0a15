"""Largest slides first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from helpers.plans import plan_of
from wsi_mmm.engine.sizes import largest_first, sizes_of


def test_many_workers_get_the_largest_slide_first(tmp_path: Path) -> None:
    """By the size of the file; one that is not there comes last. In one process the order stays as given."""
    base = plan_of(300, 300, 2, 8, 1.0, 0).slide
    tasks = []
    for name, size in (("small", 10), ("gone", None), ("big", 1000), ("middle", 100)):
        path = tmp_path / name
        if size is not None:
            path.write_bytes(b"x" * size)
        tasks.append(replace(base, id=name, uri=str(path)))
    many, one = SimpleNamespace(client=object()), SimpleNamespace()
    assert [task.id for task in largest_first(tasks, many)] == ["big", "middle", "small", "gone"]
    assert largest_first(tasks, one) == tasks


def test_slides_in_a_bucket_are_weighed_by_one_listing(monkeypatch) -> None:
    """Where a few lie in one place; a single one is not worth a request."""
    asked = []

    def listed(place: str) -> dict[str, int]:
        asked.append(place)
        return {f"{place}/{n}.svs": n for n in range(9)}

    monkeypatch.setattr("wsi_mmm.storage.store.list_sizes", listed)
    many = [f"s3://b/study/{n}.svs" for n in range(5)]
    assert sizes_of([*many, "s3://b/else/1.svs"])[many[4]] == 4
    assert asked == ["s3://b/study"]
