"""One vector of a slide from the vectors of its tiles, a block of tiles at a time: exact attention in bounded memory.

The softmax over all tiles is kept as a running maximum, a sum and a weighted sum per head, in float64 (Milakov,
Gimelshein 2018, "Online normalizer calculation for softmax"). On one thread and in the sequence of the tiles, so that
equal features give equal bits whatever computes beside.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor, nn

from wsi_mmm.errors import ModelError, first_line
from wsi_mmm.model.aggregator import GatedScore, MilAggregator
from wsi_mmm.model.card import WEIGHTS, model_path, read_card
from wsi_mmm.model.checkpoint import read_tensors
from wsi_mmm.model.fetch import fetch_model
from wsi_mmm.model.identity import check_weights, model_identity
from wsi_mmm.model.runner import start_one_core_threads
from wsi_mmm.model.slide_model import (
    BAG,
    MEAN,
    SlideModel,
    abmil_identity,
    check_shapes,
    embedding_layers,
    inner_width,
    known_names,
    locate_abmil,
    mean_vector,
)
from wsi_mmm.storage import store
from wsi_mmm.types import F32

PoolTiles = Callable[[Iterable[F32]], F32]
"""Vectors float32[n, D] in blocks -> the slide's vector float32[E]."""


@dataclass(frozen=True, slots=True)
class AttentionPooling:
    """``embed``: float[n, inputs] -> float[n, width]; ``score``: float[n, width] -> float[n, heads], None: all tiles
    count alike. ``shared``: each head weighs its share of the channels; else every head weighs all, and the sums of the
    heads follow each other."""

    name: str
    inputs: int
    embed: nn.Module
    score: nn.Module | None
    shared: bool

    def pool(self, blocks: Iterable[F32]) -> Tensor:
        """float64[E]. ModelError: vectors of another length, no tile."""
        top = total = summed = None
        for block in blocks:
            if block.shape[1] != self.inputs:
                raise ModelError(
                    f"the slide model {self.name} takes tile vectors of {self.inputs} numbers, not {block.shape[1]}"
                )
            if not len(block):
                continue
            x = self.embed(torch.from_numpy(block))
            scores = (x.new_zeros(len(x), 1) if self.score is None else self.score(x)).double()
            highest = scores.amax(dim=0) if top is None else torch.maximum(top, scores.amax(dim=0))
            weights, values = torch.exp(scores - highest), x.double()
            if self.shared:
                part = torch.einsum("nk,nkc->kc", weights, values.unflatten(1, (weights.shape[1], -1)))
            else:
                part = weights.T @ values
            if top is None or total is None or summed is None:
                total, summed = weights.sum(dim=0), part
            else:
                shrink = torch.exp(top - highest)
                total, summed = total * shrink + weights.sum(dim=0), summed * shrink[:, None] + part
            top = highest
        if total is None or summed is None:
            raise ModelError("a slide without tiles has no vector")
        return (summed / total[:, None]).flatten()


def open_slide_model(slide: SlideModel, cache: str | None) -> PoolTiles:
    """The function of a slide model; it computes on one thread of its own.

    ModelError: the model is not there, or not the one that the run was begun with; when called: numbers that are not
    finite, too many tiles for a transformer.
    """
    if slide.kind == MEAN:
        return mean_vector
    pool = _open_bag_model(slide, cache) if slide.kind == BAG else _open_abmil(slide, cache)

    @torch.inference_mode()
    def compute(blocks: Iterable[F32]) -> F32:
        vector = pool(blocks).float()
        if not torch.isfinite(vector).all():
            raise ModelError(
                f"the slide model {slide.name} gives NaN or infinity: its weights are damaged, take others"
            )
        return vector.numpy()

    def run(blocks: Iterable[F32]) -> F32:
        with start_one_core_threads(1, "slide") as thread:
            try:
                return thread.submit(compute, blocks).result()
            except (MemoryError, RuntimeError) as error:
                raise ModelError(
                    f"the slide's tiles are too many for the slide model {slide.name} ({first_line(error)}): "
                    "use a coarser --mpp"
                ) from error

    return run


def _check_identity(slide: SlideModel, found: str) -> None:
    if found != slide.identity:
        place = f"{store.redact(slide.place)} on {os.uname().nodename}"
        raise ModelError(
            f"the slide model {place} is not the one the run was begun with: copy that to every worker, or begin the "
            "run again"
        )


def _open_abmil(slide: SlideModel, cache: str | None) -> Callable[[Iterable[F32]], Tensor]:
    path = locate_abmil(slide.place, cache)
    tensors, sha256 = read_tensors(path)
    kind, names = known_names({key: tuple(value.shape) for key, value in tensors.items()}, str(path))
    _check_identity(slide, abmil_identity(kind, sha256))
    shapes = {ours: shape for ours, (_, shape) in names.items()}
    inputs = check_shapes(shapes, str(path))
    ours = {name: tensors[theirs] for name, (theirs, _) in names.items()}
    for name, value in ours.items():
        if not value.is_floating_point() or not torch.isfinite(value).all():
            raise ModelError(
                f"the weights {path} hold no finite numbers in '{names[name][0]}': take another copy of them"
            )
    embed = nn.Sequential(
        *(part for layer in embedding_layers(ours) for part in (_make_linear(ours, layer), nn.ReLU()))
    )
    score: nn.Module
    if "gate.weight" in ours:
        with torch.device("meta"):
            score = GatedScore(inner_width(shapes), shapes["value.weight"][0], shapes["out.weight"][0])
        score.value, score.gate, score.out = (_make_linear(ours, part) for part in ("value", "gate", "out"))
    else:
        score = nn.Sequential(_make_linear(ours, "value"), nn.Tanh(), _make_linear(ours, "out"))
    return AttentionPooling(slide.name, inputs, embed.eval(), score.eval(), shared=False).pool


def _make_linear(tensors: dict[str, Tensor], name: str) -> nn.Linear:
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return linear


def _open_bag_model(slide: SlideModel, cache: str | None) -> Callable[[Iterable[F32]], Tensor]:
    """The aggregator of a bag model; the rest of its weights is not read but for their hash."""
    here = fetch_model(slide.place, cache)
    card, path = read_card(here), model_path(here) / WEIGHTS
    check_weights(path, card.weights_sha256)
    _check_identity(slide, model_identity(here, card))
    prefix = "grouper."
    with safe_open(path, "pt") as file:
        own = {key.removeprefix(prefix): file.get_tensor(key).float() for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    if not slide.inputs:  # the plain mean of the vectors themselves has no weights
        return lambda blocks: torch.from_numpy(mean_vector(blocks))
    with torch.device("meta"):
        grouper = MilAggregator(card.bag, slide.inputs)
    try:
        grouper.load_state_dict(own, assign=True)
    except RuntimeError as error:
        raise ModelError(f"the weights {path} do not fit the bag of their card ({first_line(error)})") from error
    grouper.eval()
    if len(grouper.blocks):  # its tiles look at each other
        return lambda blocks: _pool_whole(grouper, blocks)
    return AttentionPooling(slide.name, slide.inputs, grouper.embed, grouper.score, shared=True).pool


def _pool_whole(grouper: MilAggregator, blocks: Iterable[F32]) -> Tensor:
    x = torch.cat([torch.from_numpy(block) for block in blocks])
    if not len(x):
        raise ModelError("a slide without tiles has no vector")
    vectors: Tensor = grouper(x, torch.zeros(len(x), dtype=torch.int64))[0]
    return vectors[0].double()
