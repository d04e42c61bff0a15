"""The file of weights before its numbers are read: is it safetensors, and which tensors does it list? No torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from wsi_mmm.errors import ModelError, first_line
from wsi_mmm.model.find_weights import advise_conversion
from wsi_mmm.model.shards import check_index, is_index, weight_files

_PICKLES = (b"\x80", b"PK\x03\x04")  # pickle, and the zip archive that torch.save writes
_POINTERS = ((b"version https://git-lfs", "git lfs pull"), (b"/annex/objects/", "git annex get"))
_LOOKED_AT = 512


def refuse_foreign(path: Path) -> None:
    """ModelError, saying what it is, when a weights file (or one that an index names) is missing, no safetensors, or
    not whole; a pickle is not opened."""
    if is_index(path):
        for part in weight_files(path):
            refuse_foreign(part)
        check_index(path, {part.name: set(list_tensors(part)) for part in weight_files(path)})
        return
    try:
        with path.open("rb") as file:
            head = file.read(_LOOKED_AT)
    except FileNotFoundError as error:
        raise ModelError(f"the weights {path} are missing: copy the whole model folder, or check the path") from error
    except OSError as error:
        raise ModelError(f"the weights {path} cannot be read: {error.strerror}") from error
    if head.startswith(_PICKLES) and head[8:9] != b"{":  # safetensors: 8 bytes of length, then a JSON object
        raise ModelError(advise_conversion(path, "NAME"))
    list_tensors(path, head)


def list_tensors(path: Path, head: bytes = b"") -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type (as safetensors writes it) and shape of each tensor that a safetensors file, or those of an index, list.
    ModelError."""
    if is_index(path):
        return {name: one for part in weight_files(path) for name, one in list_tensors(part).items()}
    try:
        with safe_open(path, "np") as header:
            slices = {name: header.get_slice(name) for name in header.offset_keys()}
            return {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"the weights {path} {_describe_foreign(head, error)}") from error


def combine_hashes(hashes: Sequence[str]) -> str:
    """The sha256 hex of weights by those of their files, in the sequence of `weight_files`; of one file: its own."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _describe_foreign(head: bytes, error: Exception) -> str:
    """What a file is that is no safetensors, by its beginning, and the way out."""
    start = head.lstrip().lower()
    if not head:
        return "are an empty file: download or copy them again"
    for mark, command in _POINTERS:
        if start.startswith(mark):
            return f"are not there, only a pointer to them: {command} in their folder, or hf download, brings them"
    if head[8:9] == b"{":
        reason = first_line(error, 80).removeprefix("Error while deserializing header: ")
        return f"are cut short or damaged ({reason}): download or copy them again"
    if start.startswith(b"<"):
        return "are a web page: remove it, accept the terms on their page, and hf auth login and hf download bring them"
    lines = head.decode("ascii", "replace").replace("\t", " ").strip().splitlines()
    if lines and head.isascii() and all(line.isprintable() for line in lines):
        return f"are a text ('{lines[0][:100]}'): remove it, and download or copy them again"
    return "are no safetensors file: give the .safetensors that their authors publish, or wsi-mmm models convert theirs"
