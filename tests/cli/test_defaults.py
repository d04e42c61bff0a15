"""Defaults that helps tell: those that count, for every command."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from wsi_mmm.cli.main import app
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.options import EMBED_DEFAULTS, RUN_OPTIONS, RunOptions, command_options, default_words, make_options
from wsi_mmm.requests import encoder_recipe, model_recipe

WRITTEN = {
    "fewshot fit classes", "models convert output", "models export output", "models export tasks",
    "models export tile_size", "export output", "train metric",
}  # fmt: skip
"""Commands and parameters whose help says in words what no value means."""


def parameters(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every option of every command, with ``command parameter``."""
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from parameters(inner, f"{path} {name}".strip())
        return
    for one in command.params:
        if one.param_type_name == "option":
            yield f"{path} {one.name}", one


OPTIONS = dict(parameters(typer.main.get_command(app)))
assert len(OPTIONS) > 100


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_a_help_tells_the_default_once_and_truly(name: str) -> None:
    """Of run and embed from `options`; of the others what the parser itself shows, or words where there is no value."""
    option = OPTIONS[name]
    said = re.findall(r"\(default: (.*?)\)(?= |$)", option.help or "")
    command, _, parameter = name.partition(" ")
    known = {one.name: one for one in command_options(command)} if command in ("run", "embed") else {}  # type: ignore[arg-type]
    if parameter in known and parameter != "output":
        words = default_words(known[parameter], command)  # type: ignore[arg-type]
        assert said == ([words] if words else [])
        assert option.default is None or option.default is False
    else:
        assert said == [] or (name in WRITTEN and not option.default)
        assert not option.default or option.show_default


def test_the_words_are_what_a_run_comes_to() -> None:
    """`embed` has numbers of its own, `run` takes those of the model, and so does `embed` the mpp (that of the default
    model is the same); the rest are the defaults of `RunOptions`."""
    plain = make_options({})
    recipe = encoder_recipe("default", None, plain)
    found = {"mpp": recipe.mpp, "tile_size": recipe.tile, "overlap": recipe.overlap, "block_tiles": recipe.block_tiles}
    assert found == EMBED_DEFAULTS
    model = model_recipe("default", None, plain)
    assert model.block_tiles == Recipe("m", "h", (), 0.5, 256, 0).block_tiles
    for option in RUN_OPTIONS:
        words = {command: default_words(option, command) for command in option.commands}
        if option.name in found:
            models = "the model's, else " if option.name == "mpp" else ""
            assert words["embed"] == f"{models}{found[option.name]:g}"
            assert words["run"] == ("the model's" if option.flags else str(model.block_tiles))
        elif option.default is not None and option.value_type is not bool:
            assert set(words.values()) == {str(getattr(RunOptions(), option.name))}
