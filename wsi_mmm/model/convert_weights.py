"""Pickled weights (.bin, .pth, .pt) into safetensors, by torch's weights-only unpickler in a process of its own.

That unpickler knows tensors and containers and refuses everything else, so no code of the file is run. What a file
says of itself is bounded: memory, processor time, the size of what is written.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_mmm.errors import ModelError, first_line
from wsi_mmm.model.find_weights import SAFE_ENDING
from wsi_mmm.model.shards import weight_files
from wsi_mmm.storage.local import atomic_file

_WRAPPERS = ("teacher", "model_ema", "ema", "state_dict", "model", "module", "student")
_DEPTH = 6
_SPARE_BYTES = 4 << 30  # what the libraries themselves need of it
_MAPPED_BYTES = 64 << 30  # addresses of the libraries' files: those of CUDA are several GB
_SLACK_BYTES = 64 << 20
KEPT_VARIABLES = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class ConvertedWeights:
    """Tensors and bytes written; ``left_out``: values of the file that are no tensors; ``part``: which of several
    sets of weights in the file was taken ("": it holds one)."""

    path: Path
    tensors: int
    bytes: int
    left_out: int
    part: str


def convert_weights(source: Path, target: Path, *, seconds: int = 1800) -> ConvertedWeights:
    """Write the tensors of a pickle as safetensors; ``target`` appears whole or not at all.

    ModelError, one line: no such file, something other than tensors in it, no tensors, too large or too slow.
    OutputError.
    """
    if target.suffix != SAFE_ENDING:
        raise ModelError(f"{target} must end with {SAFE_ENDING}")
    if not source.is_file():
        raise ModelError(f"the weights {source} are missing: check the path")
    sources = weight_files(source)
    size = sum(file.stat().st_size for file in sources)
    with sources[0].open("rb") as file:
        if file.read(9)[8:] == b"{":
            raise ModelError(f"{source} is safetensors already: give it as weights")
    with atomic_file(target) as temporary:
        files = (str(source.resolve()), str(temporary.resolve()))
        # -P: modules that lie in the folder of the weights, or wherever the user stands, are not imported.
        command = [sys.executable, "-P", "-m", "wsi_mmm.model.convert_weights", *files, str(size), str(seconds)]
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        quiet = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, check=False, env=kept | quiet
            )
        except subprocess.TimeoutExpired as error:
            raise ModelError(
                f"{source} was not read within {seconds} s: it is damaged, or this machine too slow"
            ) from error
        answer = _last_answer(done.stdout)
        if "refused" in answer:
            raise ModelError(f"{source} {answer['refused']}")
        if done.returncode or "tensors" not in answer:
            bounds = f"{seconds} s and {(size * 3 + _SPARE_BYTES) >> 30} GiB of memory"
            raise ModelError(f"{source} cannot be read within {bounds}, or is damaged (exit code {done.returncode})")
        return ConvertedWeights(target, answer["tensors"], answer["bytes"], answer["left_out"], answer["part"])


def _last_answer(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------- the process that reads


def read_tensors(path: Path) -> tuple[dict[str, Any], int, str]:
    """Tensors of a pickle, or of those of an index, by name, how many other values it holds, and the part of it that
    was taken.

    ModelError, beginning with a verb: what is wrong with the file.
    """
    tensors: dict[str, Any] = {}
    left_out, part = 0, ""
    for one in weight_files(path):
        found, others, part = _read_pickle(one)
        if twice := tensors.keys() & found.keys():
            raise ModelError(f"names files that hold '{min(twice)}' twice: copy all of them again")
        tensors |= found
        left_out += others
    return tensors, left_out, part


def _read_pickle(path: Path) -> tuple[dict[str, Any], int, str]:
    import torch

    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            loaded = torch.load(path, map_location="cpu", weights_only=True)  # the format of before torch 1.6
    except Exception as error:  # an unpickler raises whatever the file leads it to
        if "weights_only" in str(error) or "Unsupported" in str(error):
            text = "holds more than tensors, which could run code when it is read: ask its authors for safetensors"
        else:
            text = f"cannot be read as weights: {first_line(error, 120)}"
        raise ModelError(text) from error
    loaded, part = _unwrap_weights(loaded)
    tensors: dict[str, Any] = {}
    left_out = 0
    for name, value in _walk_values(loaded, "", 0):
        if isinstance(value, torch.Tensor):
            tensors[name] = value.detach()
        else:
            left_out += 1
    if not tensors:
        raise ModelError("holds no tensors")
    return tensors, left_out, part


def _unwrap_weights(loaded: Any) -> tuple[Any, str]:
    """The weights inside what a training run saved: ``{"teacher": {...}, "optimizer": ...}``."""
    taken: list[str] = []
    while isinstance(loaded, Mapping) and len(taken) < _DEPTH:
        name = next((name for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)), None)
        if name is None:
            break
        loaded = loaded[name]
        taken.append(name)
    return loaded, ".".join(taken)


def _walk_values(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and depth < _DEPTH:
        for key, inner in value.items():
            yield from _walk_values(inner, f"{name}.{key}" if name else str(key), depth + 1)
    else:
        yield name, value


def write_tensors(tensors: dict[str, Any], path: Path, most: int) -> int:
    """Write tensors, each with memory of its own; return the bytes. ModelError: more than ``most``, or odd ones."""
    import torch
    from safetensors.torch import save_file

    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ModelError(f"holds '{name}', which is no plain tensor")
    total = sum(int(tensor.numel()) * int(tensor.element_size()) for tensor in tensors.values())
    if total > most:
        raise ModelError(f"says that its tensors are {total} bytes, which the file cannot hold")
    known: set[int] = set()
    plain: dict[str, Any] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone().contiguous() if storage in known else tensor.contiguous()
        known.add(storage)
    save_file(plain, path, {"format": "pt"})
    return total


def limit_process(memory: int, seconds: int, output: int) -> None:
    """Bounds of this process: bytes of memory, seconds of processor time, bytes of a file; no core files."""
    for what, amount in (
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_AS, memory + _MAPPED_BYTES),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, output),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        bound = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(what, (bound, bound))


def _convert_here(source: Path, target: Path, size: int, seconds: int) -> dict[str, Any]:
    most = 4 * size + _SLACK_BYTES
    limit_process(3 * size + _SPARE_BYTES, seconds, most)
    try:
        tensors, left_out, part = read_tensors(source)
        written = write_tensors(tensors, target, most)
    except ModelError as error:
        return {"refused": str(error)}
    except (MemoryError, OSError, RuntimeError) as error:
        return {"refused": f"cannot be converted: {first_line(error, 120)}"}
    return {"tensors": len(tensors), "bytes": written, "left_out": left_out, "part": part}


if __name__ == "__main__":
    answer = _convert_here(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    sys.stdout.write(json.dumps(answer) + "\n")
