"""Every option once: its checks, its flag, its way to the run, the hashes it is in, and the table that shows it."""

from __future__ import annotations

import re
import subprocess
import sys
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.option_table import PAGE, page_with_table
from wsi_mmm import api
from wsi_mmm.engine.executors.tls import CA, CERTIFICATE, KEY
from wsi_mmm.engine.recipe import Recipe, recipe_from_json
from wsi_mmm.errors import OptionError
from wsi_mmm.options import OPTIONS, RUN_OPTIONS, RunKeywords, RunOptions, make_options, parse_size
from wsi_mmm.slides.registry import READERS

BASE = Recipe("m", "h", (), 0.5, 256, 0)
OTHER: dict[str, Any] = {
    "mpp": 0.75, "tile_size": 512, "overlap": 32, "tissue": "none", "regions": "r.geojson", "min_tissue": 0.5,
    "mpp_override": 0.3, "reader": "openslide", "scene": 1, "cache": "c", "cache_tiles": "off", "cache_quota": "50GB",
    "features": False, "save_maps": True, "gzip": False, "overlay": False, "bounds_offset": True, "batch_size": 3,
    "block_tiles": 2, "workers": 2, "threads": 1, "device": "cpu", "runtime": "bf16", "scheduler": "tls://h:1",
    "tls": "t", "placement": "pool", "force": True, "tiles": "t.h5",
    "allow_torchscript": True, "measure": "none",
}  # fmt: skip
"""A value of every option that is not its default."""


def recipe_with(name: str) -> Recipe:
    """The recipe with another value of one option, resolved as `requests` does."""
    fields = {"mpp": "mpp", "tile_size": "tile", "overlap": "overlap", "block_tiles": "block_tiles"}
    cache = {"cache": "c"} if name in ("cache_tiles", "placement") else {}
    recipe = replace(BASE, options=RunOptions(**{**cache, name: OTHER[name]}))
    return replace(recipe, **{fields[name]: OTHER[name]}) if name in fields else recipe


def test_every_option_has_a_value_to_try() -> None:
    """Python callers may give every one as a keyword; two have parameters of their own."""
    names = [option.name for option in RUN_OPTIONS]
    assert sorted(OTHER) == sorted(names)
    assert set(RunKeywords.__annotations__) == set(names) - {"workers", "scheduler"}
    assert all(option.default != OTHER[option.name] and option.help.endswith((".", ")")) for option in RUN_OPTIONS)
    assert len({option.name for option in OPTIONS}) == len(OPTIONS)


@pytest.mark.parametrize("option", RUN_OPTIONS, ids=lambda option: option.name)
def test_an_option_is_in_the_hashes_that_it_says(option: Any) -> None:
    """What a slide resolves (its reader, its own mpp) is hashed slide by slide."""
    other = recipe_with(option.name)
    within = set(option.affects) if option.per == "recipe" else set()
    kinds = {"base": "cpu", "other": "cuda"} if option.name == "device" else {"base": "cpu", "other": "cpu"}
    base_hash, other_hash = BASE.forward_hash(kinds["base"], (1, 1)), other.forward_hash(kinds["other"], (1, 1))
    assert (base_hash != other_hash) is ("values" in within)
    assert (BASE.result_hash() != other.result_hash()) is ("result" in within)
    assert (BASE.published() != other.published()) is ("result" in within)


def test_the_reader_and_the_scale_of_a_slide_count() -> None:
    """They are known when the slide has been opened."""
    assert BASE.result_hash("tiff") != BASE.result_hash("openslide")
    assert BASE.forward_hash("cpu", (1, 1), "tiff") != BASE.forward_hash("cpu", (1, 1), "openslide")
    assert BASE.forward_hash("cpu", (1, 1)) != BASE.forward_hash("cpu", (2, 2))


@pytest.mark.parametrize("name", [o.name for o in RUN_OPTIONS if o.per != "run"])
def test_a_recipe_travels_with_its_options(name: str) -> None:
    """As flat JSON, in which a report shows it too; where the run is done does not travel."""
    recipe = recipe_with(name)
    there = recipe_from_json(recipe.to_json())
    assert replace(there, options=RunOptions()) == replace(recipe, options=RunOptions())
    if name not in ("mpp", "tile_size", "overlap", "block_tiles"):
        assert there == recipe


@pytest.mark.parametrize("name", sorted(OTHER))
def test_every_option_of_the_api_reaches_the_request(name: str, in_tmp: Path) -> None:
    """Whatever is given to `run` is in the request, paths absolute, what slides and the cluster resolve there too."""
    given = {name: OTHER[name]} | ({"cache": "c"} if name in ("cache_tiles", "cache_quota", "placement") else {})
    given |= {"scheduler": OTHER["scheduler"]} if name == "tls" else {}
    (in_tmp / "t").mkdir()
    for file in (CA, CERTIFICATE, KEY):
        (in_tmp / "t" / file).touch()
    asked: dict[str, Any] = {"output": "out", **given}
    request = (
        api.embed_request("a.svs", **asked) if name == "tiles" else api.run_request("a.svs", tasks="stain", **asked)
    )
    found = getattr(request.recipe.options, name)
    expected = {
        "regions": str(in_tmp / "r.geojson"),
        "tiles": str(in_tmp / "t.h5"),
        "cache": str(in_tmp / "c"),
        "cache_quota": 50 * 10**9,
    }
    assert found == expected.get(name, OTHER[name])
    [task] = request.tasks
    resolved = {
        "mpp": request.recipe.mpp, "tile_size": request.recipe.tile, "overlap": request.recipe.overlap,
        "block_tiles": request.recipe.block_tiles, "mpp_override": task.mpp,
    }  # fmt: skip
    assert resolved.get(name, OTHER[name]) == OTHER[name]
    assert (request.tls is not None) is (name == "tls")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"block_tiles": 65}, "block_tiles must be between 1 and 64, not 65"),
        ({"cache_tiles": "yes", "cache": "c"}, "cache_tiles is auto, on or off, not 'yes'"),
        ({"cache_tiles": True}, "name a folder with --cache"),
        ({"cache_quota": "many"}, "'many' is no size"),
        ({"runtime": "jit"}, "runtime is auto, eager, compile, bf16, fp16 or onnx, not 'jit'"),
        ({"placement": "pool"}, "name it with --cache"),
        ({"mpp": 0}, "mpp 0.0 is not possible"),
        ({"mpp_override": float("nan")}, "mpp_override nan is not possible"),
    ],
)
def test_a_wrong_value_is_named(given: RunKeywords, words: str) -> None:
    """One line that says what the option must be."""
    with pytest.raises(OptionError) as caught:
        make_options(given)
    assert words in str(caught.value)


def test_values_become_plain(in_tmp: Path) -> None:
    """Whole numbers are numbers, paths are text, None is the default."""
    options = make_options({"mpp": 1, "tissue": Path("t.png"), "cache": Path("c"), "cache_tiles": True, "gzip": None})
    assert (options.mpp, options.tissue, options.cache_tiles, options.gzip) == (1.0, "t.png", "on", True)
    assert isinstance(options.mpp, float)


@pytest.mark.parametrize(
    ("text", "size"), [("50GB", 50 * 10**9), ("1.5 TiB", 3 * 2**39), ("200000", 200_000), ("7mb", 7_000_000), (9, 9)]
)
def test_sizes_in_words(text: str | int, size: int) -> None:
    """Decimal and binary units, with or without a space."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "12 parsecs", "1e9"])
def test_other_words_are_no_size(text: str) -> None:
    """The error names the way to write it."""
    with pytest.raises(OptionError, match="such as 50GB"):
        parse_size(text)


def test_types_say_what_the_record_holds() -> None:
    """Each option that a caller may leave out may be None; its own type is among those that a caller may give."""
    given = typing.get_type_hints(RunKeywords)
    for option in RUN_OPTIONS:
        if option.name in given:
            kinds = {type(value) for hint in typing.get_args(given[option.name]) for value in typing.get_args(hint)}
            assert type(None) in typing.get_args(given[option.name])
            assert option.value_type in {*typing.get_args(given[option.name]), *kinds}


def test_readers_named_in_the_help_exist() -> None:
    """The registry may know more, from plug-ins."""
    [text] = [option.help for option in RUN_OPTIONS if option.name == "reader"]
    assert {"tiff", "openslide", "tiffslide"} <= {word.strip(",.") for word in text.split()} & set(READERS)


def test_the_table_of_the_documentation_is_the_options() -> None:
    """Write it anew with: python -m helpers.option_table (from the folder tests)."""
    text = PAGE.read_text()
    assert text == page_with_table(text)


@pytest.mark.slow
def test_a_type_checker_sees_a_misspelt_option(tmp_path: Path) -> None:
    """In run, embed and submit; what is right passes."""
    code = tmp_path / "caller.py"
    code.write_text(
        "import wsi_mmm\n"
        'wsi_mmm.run("a", output="o", tile_size=256, cache_tiles=True)\n'
        'wsi_mmm.run("a", output="o", tile_sise=256)\n'
        'wsi_mmm.embed("a", output="o", mpp="0.5")\n'
        'wsi_mmm.submit("tcp://h:1", "a", output="o", gzipp=False)\n'
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(PAGE.parents[1] / "pyproject.toml"), str(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PAGE.parents[1], check=False)
    wrong = re.findall(r"caller\.py:(\d+: error: .*)", done.stdout)
    assert [line.split(":")[0] for line in wrong] == ["3", "4", "5"], done.stdout
    assert all(name in line for name, line in zip(("tile_sise", "mpp", "gzipp"), wrong, strict=True))
