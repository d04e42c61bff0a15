"""Weights in several files, as transformers and the hub write them: ``model-00001-of-00002.safetensors`` and so on,
beside an index that names the file of each tensor. No torch here.

The index is a file from anywhere: it is bounded, and names files of its own folder only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from wsi_mmm.errors import ModelError, first_line

INDEX = ".index.json"
_PART = re.compile(r"-(\d+)-of-(\d+)\.(safetensors|bin)$")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_MOST_BYTES = 16 << 20
_MOST_FILES = 1_000


def is_index(path: Path) -> bool:
    """Return whether a file is, by its name, the index of weights in several files."""
    return path.name.endswith(INDEX)


def is_part(name: str) -> bool:
    """Return whether a file holds, by its name, only some of an encoder's tensors."""
    found = _PART.search(name)
    return found is not None and int(found.group(2)) > 1


def weight_files(path: Path) -> list[Path]:
    """The files that hold the tensors of weights, by name: those of an index, or the file itself. ModelError."""
    return [path.parent / name for name in sorted(set(read_index(path).values()))] if is_index(path) else [path]


def read_index(path: Path) -> Mapping[str, str]:
    """Tensor -> name of its file, as an index says it. ModelError: it is none, names files outside its folder, or
    some that are not there."""
    found = _parse_index(path)
    for name in sorted(set(found.values())):
        if not (path.parent / name).is_file():
            raise ModelError(f"{path} names {name}, which is not beside it: copy all files of the weights there")
    return found


def index_names(path: Path) -> list[str]:
    """The names of the files that an index lists, there or not. ModelError as of `read_index`."""
    return sorted(set(_parse_index(path).values()))


def _parse_index(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ModelError(f"{path} has more than {_MOST_BYTES >> 20} MiB: it is no index of weights")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"the index of weights {path} cannot be read: {first_line(error)}") from error
    found = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise ModelError(f"{path} is no index of weights: it has no weight_map; copy it again")
    names = set(found.values())
    ending = path.name.removesuffix(INDEX).rpartition(".")[2]
    for name in names:
        if not _PLAIN_NAME.fullmatch(name) or not name.endswith(f".{ending}"):
            raise ModelError(f"{path} names {name[:80]!r}, which is no .{ending} file of its folder: do not use it")
    if len(names) > _MOST_FILES:
        raise ModelError(f"{path} names {len(names):,} files, more than {_MOST_FILES:,}: it is no index of weights")
    return found


def check_index(path: Path, listed: Mapping[str, set[str]]) -> None:
    """ModelError unless the files (name -> their tensors) of an index hold what it says, each tensor once."""
    said = read_index(path)
    for name, tensors in listed.items():
        wanted = {tensor for tensor, file in said.items() if file == name}
        if odd := sorted(tensors ^ wanted):
            verb = "lacks" if odd[0] in wanted else "also has"
            raise ModelError(f"{name} {verb} '{odd[0]}', other than {path} says: copy all files of the weights again")
