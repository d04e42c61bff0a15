"""The configuration that lies beside the weights of an encoder, and names that say where both lie. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsi_mmm.errors import ModelError, first_line
from wsi_mmm.model.find_weights import find_config, local_places
from wsi_mmm.model.recipe import ColourTriple

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
HUB, FOLDER = "hf-hub:", "local-dir:"
_HUB_ALIASES = ("hf-hub:", "hf_hub:")
_MOST_CONFIG = 4 << 20


@dataclass(frozen=True, slots=True)
class WeightsConfig:
    """The facts in ``config.json`` (timm's) and ``preprocessor_config.json`` beside weights; empty: none."""

    architecture: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    mean: ColourTriple | None = None
    std: ColourTriple | None = None


def split_source(name: str) -> tuple[str, str]:
    """The source of an encoder's name ("hf-hub:", "local-dir:" or empty) and the rest. Folders need no prefix."""
    lowered = name.lower()
    for alias in _HUB_ALIASES:
        if lowered.startswith(alias):
            return HUB, name[len(alias) :]
    if lowered.startswith(FOLDER):
        return FOLDER, name[len(FOLDER) :]
    return (FOLDER, name) if (Path(name).expanduser() / CONFIG).is_file() else ("", name)


def hub_config(hub_id: str) -> WeightsConfig:
    """The facts in the configuration of a repository of the hub. ModelError naming the fix."""
    path = find_config(hub_id, CONFIG, local_places())
    return read_config([path, path.parent / PREPROCESSOR])  # of one snapshot


def config_beside(path: Path) -> WeightsConfig:
    """The facts that the folder of a weights file holds of them. ModelError when a file of it is broken."""
    return read_config([path.parent / CONFIG, path.parent / PREPROCESSOR])


def read_config(paths: Iterable[Path]) -> WeightsConfig:
    """The facts in those files that exist; files that are not about timm networks or images hold none."""
    merged: dict[str, Any] = {}
    for path in paths:
        if path.is_file():
            merged |= {key: value for key, value in _read_json(path).items() if key not in merged}
    cfg = merged.get("pretrained_cfg")
    cfg = cfg if isinstance(cfg, dict) else merged
    architecture, arguments = merged.get("architecture"), merged.get("model_args")
    return WeightsConfig(
        architecture if isinstance(architecture, str) else "",
        arguments if isinstance(arguments, dict) else {},
        _read_colours(cfg.get("mean", merged.get("image_mean"))),
        _read_colours(cfg.get("std", merged.get("image_std"))),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_CONFIG:
            raise ModelError(f"{path} is too large to be a configuration")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} cannot be read as JSON ({first_line(error, 60)}): copy it again, or move it away"
        ) from error
    return found if isinstance(found, dict) else {}


def _read_colours(value: object) -> ColourTriple | None:
    """Three finite numbers, else None."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        return None
    if not all(isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in value):
        return None
    return float(value[0]), float(value[1]), float(value[2])
