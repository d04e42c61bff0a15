"""The weights of an encoder on this machine: an argument, the user's folder of folders, the hub's cache.

Nothing is opened but folders, and nothing downloaded except by `download_weights`. No torch here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_mmm.errors import ModelError, first_line
from wsi_mmm.model.hub import check_hub
from wsi_mmm.model.recipe import EncoderRecipe
from wsi_mmm.model.shards import INDEX, index_names, is_index, is_part
from wsi_mmm.plugins import import_package
from wsi_mmm.storage.base import redact

WEIGHTS_VARIABLE = "WSI_MMM_WEIGHTS"
SAFE_ENDING = ".safetensors"
PICKLE_ENDINGS = (".bin", ".pth", ".pt", ".torch", ".ckpt", ".tar")
_USUAL = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.safetensors")
_MOST_FILES = 10_000
_TRUE = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class WeightPlaces:
    """The places of weights: ``folder``, the user's folder of folders ("": none); ``hub``, the hub's cache;
    ``offline``: nothing may be downloaded."""

    folder: str = ""
    hub: str = ""
    offline: bool = True


def local_places(environ: Mapping[str, str] = os.environ) -> WeightPlaces:
    """The places of the machine that works, by its own environment: ``WSI_MMM_WEIGHTS``, and the cache of the hub as
    ``HF_HUB_CACHE``, ``HF_HOME`` and ``XDG_CACHE_HOME`` say; ``HF_HUB_OFFLINE``: nothing is downloaded."""
    home = environ.get("HF_HOME") or f"{(environ.get('XDG_CACHE_HOME') or '~/.cache').rstrip('/')}/huggingface"
    hub = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or f"{home.rstrip('/')}/hub"
    offline = any(environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return WeightPlaces(environ.get(WEIGHTS_VARIABLE, ""), hub, offline)


@dataclass(frozen=True)
class FoundWeights:
    """A safetensors file, and which of the places it was found in."""

    path: Path
    place: str


def local_weights(weights: str) -> Path:
    """The path that a user gave for weights. ModelError for an address of storage: weights are read from disk."""
    if "://" in weights:
        raise ModelError(
            f"the weights {redact(weights)} are not on a disk: copy them to a folder that every worker sees, and give "
            f"its path, or name it in {WEIGHTS_VARIABLE}"
        )
    return Path(weights).expanduser()


def find_weights(recipe: EncoderRecipe, weights: str | None, places: WeightPlaces) -> FoundWeights | None:
    """The weights of a published encoder: ``weights`` (a file or a folder), else those in ``places``; None: nowhere.

    ModelError: a place that was named is not there, or holds weights that cannot be read as they are.
    """
    if weights is not None:
        path = local_weights(weights)
        if not path.exists():
            raise ModelError(f"the weights {path} are missing: check the path of --weights")
        return FoundWeights(choose_file(path, recipe.file, recipe.name), "--weights")
    for folder, place in _candidate_folders(recipe, places):
        if folder.is_file() or any(_weight_files(folder)):
            return FoundWeights(choose_file(folder, recipe.file, recipe.name), place)
    return None


def choose_file(path: Path, wanted: str = "", name: str = "NAME", *, option: str = "--weights") -> Path:
    """The safetensors file (or the index of several) that ``path`` is, or that the folder ``path`` holds; ``wanted``:
    its published name; ``option``: the one that names files.

    ModelError, naming the fix: none is there, there are several, or only a pickle is.
    """
    if not path.is_dir():
        if path.name.removesuffix(INDEX).endswith(PICKLE_ENDINGS):
            raise ModelError(advise_conversion(path, name))
        if is_part(path.name):
            raise ModelError(f"{path} is one of several files of weights: give their folder, or the {INDEX[1:]} there")
        return path
    files = {file.name: file for file in _weight_files(path)}
    safe = sorted(file for file in files if file.endswith(SAFE_ENDING))
    indexes = [file for file in _names_in(path) if file.endswith(SAFE_ENDING + INDEX)]
    for usual in (wanted, f"{Path(wanted).stem}{SAFE_ENDING}" if wanted else "", *_USUAL):
        if usual in safe:
            return files[usual]
        if usual + INDEX in indexes:
            return path / (usual + INDEX)
    if parts := [file for file in safe if is_part(file)]:
        if len(indexes) == 1:
            return path / indexes[0]
        several = (
            "several indexes of such files: pass one of them" if indexes else f"no {_USUAL[0]}{INDEX}: copy it too"
        )
        raise ModelError(f"{path} holds {parts[0]}, one of several files of weights, and {several}")
    if len(safe) > 1:
        raise ModelError(f"{path} holds several weights ({', '.join(safe[:3])}): pass one of them with {option}")
    if safe:
        return files[safe[0]]
    if files:
        pickles = [file for file in _names_in(path) if file.endswith(INDEX) and is_part(min(files))]
        pickled = path / pickles[0] if pickles else files.get(wanted) or files[min(files)]
        raise ModelError(advise_conversion(pickled, name))
    raise ModelError(
        f"{path} holds no weights: give the folder that hf download wrote, or a file that ends with {SAFE_ENDING}"
    )


def explain_missing(recipe: EncoderRecipe, places: WeightPlaces) -> str:
    """One line for weights that are nowhere: where they are looked for, and how to get them there."""
    name = recipe.name if ":" not in recipe.name else recipe.hub_id.partition("@")[0].rpartition("/")[2]
    folder = f"{places.folder or f'${WEIGHTS_VARIABLE}'}/{name}"
    gated = " (accept its terms on its page first)" if recipe.gated else ""
    if not recipe.hub_id:
        file = recipe.file or _USUAL[0]
        return f"the weights of '{recipe.name}' are not on this machine: put {file} into {folder} or give it as weights"
    return (
        f"the weights of '{recipe.name}' are not on this machine: where there is network, "
        f"hf download {recipe.hub_id} --local-dir {name}{gated}; then put that folder at {folder} "
        f"or give it as {'slide' if recipe.architecture == 'abmil' else 'weights'} (docs/encoders.md)"
    )


def download_weights(recipe: EncoderRecipe, places: WeightPlaces) -> FoundWeights:
    """The weights fetched from the hub into its cache, where that is permitted.

    ModelError, one line: no network, terms that were not accepted, no such file; or only a pickle is published.
    """
    if places.offline:
        raise ModelError(explain_missing(recipe, places))
    hub: Any = import_package(
        "huggingface_hub", "downloading weights needs huggingface_hub: pip install huggingface_hub"
    )
    for name in dict.fromkeys((_USUAL[0], recipe.file or _USUAL[0], _USUAL[0] + INDEX)):
        path = _download_file(hub, recipe, name, places)
        for part in index_names(path) if path is not None and is_index(path) else ():
            _download_file(hub, recipe, part, places)
        if path is not None:
            return FoundWeights(choose_file(path, name, recipe.name), "the hub")
    raise ModelError(f"{recipe.hub_id} has neither {_USUAL[0]} nor '{recipe.file}'; {explain_missing(recipe, places)}")


def find_config(hub_id: str, name: str, places: WeightPlaces) -> Path:
    """The file ``name`` of a repository of the hub, from where its weights may lie, or downloaded. ModelError as of
    `download_weights`."""
    recipe = EncoderRecipe(name=f"hf-hub:{hub_id}", architecture="unknown", hub_id=hub_id)
    for folder, _ in _candidate_folders(recipe, places):
        if (folder / name).is_file():
            return folder / name
    check_hub(f"hf-hub:{hub_id}")
    hub: Any = import_package("huggingface_hub", "downloading needs huggingface_hub: pip install huggingface_hub")
    path = None if places.offline else _download_file(hub, recipe, name, places)
    if path is None:
        raise ModelError(
            f"{hub_id} has no {name} that could be had: name its timm network as encoder and give its file as weights"
        )
    return path


def find_snapshot(hub_id: str, places: WeightPlaces) -> Path | None:
    """The folder of a repository of the hub (``org/name``, ``org/name@revision``) in ``places``; None: nowhere."""
    recipe = EncoderRecipe(name=hub_id, architecture="unknown", hub_id=hub_id)
    return next((folder for folder, _ in _candidate_folders(recipe, places) if folder.is_dir()), None)


def _download_file(hub: Any, recipe: EncoderRecipe, name: str, places: WeightPlaces) -> Path | None:
    """None: the repository has no such file."""
    identity, _, revision = recipe.hub_id.partition("@")
    try:
        return Path(hub.hf_hub_download(identity, name, revision=revision or None, cache_dir=places.hub or None))
    except Exception as error:  # huggingface_hub raises its own tree, and that of its HTTP client
        kind = type(error).__name__
        if kind in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
            return None
        page, cause = f"https://huggingface.co/{identity}", error
        while isinstance(cause.__cause__, Exception):  # "cannot find the file" was raised from what happened
            cause = cause.__cause__
        if kind == "RepositoryNotFoundError":
            reason = f"{page} is not there, or private: check the name, or run hf auth login"
        elif kind == "RevisionNotFoundError":
            reason = f"{page} has no revision '{revision or 'main'}': check what follows the @ of its name"
        elif kind == "GatedRepoError" or re.search(r"\b40[13]\b", str(cause)):
            reason = f"accept its terms at {page} and run hf auth login"
        else:
            reason = f"the hub cannot be reached ({first_line(cause, 120)}); {explain_missing(recipe, places)}"
        raise ModelError(f"the weights of '{recipe.name}' cannot be downloaded: {reason}") from error


def advise_conversion(path: Path, name: str) -> str:
    """One line about pickled weights of the encoder ``name``, and the way out."""
    target, then = str(conversion_target(path)), ""
    if "snapshots" in path.parts:  # the cache is the hub's own: nothing is put there
        name = re.split("[/:]", name.partition("@")[0])[-1]
        known = os.environ.get(WEIGHTS_VARIABLE)
        target = f"{known.rstrip('/') + '/' if known else ''}{name}/{_USUAL[0]}"
        then = "" if known else f"; then give embed --weights {name}, or set {WEIGHTS_VARIABLE} to the folder of {name}"
    return (
        f"the weights {path} are a pickle, which can run code; "
        f"wsi-mmm models convert {path} -o {target} reads the tensors alone, without running any{then}"
    )


def conversion_target(path: Path) -> Path:
    """The safetensors file beside a pickle, or beside the index of several."""
    return path.with_name(_USUAL[0]) if is_index(path) else path.with_suffix(SAFE_ENDING)


def _candidate_folders(recipe: EncoderRecipe, places: WeightPlaces) -> Iterator[tuple[Path, str]]:
    if places.folder:
        root = Path(places.folder).expanduser()
        if not root.is_dir():
            raise ModelError(f"{WEIGHTS_VARIABLE} names {root}, which is no folder: make it, or unset the variable")
        organisation, _, model = recipe.hub_id.partition("/")
        for name in (recipe.name, model, f"{organisation}--{model}", recipe.name + SAFE_ENDING):
            if found := _entry_called(root, name):
                yield found, WEIGHTS_VARIABLE
        if (inner := _entry_called(root, organisation)) and (found := _entry_called(inner, model)):
            yield found, WEIGHTS_VARIABLE
        if snapshot := _cached_snapshot(root, recipe.hub_id):
            yield snapshot, WEIGHTS_VARIABLE
    if places.hub and (snapshot := _cached_snapshot(Path(places.hub).expanduser(), recipe.hub_id)):
        yield snapshot, "the hub's cache"


def _cached_snapshot(cache: Path, hub_id: str) -> Path | None:
    """The snapshot of a repository that its branch ``main`` names in a cache of the hub, or the only one there."""
    hub_id, _, asked = hub_id.partition("@")
    home = _entry_called(cache, f"models--{hub_id.replace('/', '--')}") if hub_id else None
    if home is None:
        return None
    try:
        revision = (home / "refs" / (asked or "main")).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        revision = asked
    snapshots = _names_in(home / "snapshots")
    if revision in snapshots:
        return home / "snapshots" / revision
    return home / "snapshots" / snapshots[0] if len(snapshots) == 1 and not asked else None


def _entry_called(folder: Path, name: str) -> Path | None:
    """The file or folder of that name; the hub's ids are written in several cases (MahmoodLab/uni)."""
    if not name:
        return None
    if (folder / name).exists():
        return folder / name
    alike = [found for found in _names_in(folder) if found.lower() == name.lower()]
    return folder / alike[0] if alike else None


def _weight_files(folder: Path) -> Iterator[Path]:
    for name in _names_in(folder):
        if name.endswith((SAFE_ENDING, *PICKLE_ENDINGS)) and (folder / name).is_file():
            yield folder / name


def _names_in(folder: Path) -> list[str]:
    """Names in a folder, sorted; none where it is no folder or cannot be read."""
    try:
        return sorted(path.name for path, _ in zip(folder.iterdir(), range(_MOST_FILES), strict=False))
    except OSError:
        return []
