"""Several encoders in one pass over the pixels: the files of single runs, each tile read once, resumed one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wsi_mmm
from helpers.commands import invoke
from wsi_mmm import api
from wsi_mmm.engine.executors import wire
from wsi_mmm.engine.recipe import recipe_from_json
from wsi_mmm.engine.stages import forward
from wsi_mmm.errors import OptionError
from wsi_mmm.model.runner import Runner
from wsi_mmm.outputs.exports import read_features
from wsi_mmm.requests import encoder_folders
from wsi_mmm.slides.fake import synthetic_slide

NAMES = ["test_resnet", "test_efficientnet", "test_convnext"]
OPTIONS: dict[str, Any] = {"weights": "random", "tissue": "none", "tile_size": 64, "block_tiles": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sixteen tiles of 64 px in four blocks."""
    path = tmp_path_factory.mktemp("slide") / "s.tiff"
    synthetic_slide(path, 1, width=256, height=256, mpp=0.5, nuclei=20)
    return str(path)


@pytest.fixture(scope="module")
def single(slide: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each encoder embedded alone."""
    out = tmp_path_factory.mktemp("single")
    for name in NAMES:
        assert api.embed(slide, name, output=out / name, export="h5", **OPTIONS).exit_code == 0
    return out


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """``tiles`` read, and tiles computed by the name of the encoder, since the start of the test."""
    counts: dict[str, int] = {}
    read, begin = forward.read_block, Runner.begin

    def count_read(reader: Any, grid: Any, block: Any, fetched: Any = None) -> Any:
        counts["tiles"] = counts.get("tiles", 0) + len(block.index)
        return read(reader, grid, block, fetched)

    def count_begun(self: Runner, pixels: Any, tasks: Any = ()) -> Any:
        name = self.model.card.name
        counts[name] = counts.get(name, 0) + len(pixels)
        return begin(self, pixels, tasks)

    monkeypatch.setattr(forward, "read_block", count_read)
    monkeypatch.setattr(Runner, "begin", count_begun)
    return counts


def same_files(one: Path, other: Path) -> None:
    """Equal vectors, coordinates, attributes and slide.json."""
    mine, theirs = (read_features(str(place / "s" / "features.zarr")) for place in (one, other))
    assert mine.vectors.tobytes() == theirs.vectors.tobytes()
    assert np.array_equal(mine.coords, theirs.coords)
    assert mine.attributes == theirs.attributes
    assert (one / "s" / "slide.json").read_bytes() == (other / "s" / "slide.json").read_bytes()


@pytest.mark.parametrize("cache", [False, True])
def test_files_are_those_of_single_runs_and_tiles_are_read_once(
    slide: str, single: Path, tmp_path: Path, counted: dict[str, int], cache: bool
) -> None:
    """Bit for bit, exports too; nothing stays in the work folders; force computes all again, reading once."""
    more: dict[str, Any] = {"cache": tmp_path / "cache"} if cache else {}
    for force in (False, True):
        counted.clear()
        reports = wsi_mmm.embed_encoders(
            slide, NAMES[:2], output=tmp_path / "o", export="h5", force=force, **more, **OPTIONS
        )
        assert counted == {"tiles": 16, **dict.fromkeys(NAMES[:2], 16)}
        assert list(reports) == NAMES[:2]
        for name, report in reports.items():
            assert (report.exit_code, report.slides[0].tiles) == (0, 16)
            assert report.slides[0].extra["resumed"] is False
            same_files(tmp_path / "o" / name, single / name)
            assert (tmp_path / "o" / name / "s" / "features.h5").exists()
            assert not (tmp_path / "o" / name / "s" / ".work").exists()


def test_what_is_done_is_left_and_an_encoder_is_added(
    slide: str, single: Path, tmp_path: Path, counted: dict[str, int]
) -> None:
    """Whatever stands before or behind it in the list."""
    out = tmp_path / "o"
    api.embed(slide, NAMES[1], output=out / NAMES[1], **OPTIONS)
    counted.clear()
    wsi_mmm.embed_encoders(slide, NAMES, output=out, **OPTIONS)
    assert counted == {"tiles": 16, NAMES[0]: 16, NAMES[2]: 16}
    counted.clear()
    reports = wsi_mmm.embed_encoders(slide, NAMES[::-1], output=out, **OPTIONS)
    assert counted == {}
    assert all(report.slides[0].extra["resumed"] for report in reports.values())
    for name in NAMES:
        same_files(out / name, single / name)


def test_a_pass_that_was_cut_short_goes_on(
    slide: str, single: Path, tmp_path: Path, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended after the first encoder: the second has all its blocks, and reads nothing."""
    first, *_ = api.embed_requests(slide, NAMES[:2], output=tmp_path, **OPTIONS)
    assert api.execute(first).exit_code == 0
    assert not (tmp_path / NAMES[1] / "s" / "slide.json").exists()
    counted.clear()
    wsi_mmm.embed_encoders(slide, NAMES[:2], output=tmp_path, **OPTIONS)
    assert counted == {}
    same_files(tmp_path / NAMES[1], single / NAMES[1])


def test_an_encoder_that_raises_does_not_stop_the_others(
    slide: str, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own run says what is wrong; those before and behind it are as alone."""
    begin = Runner.begin

    def fail(self: Runner, pixels: Any, tasks: Any = ()) -> Any:
        if self.model.card.name == NAMES[1]:
            raise RuntimeError("out of memory")
        return begin(self, pixels, tasks)

    monkeypatch.setattr(Runner, "begin", fail)
    reports = wsi_mmm.embed_encoders(slide, NAMES, output=tmp_path, **OPTIONS)
    assert [report.exit_code for report in reports.values()] == [0, 4, 0]
    assert "out of memory" in str(reports[NAMES[1]].slides[0].error)
    for name in (NAMES[0], NAMES[2]):
        same_files(tmp_path / name, single / name)


def test_only_the_same_tiles_are_shared(slide: str, tmp_path: Path) -> None:
    """By the published list some have 256 px, some 224; one tile size makes one pass. A recipe travels with them."""
    requests = api.embed_requests(slide, ["kaiko-s16", "lunit-s16", "kaiko-s8"], output=tmp_path, weights="random")
    shared = [[one.model for _, one in request.recipe.companions] for request in requests]
    assert shared == [["kaiko-s8"], [], []]
    assert [request.recipe.after_others for request in requests] == [False, False, True]
    requests = api.embed_requests(slide, ["kaiko-s16", "lunit-s16"], output=tmp_path, weights="random", tile_size=256)
    recipe = requests[0].recipe
    assert [(place, one.model) for place, one in recipe.companions] == [(str(tmp_path / "lunit-s16"), "lunit-s16")]
    assert wire.recipe_json(recipe_from_json(recipe.to_json())) == wire.recipe_json(recipe)


def test_nothing_is_written_through_a_link(slide: str, tmp_path: Path) -> None:
    """The folder of a slide that leads away fails in its own run; the pass of the others leaves it out."""
    (tmp_path / "away").mkdir()
    (tmp_path / "o" / "dinov2-s").mkdir(parents=True)
    (tmp_path / "o" / "dinov2-s" / "s").symlink_to(tmp_path / "away")
    requests = api.embed_requests(slide, ["lunit-s16", "dinov2-s"], output=tmp_path / "o", weights="random")
    assert [len(request.recipe.companions) for request in requests] == [0, 0]
    assert "is a link that leads to" in requests[1].tasks[0].error


def test_the_command_takes_several(slide: str, single: Path, tmp_path: Path, counted: dict[str, int]) -> None:
    """Flags or a list in a settings file; one of them stays where it was."""
    said = ("--weights", "random", "--tissue", "none", "--tile-size", "64", "--device", "cpu")
    settings = tmp_path / "s.toml"
    settings.write_text("block_tiles = 2\n")
    encoders = ("--encoder", NAMES[0], "--encoder", NAMES[1])
    found = invoke("embed", slide, "-o", tmp_path / "o", *encoders, *said, "--config", settings)
    assert found.exit_code == 0, found.output
    assert counted["tiles"] == 16
    for name in NAMES[:2]:
        same_files(tmp_path / "o" / name, single / name)
    settings.write_text(f'block_tiles = 2\nencoder = ["{NAMES[0]}"]\n')
    assert invoke("embed", slide, "-o", tmp_path / "one", *said, "--config", settings).exit_code == 0
    same_files(tmp_path / "one", single / NAMES[0])


@pytest.mark.parametrize(
    ("encoders", "options", "words"),
    [
        (["a", "b"], {"pool": "cls"}, "are of one encoder"),
        (["a", "b"], {"weights": "w.safetensors"}, "are of one encoder"),
        (["uni", "uni"], {}, "'uni' and 'uni' would go to the same folder: embed them apart"),
        ([], {}, "is no list of encoders"),
        ("uni", {}, "is no list of encoders"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    slide: str, tmp_path: Path, encoders: Any, options: Any, words: str
) -> None:
    """Before anything is written."""
    with pytest.raises(OptionError, match=words):
        api.embed_requests(slide, encoders, output=tmp_path / "o", **options)
    assert not (tmp_path / "o").exists()


def test_folders_are_named_by_the_encoder() -> None:
    """The last part of a folder; owner and name of an id of the hub."""
    given = ["uni2-h", "hf-hub:MahmoodLab/UNI", "local-dir:/weights/mine", "s3://b/models/other/", "resnet50.a1_in1k"]
    assert encoder_folders(given) == ["uni2-h", "MahmoodLab-UNI", "mine", "other", "resnet50.a1_in1k"]
