"""What an encoder computes with, and what it says of anything else."""

from __future__ import annotations

import pytest
import torch

import wsi_mmm
from wsi_mmm.errors import OptionError
from wsi_mmm.model.multitask import MultiTaskModel


@pytest.fixture(scope="module")
def model() -> MultiTaskModel:
    return wsi_mmm.load_model("default")


@pytest.mark.parametrize(
    ("x", "given"),
    [
        (torch.zeros(2, 64, 64, 3, dtype=torch.uint8), "uint8[2, 64, 64, 3]"),
        (torch.zeros(2, 64, 64, 3), "float32[2, 64, 64, 3]"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "uint8[2, 3, 64, 64]"),
        (torch.zeros(3, 64, 64), "float32[3, 64, 64]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pixels_as_they_are_read_are_refused_by_name(x: torch.Tensor, given: str, model: MultiTaskModel) -> None:
    """Not an error from inside a convolution, nor answers that mean nothing; the line names the way."""
    with pytest.raises(OptionError) as caught:
        model.encoder(x)
    assert f"takes normalised float[n, 3, h, w], not {given}" in str(caught.value)
    assert "model.prepare(tiles)" in str(caught.value)


def test_what_prepare_makes_is_taken(model: MultiTaskModel) -> None:
    """One map per stride."""
    x = model.prepare(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    assert [64 // level.shape[-1] for level in model.encoder(x)] == list(model.encoder.strides)
