"""Identity of a model's numbers: hashes of weights and of the facts that change what they compute. No torch.

Weights are looked at before a run begins, so that what is broken is said once, not by every slide.
"""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

from wsi_mmm.errors import MissingPackage, ModelError, OptionError
from wsi_mmm.model.card import CARD, WEIGHTS, ModelCard, model_path, zoo_names
from wsi_mmm.model.shards import weight_files
from wsi_mmm.model.weights_file import combine_hashes, refuse_foreign

RUNTIMES = {
    "eager": "float32; norms folded into convolutions: within 1e-4 of the plain model's largest answer",
    "compile": "float32 through torch.compile with frozen weights: within 1e-3 of eager's largest answer",
    "bf16": "bfloat16 in convolutions and matrix products: within 5e-2 of eager's largest answer",
    "fp16": "float16 in convolutions and matrix products: within 1e-2 of eager's largest answer",
    "onnx": "float32 through ONNX Runtime: within 1e-3 of eager's largest answer",
}
"""Ways to run a model, and how far their numbers may lie apart. One kind of device and runtime: equal to the bit."""

FULL_PRECISION = "eager"
RUNTIME_OF_PRECISION = {"fp32": FULL_PRECISION, "fp16": "fp16", "bf16": "bf16"}
"""The runtime that computes in the precision that a published encoder's entry names."""

_NEEDS = {"onnx": ("onnx", "onnxruntime", "onnxscript")}


def lacking(runtime: str) -> list[str]:
    """Packages that ``runtime`` needs and that are not installed here."""
    return [name for name in _NEEDS.get(runtime, ()) if find_spec(name) is None]


def check_runtime(runtime: str) -> None:
    """MissingPackage, naming the fix, when ``runtime`` cannot be used here."""
    if lacking(runtime):
        raise MissingPackage(f"ONNX needs the package {lacking(runtime)[0]}: pip install 'wsi-mmm[{runtime}]'")


def precision_text(runtime: str) -> str:
    """The precision that a runtime computes in: fp32, fp16 or bf16."""
    return next((name for name, one in RUNTIME_OF_PRECISION.items() if one == runtime), "fp32")


def is_model(name: str) -> bool:
    """Return whether ``name`` is a packaged model or a model folder, rather than the name of a bare encoder."""
    return name in zoo_names() or (Path(name).expanduser() / CARD).is_file()


def model_identity(name: str, card: ModelCard) -> str:
    """sha256 hex of a model: its weights and the part of its card that changes its answers."""
    parts = {"encoder", "squeezer", "decoder", "neck", "bag", "mean", "std", "tasks"}
    facts = card.model_dump(mode="json", include=parts)
    weights = card.weights_sha256 or check_weights(model_path(name) / WEIGHTS)
    return hashlib.sha256(json.dumps([facts, weights], sort_keys=True).encode()).hexdigest()


def device_kind(device: str) -> str:
    """Kind of the device a model will run on here, "cpu" or "cuda": numbers agree to the bit on one kind only."""
    if device != "auto":
        return device.split(":")[0]
    try:
        import torch
    except ImportError:
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """OptionError, before any slide is begun, when this machine has no such device; "auto" and "cpu" always are."""
    kind, _, number = device.partition(":")
    if kind in ("auto", "cpu"):
        return
    import torch

    found = {"cuda": torch.cuda.device_count, "xpu": torch.xpu.device_count, "mps": torch.mps.device_count}[kind]()
    if int(number or 0) >= found:
        there = f"it has {found} of that kind" if found else "torch finds none of that kind here"
        raise OptionError(f"this machine has no device {device!r} ({there}); choose --device auto or cpu")


def check_weights(path: Path, sha256: str = "") -> str:
    """The sha256 of a weights file, or of those of an index. ModelError when it cannot be read, is no safetensors, or
    has another hash than its card names (``sha256``; empty: any will do)."""
    refuse_foreign(path)
    found = combine_hashes([_hash_file(part) for part in weight_files(path)])
    if sha256 and found != sha256:
        raise ModelError(f"the weights {path} are not those its card was written for: copy the model folder again")
    return found


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
