"""A look at a model's weights before a run begins: what is broken is said once, not by every slide. No torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import WEIGHTS, model_path

_CHUNK = 1 << 22
_PICKLES = (b"\x80", b"PK\x03\x04")  # pickle, and the zip archive that torch.save writes


def check_weights(name: str, sha256: str) -> None:
    """Raise ModelError unless the weights of a model are there, are no pickle and are those that its card names."""
    path = model_path(name) / WEIGHTS
    found = check_file(path)
    if sha256 and found != sha256:
        raise ModelError(f"the weights {path} are not those its card was written for: copy the model folder again")


def check_file(path: Path) -> str:
    """The sha256 of a weights file; ModelError when it cannot be read or is a pickle."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            head = file.read(9)
            digest.update(head)
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except FileNotFoundError as error:
        raise ModelError(f"the weights {path} are missing: copy the whole model folder, or check the path") from error
    except OSError as error:
        raise ModelError(f"the weights {path} cannot be read: {error.strerror}") from error
    if head.startswith(_PICKLES) and head[8:] != b"{":  # safetensors: 8 bytes of length, then a JSON object
        raise ModelError(f"the weights {path} are a pickle (.pt), which can run code; save them as safetensors")
    return digest.hexdigest()
