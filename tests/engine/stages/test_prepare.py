"""When an earlier result still answers the question, and what is tidied up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.stages import workdir
from wsi_mmm.engine.stages.prepare import published_before, region_hash
from wsi_mmm.engine.units import SlideTask
from wsi_mmm.errors import OutputError


@pytest.fixture
def task(tmp_path: Path) -> SlideTask:
    return SlideTask("s", "s.svs", str(tmp_path), Recipe("default", "hash", (), 0.5, 256, 0))


def publish(task: SlideTask, **facts: str) -> None:
    """Leave the slide.json that a finished run of ``task`` leaves."""
    known = {"fingerprint": "f", "result_hash": task.result_hash(), "region": region_hash(task), "status": "done"}
    (Path(task.output) / "slide.json").write_text(json.dumps(known | facts))


def answered(task: SlideTask) -> bool:
    return published_before(task, "f") is not None


def test_the_same_question_is_answered_once(task: SlideTask) -> None:
    """A finished result of the same recipe is taken as it is; a partial one is not."""
    publish(task)
    assert answered(task)
    publish(task, status="partial")
    assert not answered(task)


def test_a_corrected_mpp_is_another_question(task: SlideTask) -> None:
    """What the user says of a slide's own pixel counts, in the result and in the cache below it."""
    publish(task)
    assert not answered(replace(task, mpp=0.25))
    assert task.scratch != replace(task, mpp=0.25).scratch
    assert task.recipe.forward_hash("cpu", (1.0, 1.0)) != task.recipe.forward_hash("cpu", (2.0, 2.0))


def test_an_edited_mask_is_another_question(task: SlideTask, tmp_path: Path) -> None:
    """The content of the file that says where to look counts, not where it lies."""
    mask = tmp_path / "mask.geojson"
    mask.write_text("{}")
    masked = replace(task, mask=str(mask))
    publish(task)
    assert not answered(masked)
    publish(masked)
    assert answered(masked)
    assert answered(replace(task, mask=str(mask.rename(tmp_path / "moved.geojson"))))
    (tmp_path / "moved.geojson").write_text('{"type": "FeatureCollection"}')
    assert not answered(replace(task, mask=str(tmp_path / "moved.geojson")))


def test_results_of_another_slide_are_not_replaced(task: SlideTask) -> None:
    """Two slides of one name, run apart into one folder: OutputError, not a mixture."""
    publish(task, fingerprint="other")
    with pytest.raises(OutputError, match="another slide"):
        answered(task)


def test_a_published_slide_leaves_no_scratch_and_others_notice(task: SlideTask) -> None:
    """Even the empty folders go; a run that still needs them says so in place of reading blanks."""
    unit = Path(task.scratch) / "cache" / "maps"
    unit.mkdir(parents=True)
    (unit / "0").write_bytes(b"x")
    Path(workdir.plan_uri(task)).write_bytes(b"x")
    workdir.check_kept(task)
    workdir.remove_scratch(task)
    assert list(Path(task.output).iterdir()) == []
    with pytest.raises(OutputError, match="another run"):
        workdir.check_kept(task)


def test_what_a_killed_run_was_writing_is_tidied_up(task: SlideTask, tmp_path: Path) -> None:
    """Half files beside the results go; results and files of others stay."""
    for name in (".result.geojson.gz.x1y2", ".slide.json.ab_c", "result.geojson.gz", ".hidden", ".work"):
        (tmp_path / name).touch()
    workdir.remove_half_written(task)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", ".work", "result.geojson.gz"]
    workdir.remove_half_written(replace(task, output=str(tmp_path / "not yet there")))
