"""Extensions that installed packages offer through entry points (see docs/extending.md), and optional packages.

A package names its object in its ``pyproject.toml``, and it can be used after ``pip install``, here and on every
worker::

    [project.entry-points."wsi_mmm.readers"]
    npy = "my_package:npy_reader"
"""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata
from typing import Any, Literal

from wsi_mmm.errors import MissingPackage, PluginError

Group = Literal["readers", "tasks", "encoders", "executors", "annotations"]


@cache
def plugin_names(group: Group) -> tuple[str, ...]:
    """Names that installed packages offer in a group, sorted; nothing is imported."""
    return tuple(sorted({entry.name for entry in metadata.entry_points(group=f"wsi_mmm.{group}")}))


@cache
def load_plugin(group: Group, name: str) -> object:
    """Import the object that a package offers as ``name``. PluginError when it cannot be, or two packages offer it."""
    entries = list(metadata.entry_points(group=f"wsi_mmm.{group}", name=name))
    packages = sorted({entry.dist.name if entry.dist else "?" for entry in entries})
    if len(packages) != 1:
        offered = f"by {' and by '.join(packages)}: uninstall one" if packages else "by no installed package"
        raise PluginError(f"{name!r} of the entry points wsi_mmm.{group} is offered {offered}")
    try:
        return entries[0].load()
    except Exception as error:  # a package of somebody else may raise anything as it is imported
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise PluginError(f"the package {packages[0]} cannot be used for {name!r}: {cause}") from error


@cache
def plugin_package(group: Group, name: str) -> str:
    """NAME==VERSION of the installed package that offers ``name``; empty: none does."""
    for entry in metadata.entry_points(group=f"wsi_mmm.{group}", name=name):
        if entry.dist is not None:
            return f"{entry.dist.name}=={entry.dist.version}"
    return ""


def import_package(name: str, missing: str) -> Any:
    """Import an optional package. MissingPackage with the text ``missing`` when it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingPackage(missing) from error
