"""Weights are read once by a process: for their hash and for the model that is made of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from helpers.commands import invoke
from wsi_mmm import api
from wsi_mmm.engine.stages import context
from wsi_mmm.model.checkpoint import load_encoder, read_ahead
from wsi_mmm.model.choose import EncoderOptions
from wsi_mmm.model.kept_weights import keep_weights, may_keep, take_weights
from wsi_mmm.slides.fake import synthetic_slide

ENCODER = "test_vit"
COLOURS = {"mean": "0.5,0.5,0.5", "std": "0.5,0.5,0.5"}
SAID = EncoderOptions(None, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """A file of 1.5 MB."""
    save_file(timm.create_model(ENCODER, num_classes=0).state_dict(), tmp_path / "w.safetensors")
    return str(tmp_path / "w.safetensors")


@pytest.fixture
def slide(tmp_path: Path) -> str:
    synthetic_slide(tmp_path / "s.tiff", 1, width=128, height=128, mpp=0.5, nuclei=5)
    return str(tmp_path / "s.tiff")


@pytest.fixture
def bytes_read(weights: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of bytes that Python reads of the file, a number per reading of more than its header."""
    found: list[int] = []
    opened = Path.open

    class CountingFile(io.BufferedReader):
        def readinto(self, buffer: Any) -> int:
            count = super().readinto(buffer)
            found.append(count)
            return count

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            found.append(len(data))
            return data

    def count_open(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if str(self) != weights:
            return opened(self, mode, *rest, **more)
        return CountingFile(io.FileIO(weights))

    monkeypatch.setattr(Path, "open", count_open)
    context.release()
    return found


def test_a_run_in_one_process_reads_its_weights_once(
    slide: str, weights: str, tmp_path: Path, bytes_read: list[int]
) -> None:
    """By the library and by the command; nothing is left in memory. The first bytes are looked at beforehand."""
    size = Path(weights).stat().st_size
    options: dict[str, Any] = {"weights": weights, "tissue": "none", "tile_size": 64, "device": "cpu", **COLOURS}
    assert api.embed(slide, ENCODER, output=tmp_path / "a", **options).exit_code == 0
    assert size <= sum(bytes_read) < 1.1 * size
    assert not may_keep()
    assert take_weights(Path(weights)) is None
    bytes_read.clear()
    context.release()
    given = [f"--{name}={value}" for name, value in COLOURS.items()]
    command = ["embed", slide, "--encoder", ENCODER, "--weights", weights, "--tissue", "none", "--tile-size", "64"]
    assert invoke(*command, *given, "-o", str(tmp_path / "b")).exit_code == 0
    assert size <= sum(bytes_read) < 1.1 * size


def test_a_dry_run_keeps_nothing(slide: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the file for its hash, in pieces."""
    monkeypatch.setattr("wsi_mmm.model.checkpoint.read_ahead", lambda _: pytest.fail("read into memory"))
    given = [f"--{name}={value}" for name, value in COLOURS.items()]
    command = ["embed", slide, "--encoder", ENCODER, "--weights", weights, "--tissue", "none", "--dry-run"]
    assert invoke(*command, *given, "-o", str(tmp_path / "b")).exit_code == 0


def test_an_encoder_loaded_by_name_is_read_once(weights: str, bytes_read: list[int]) -> None:
    """Its hash is found as it is read."""
    load_encoder(ENCODER, weights, options=SAID)
    assert sum(bytes_read) < 1.1 * Path(weights).stat().st_size


def test_what_is_kept_goes_to_one_model_and_ends_with_the_context(weights: str) -> None:
    """A model owns its tensors; outside the context nothing is kept."""
    path = Path(weights)
    with keep_weights(), keep_weights():
        sha256 = read_ahead(path)
        tensors, found = take_weights(path) or ({}, "")
        assert found == sha256
        assert all(isinstance(value, torch.Tensor) for value in tensors.values())
        assert take_weights(path) is None
        read_ahead(path)
    assert take_weights(path) is None
    read_ahead(path)
    assert take_weights(path) is None


def test_numbers_that_are_none_are_said_before_any_slide(weights: str, slide: str, tmp_path: Path) -> None:
    """What was read for the hash is looked at as well: nothing is written."""
    tensors = timm.create_model(ENCODER, num_classes=0).state_dict()
    tensors["norm.bias"][1] = float("nan")
    save_file(tensors, weights)
    asked = ["embed", slide, "--encoder", ENCODER, "--weights", weights, "-o", str(tmp_path / "out")]
    result = invoke(*asked, *(word for name, value in COLOURS.items() for word in (f"--{name}", value)))
    assert result.exit_code == 1
    assert "hold NaN or infinity in 'norm.bias': take another copy of them" in result.output
    assert not (tmp_path / "out").exists()
