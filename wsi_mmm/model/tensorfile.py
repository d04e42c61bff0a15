"""Named tensors with facts as bytes (safetensors), for files anywhere. Nothing is ever unpickled."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from wsi_mmm.errors import ModelError


def pack(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> bytes:
    """One safetensors file: tensors copied to the CPU, ``facts`` as its metadata."""
    return save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, dict(facts))


def unpack(data: bytes, source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and facts of a file of `pack`. ModelError naming ``source`` if it is none, or not whole."""
    try:
        (length,) = struct.unpack("<Q", data[:8])
        facts = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        return load(data), facts
    except (SafetensorError, struct.error, ValueError) as error:
        why = str(error).splitlines()[0]
        raise ModelError(f"{source} is damaged or no safetensors file ({why}); remove it") from error
