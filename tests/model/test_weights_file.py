"""A file that is given as weights and is none: one line says what it is and the way out; the list of one that is."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from wsi_mmm.errors import ModelError
from wsi_mmm.model.identity import check_weights
from wsi_mmm.model.weights_file import list_tensors, refuse_foreign

WHOLE = save({"b": torch.ones(3, 4).half(), "a": torch.ones(2)})
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 2725370384\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "an empty file: download"),
        (POINTER, "only a pointer to them: git lfs pull"),
        (b"/annex/objects/MD5E-s2725370384--a\n", "git annex get"),
        (b"<!DOCTYPE html>\n<html><head></head></html>", "a web page: remove it, accept the terms"),
        (b"\n<html>log in</html>", "a web page"),
        (b'{"error": "Access to model is restricted"}', "are a text .*Access to model is restricted.*download"),
        (b"Access to model is restricted.\nMore", "are a text .'Access to model is restricted.'.: remove it"),
        (WHOLE[:-1], "cut short or damaged .*download or copy"),
        (WHOLE[:30], "cut short or damaged"),
        (WHOLE + b"0", "cut short or damaged"),
        (struct.pack("<Q", 1 << 60) + WHOLE[8:], "cut short or damaged .header too large"),
        (struct.pack("<Q", 20) + b'{"a": [[[[[[[[[[[[[[[', "cut short or damaged .invalid JSON"),
        (bytes(1000), "no safetensors file: give the .safetensors"),
        (b"\x08\x07\x12\x07pytorch\xff", "no safetensors file"),
        (b"\x80\x04\x95", "a pickle, which can run code; wsi-mmm models convert"),
    ],
)
def test_what_it_is_and_the_way_out(data: bytes, words: str, tmp_path: Path) -> None:
    """Each kind that the field meets: pages of a hub that wants a login, pointers, cut copies, foreign formats."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    for look in (refuse_foreign, check_weights):
        with pytest.raises(ModelError, match=words) as error:
            look(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_list_of_a_file(tmp_path: Path) -> None:
    """Names, types and shapes; a file that is in order passes."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(WHOLE)
    refuse_foreign(path)
    assert list_tensors(path) == {"a": ("F32", (2,)), "b": ("F16", (3, 4))}
