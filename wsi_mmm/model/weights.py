"""The files of an encoder: its weights, and the configuration that its authors wrote beside them. No torch here."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsi_mmm.errors import ModelError, first_line
from wsi_mmm.model.recipe import ColourTriple

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
SAFETENSORS = "model.safetensors"
WEIGHTS_HOME = "WSI_MMM_WEIGHTS"
HUB, FOLDER = "hf-hub:", "local-dir:"
_HUB_ALIASES = ("hf-hub:", "hf_hub:")
_PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".tar")
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


def find_in_folder(folder: Path, file: str = "") -> Path:
    """The weights in a folder: ``file``, model.safetensors, or the only .safetensors. ModelError naming the fix."""
    names = [name for name in (_safe_name(file), SAFETENSORS) if name]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    try:
        held = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise ModelError(f"the folder of weights {folder} cannot be read: {error.strerror}") from error
    safe = [path for path in held if path.suffix == ".safetensors"]
    if len(safe) == 1:
        return safe[0]
    if len(safe) > 1:
        raise ModelError(f"{folder} holds {len(safe)} .safetensors files: name one of them with --weights")
    pickled = [path for path in held if path.suffix in _PICKLED]
    if pickled:
        raise ModelError(f"{folder} holds only {pickled[0].name}: {convert_hint(pickled[0])}")
    raise ModelError(f"{folder} holds no weights: it needs {names[0]}")


def convert_hint(path: str | Path) -> str:
    """The way out for a pickled file."""
    file = Path(path)
    return (
        "pickled weights can run code, so they are not opened: "
        f"wsi-mmm models convert {file} -o {file.with_suffix('.safetensors')}"
    )


def _safe_name(file: str) -> str:
    return str(Path(file).with_suffix(".safetensors")) if Path(file).suffix in _PICKLED else file


def find_file(weights: str, file: str = "") -> Path:
    """The file that ``--weights`` names: itself, or the one in the folder. ModelError naming the fix."""
    path = Path(weights).expanduser()
    return find_in_folder(path, file) if path.is_dir() else path


def find_at_home(name: str, file: str = "") -> Path | None:
    """The weights in ``$WSI_MMM_WEIGHTS/<name>/``, or None."""
    home = os.environ.get(WEIGHTS_HOME)
    folder = Path(home).expanduser() / name if home else None
    return find_in_folder(folder, file) if folder is not None and folder.is_dir() else None


def find_on_hub(repository: str, file: str = "") -> Path:
    """The weights of a Hugging Face repository (``org/name`` or ``org/name@revision``), from its cache or the network.

    ModelError naming the fix: offline, gated, unknown, or no safetensors file in it.
    """
    names = dict.fromkeys(name for name in (_safe_name(file), SAFETENSORS) if name)
    for name in names:
        if (found := _download(repository, name)) is not None:
            return found
    for name in dict.fromkeys(name for name in (file, "pytorch_model.bin") if Path(name).suffix in _PICKLED):
        if (found := _download(repository, name)) is not None:
            raise ModelError(f"{repository} has no safetensors file, only {name}: {convert_hint(found)}")
    raise ModelError(f"{repository} holds no {' or '.join(names)}: pass its weights with --weights FILE.safetensors")


def hub_config(repository: str) -> WeightsConfig:
    """The facts in the repository's ``config.json``."""
    path = _download(repository, CONFIG, _NO_CONFIG)
    if path is None:
        raise ModelError(f"{repository} has no {CONFIG}: name a timm network with --encoder, its file with --weights")
    preprocessor = path.parent / PREPROCESSOR  # that of the same snapshot
    return read_config([path, preprocessor])


_NO_WEIGHTS = "pass its weights with --weights FILE.safetensors, or copy a Hugging Face cache here and set HF_HOME"
_NO_CONFIG = (
    "copy its files here and give --encoder local-dir:FOLDER, or name its timm network with --encoder and its file "
    "with --weights FILE.safetensors"
)


def _download(repository: str, file: str, way_out: str = _NO_WEIGHTS) -> Path | None:
    """A file of a repository; None when the repository has no such file. ModelError ending with ``way_out``."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError

    identity, _, revision = repository.partition("@")
    try:
        return Path(hf_hub_download(identity, file, revision=revision or None))
    except GatedRepoError as error:
        raise ModelError(
            f"{identity} is gated: accept its licence at https://huggingface.co/{identity}, set HF_TOKEN, or {way_out}"
        ) from error
    except LocalEntryNotFoundError as error:
        if _in_cache(identity, revision):
            return None
        raise ModelError(
            f"{identity} cannot be downloaded (no network, or HF_HUB_OFFLINE is set) and is not in the cache: {way_out}"
        ) from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # huggingface_hub raises errors of several libraries: one meaning for us
        raise ModelError(f"'{repository}' cannot be downloaded ({first_line(error)}): {way_out}") from error


def _in_cache(identity: str, revision: str) -> bool:
    """Whether the cache holds a snapshot of the repository: then a file that is not in it was not copied along."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(identity, CONFIG, revision=revision or None), str)


# ---------------------------------------------------------------- what lies beside them


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
        raise ModelError(f"{path} cannot be read as JSON: {first_line(error)}") from error
    return found if isinstance(found, dict) else {}


def _read_colours(value: object) -> ColourTriple | None:
    """Three finite numbers, else None."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        return None
    if not all(isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in value):
        return None
    return float(value[0]), float(value[1]), float(value[2])
