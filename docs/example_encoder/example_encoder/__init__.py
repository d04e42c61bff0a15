"""An encoder with code of its own, as a package: the facts in encoder.json, and a function that makes the network."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from wsi_mmm.model.registry import EncoderPlugin

if TYPE_CHECKING:
    from torch import nn


def build(weights: Path | None) -> nn.Module:
    """The network with the weights of a file, or with random ones: float32[n, 3, h, w] -> float[n, 32].

    torch is imported here, so that listing encoders stays quick.
    """
    from example_encoder.network import ExampleNetwork
    from wsi_mmm.model.checkpoint import read_tensors

    network = ExampleNetwork()
    if weights is not None:
        tensors, _ = read_tensors(weights)
        network.load_state_dict(tensors)  # strict: what does not fit is an error
    return network


encoder = EncoderPlugin(json.loads(files(__name__).joinpath("encoder.json").read_text(encoding="utf-8")), build)
