"""Encoders whose code comes with an installed package (docs/extending.md): their module as a backbone of vectors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import timm
import torch
from torch import Tensor, nn

from wsi_mmm.errors import MissingPackage, ModelError, PluginError, WsiError, first_line
from wsi_mmm.model.card import EncoderCard
from wsi_mmm.model.recipe import EncoderRecipe
from wsi_mmm.model.registry import load_encoder_plugin, plugin_entry
from wsi_mmm.plugins import plugin_names, plugin_package


class VectorBackbone(nn.Module):
    """A module of a package, float32[n, 3, h, w] -> float[n, ``vector_width``], whose answers are checked; no maps."""

    def __init__(self, model: nn.Module, vector_width: int, source: str) -> None:
        super().__init__()
        self.model = model
        self.vector_width = vector_width
        self.source = source
        self.channels, self.strides = (vector_width,), (32,)

    def forward(self, x: Tensor) -> NoReturn:
        """ModelError: there are no maps."""
        raise ModelError(f"{self.source} gives no maps: use it for vectors only")

    def forward_pooled(self, x: Tensor, *, maps: bool) -> tuple[list[Tensor], Tensor]:
        """No maps, and the vectors. PluginError: the module raised, or gave something else than vectors."""
        if maps:
            self(x)
        try:
            vector = self.model(x)
        except (WsiError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # code of somebody else
            size = "x".join(map(str, x.shape))
            raise PluginError(f"{self.source} failed on float32[{size}]: {_describe_error(error)}") from error
        if not isinstance(vector, Tensor) or not vector.is_floating_point():
            kind = vector.dtype if isinstance(vector, Tensor) else type(vector).__name__
            raise PluginError(f"{self.source} gave {kind}, not vectors float[{len(x)}, {self.vector_width}]")
        if vector.shape != (len(x), self.vector_width):
            wanted = f"[{len(x)}, {self.vector_width}], as the dimension of its entry says"
            raise PluginError(f"{self.source} gave float{list(vector.shape)}, not {wanted}")
        return [], vector


def check_package(recipe: EncoderRecipe) -> None:
    """MissingPackage or ModelError, naming what to install, unless this machine has the package of a recipe."""
    name, here = recipe.architecture, plugin_package("encoders", recipe.architecture)
    if recipe.package and here != recipe.package:
        if name not in plugin_names("encoders"):
            raise _missing_package(name, recipe.package)
        raise ModelError(
            f"the encoder '{name}' is of {recipe.package}, and {os.uname().nodename} has {here}: "
            f"pip install '{recipe.package}' there, or begin the run again with the same on all machines"
        )


def is_plugin(card: EncoderCard) -> bool:
    """Return whether the encoder of a card is that of a package, installed or not."""
    return bool(card.package) or card.name in plugin_names("encoders")


def wrap_module(module: nn.Module, name: str) -> VectorBackbone:
    """The module of a package's encoder as a backbone that gives the vectors its entry describes."""
    return VectorBackbone(module, plugin_entry(name).recipe.dimension, _describe_source(name))


def build_module(name: str, package: str, weights: Path | None) -> nn.Module:
    """The module that a package makes of the file of its weights (None: random ones).

    MissingPackage naming ``package``; PluginError: its function raised, or gave no module.
    """
    if name not in plugin_names("encoders"):
        raise _missing_package(name, package)
    source = _describe_source(name)
    if timm.is_model(name):
        raise PluginError(f"{source} has the name of a network of timm: give it another")
    plugin_entry(name)  # its faults
    module = _run_build(load_encoder_plugin(name).build, weights, source)
    if not isinstance(module, nn.Module):
        raise PluginError(f"{source}: build gave {type(module).__name__}, not a torch.nn.Module")
    if any(value.is_meta for value in (*module.parameters(), *module.buffers())):
        raise PluginError(f"{source}: build gave a module on the meta device: fill it with the weights")
    return module


def _describe_source(name: str) -> str:
    return f"the encoder '{name}' of the package {plugin_package('encoders', name)}"


def _run_build(build: Callable[[Path | None], nn.Module], weights: Path | None, source: str) -> object:
    try:
        return build(weights)
    except WsiError:
        raise
    except Exception as error:  # code of somebody else
        raise PluginError(f"{source} cannot be built: {_describe_error(error)}") from error


def _describe_error(error: Exception) -> str:
    """Its type and the first line of its text."""
    text = first_line(error)
    return text if text == type(error).__name__ else f"{type(error).__name__}: {text}"


def _missing_package(name: str, package: str) -> MissingPackage:
    return MissingPackage(
        f"the encoder '{name}' comes with the package {package}, which {os.uname().nodename} does not have: "
        f"pip install '{package}' there"
    )
