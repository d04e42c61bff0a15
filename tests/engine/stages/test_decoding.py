"""Where tiles are decoded: the rule, what names the values, and what reports say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.stages import decoding, steps, workdir
from wsi_mmm.engine.stages.decoding import Choice, Rates, choose, judged
from wsi_mmm.engine.units import SlideTask
from wsi_mmm.errors import ModelError, OptionError
from wsi_mmm.model.device_decode import DeviceDecoder
from wsi_mmm.slides.base import EncodedReader
from wsi_mmm.slides.registry import READERS
from wsi_mmm.storage import store
from wsi_mmm.types import Tiles

RECIPE = Recipe("m", "h", (), 0.5, 256, 0, device="cuda")
TILES = Tiles(np.array([[x, y] for y in (0, 256) for x in (0, 256, 512)]), 256, 1.0, 1.0)


def a_reader(path: Path, name: str = "tiff") -> EncodedReader:
    """The TIFF reader of a slide, or another."""
    return READERS[name](str(path))  # type: ignore[return-value]


def never(reader: EncodedReader, tiles: Tiles) -> Rates:
    """A measurement that must not be made."""
    raise AssertionError("measured")


@pytest.mark.parametrize(("cpu", "device", "on"), [(100, 119, "cpu"), (100, 121, "device"), (100, 20, "cpu")])
def test_the_device_must_be_clearly_faster(cpu: float, device: float, on: str) -> None:
    """By a fifth; both figures are said."""
    choice = judged(Rates(cpu, device))
    assert choice.on == on
    assert choice.words.endswith(f": {cpu} tiles/s by the CPU, {device} with the device")


def test_auto_takes_what_was_measured_on_cuda(tiny_slide: Path) -> None:
    """A pretend measurement, once this way and once that."""
    for rates, on in ((Rates(1000, 4000), "device"), (Rates(1000, 900), "cpu")):
        assert choose(RECIPE, a_reader(tiny_slide), TILES, lambda *_, rates=rates: rates).on == on


def test_auto_measures_nothing_elsewhere(tiny_slide: Path) -> None:
    """On a CPU, for what is not handed over, beside a cache of tiles, or when told."""
    reader = a_reader(tiny_slide)
    assert choose(replace(RECIPE, device="cpu"), reader, TILES, never) == Choice()
    assert choose(replace(RECIPE, decode="cpu"), reader, TILES, never).on == "cpu"
    assert choose(replace(RECIPE, decode="device"), reader, TILES, never).on == "device"
    assert "cached" in choose(replace(RECIPE, cache="/c", cache_tiles="on"), reader, TILES, never).words
    other = choose(replace(RECIPE, decode="device"), a_reader(tiny_slide, "openslide"), TILES, never)
    assert other == Choice("cpu", "decoded on the CPU: the reader 'openslide' does not hand over compressed tiles")
    coarse = choose(RECIPE, reader, replace(TILES, scale_x=9.0, scale_y=9.0), never)
    assert coarse == Choice("cpu", "decoded on the CPU: coarser than 1/4 of the slide")
    assert choose(RECIPE, reader, replace(TILES, xy=TILES.xy[:0]), never).on == "cpu"


def test_auto_stays_on_the_cpu_where_the_device_has_no_decoder(tiny_slide: Path) -> None:
    """And says what is missing."""

    def missing(reader: EncodedReader, tiles: Tiles) -> Rates:
        raise ModelError("this torchvision decodes no JPEG")

    choice = choose(RECIPE, a_reader(tiny_slide), TILES, missing)
    assert choice == Choice("cpu", "decoded on the CPU: this torchvision decodes no JPEG")


def test_measuring_reads_the_same_tiles_both_ways(tiny_slide: Path) -> None:
    """Here with the CPU's decoder; the bytes are fetched once, before."""
    reader = a_reader(tiny_slide)
    rates = decoding.measure(reader, TILES, DeviceDecoder(torch.device("cpu")))
    assert rates.cpu > 0 and rates.device > 0
    assert reader.stats().tiles_decoded >= 2 * len(TILES.xy)


def test_what_a_device_decoded_has_another_name(tiny_slide: Path) -> None:
    """Of values and, when asked for, of results; with the CPU both are what they were before there was a choice."""
    scale = (1.0, 1.0)
    assert RECIPE.forward_hash("cuda", scale, "device") != RECIPE.forward_hash("cuda", scale)
    asked = replace(RECIPE, decode="device")
    assert asked.result_hash() != RECIPE.result_hash() == replace(RECIPE, decode="cpu").result_hash()


@pytest.mark.parametrize(("decode", "found"), [("cpu", False), ("auto", True)])
def test_results_of_a_device_are_not_taken_for_those_of_the_cpu(decode: str, found: bool, tmp_path: Path) -> None:
    """When the CPU is asked for; "auto" is content with either."""
    task = SlideTask("s", "s", str(tmp_path), replace(RECIPE, decode=decode))
    facts = {"fingerprint": "f", "result_hash": task.result_hash(), "region": "", "status": "done", "decode": "device"}
    store.write_bytes(store.join(task.output, "slide.json"), steps.json.dumps(facts).encode())
    assert (steps.published(task, "f", "") is not None) is found


def test_a_slide_that_was_begun_keeps_its_choice(tmp_path: Path) -> None:
    """A second measurement might say otherwise and the work done be lost; told where, it goes there."""
    from helpers.plans import plan_of

    plan = plan_of(500, 400, 2, 0, 0.8, 0)
    task = replace(plan.slide, output=str(tmp_path), recipe=replace(plan.slide.recipe, device="cuda"))
    kept = Choice("device", "measured")
    workdir.save_plan(replace(plan, slide=task, decode=kept))
    assert steps._kept_choice(task) == kept
    assert workdir.load_plan(task)[2] == kept
    assert steps._kept_choice(replace(task, recipe=replace(task.recipe, decode="cpu"))) is None
    assert steps._kept_choice(replace(task, output=str(tmp_path / "other"))) is None


def test_wrong_words_are_refused() -> None:
    """In one line each."""
    with pytest.raises(OptionError, match="decode is auto, cpu or device, not 'gpu'"):
        replace(RECIPE, decode="gpu")
    with pytest.raises(OptionError, match="drop --cache-tiles on or --decode device"):
        replace(RECIPE, decode="device", cache="/c", cache_tiles="on")
