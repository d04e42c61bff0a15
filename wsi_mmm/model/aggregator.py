"""Aggregators: the vectors of many tiles -> one vector per bag, and how much each tile had to say.

Bags are ragged: ``vectors`` float[m, D] with ``bag`` int64[m], the number 0 .. b - 1 of the bag that each belongs to,
in any order. Nothing is padded but inside the transformer, where tiles of one bag look at each other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import BagCard


class MilAggregator(nn.Module):
    """(vectors float[m, D], bag int64[m]) -> (bag vectors float[b, width], attention float[m], sum 1 per bag).

    "mean": all tiles count alike. "gated": gated attention (Ilse, Tomczak, Welling 2018, equation 9). "transformer":
    self-attention within each bag, without positions, then gated attention. A bag without tiles is a vector of zeros.
    """

    def __init__(self, card: BagCard, inputs: int) -> None:
        super().__init__()
        self.width = card.width or inputs
        if self.width % card.heads:
            raise ModelError(f"bag.heads is {card.heads}, which does not divide the bag's {self.width} channels")
        self.embed: nn.Module = nn.Identity()
        if card.width:
            norm, linear = nn.LayerNorm(inputs), nn.Linear(inputs, card.width)
            self.embed = nn.Sequential(norm, linear, nn.GELU(), nn.Dropout(card.dropout))
        layers = card.layers if card.kind == "transformer" else 0
        self.blocks = nn.ModuleList(BagBlock(self.width, card.heads, card.dropout) for _ in range(layers))
        self.score = None if card.kind == "mean" else GatedScore(self.width, card.hidden, card.heads)

    def forward(self, vectors: Tensor, bag: Tensor, bags: int | None = None) -> tuple[Tensor, Tensor]:
        """``bags``: number of bags (None: the largest number in ``bag`` and those below it)."""
        count = (int(bag.max()) + 1 if len(bag) else 0) if bags is None else bags
        x = self.embed(vectors)
        if len(self.blocks) and len(x):
            x = self._run_blocks(x, bag, count)
        scores = x.new_zeros(len(x), 1) if self.score is None else self.score(x)
        weights = softmax_per_bag(scores, bag, count)  # float32 also under autocast: sums of many small numbers
        shares = x.unflatten(1, (weights.shape[1], -1)) * weights[:, :, None]
        return sum_per_bag(shares.flatten(1), bag, count), weights.mean(dim=1)

    def _run_blocks(self, x: Tensor, bag: Tensor, count: int) -> Tensor:
        """Rows laid out as padded bags [b, longest, width] for the blocks, and back."""
        place = _place_in_bag(bag, count)
        padded = x.new_zeros(count, int(place.max()) + 1, x.shape[1])
        there = torch.zeros(padded.shape[:2], dtype=torch.bool, device=x.device)
        padded[bag, place], there[bag, place] = x, True
        for block in self.blocks:
            padded = block(padded, there)
        return padded[bag, place]


class GatedScore(nn.Module):
    """float[m, width] -> scores float[m, heads]: w (tanh(V h) * sigmoid(U h))."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, heads)

    def forward(self, x: Tensor) -> Tensor:
        """One row per tile, each on its own."""
        y: Tensor = self.out(torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x)))
        return y


class BagBlock(nn.Module):
    """A transformer block, norms first, over padded bags; padding is never looked at."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """``x`` float[b, longest, width], ``there`` bool[b, longest]: rows that are tiles."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = (there | ~there.any(dim=1, keepdim=True))[:, None, None]  # a bag of none would divide by zero
        found = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.drop(self.out(found.transpose(1, 2).flatten(2)))
        y: Tensor = x + self.drop(self.mlp(self.norm2(x)))
        return y


def _place_in_bag(bag: Tensor, count: int) -> Tensor:
    """int64[m]: how many rows of the same bag come before each row."""
    ranking = torch.argsort(bag, stable=True)
    sizes = torch.bincount(bag, minlength=count)
    place = torch.empty_like(bag)
    place[ranking] = torch.arange(len(bag), device=bag.device) - (sizes.cumsum(0) - sizes)[bag[ranking]]
    return place


def sum_per_bag(values: Tensor, bag: Tensor, count: int) -> Tensor:
    """float[m, k] -> float[count, k]: sums over the rows of each bag."""
    return values.new_zeros(count, values.shape[1]).index_add(0, bag, values)


def softmax_per_bag(scores: Tensor, bag: Tensor, count: int) -> Tensor:
    """float[m, k] -> float[m, k]: softmax over the rows of each bag, in float32 at least."""
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    where = bag[:, None].expand_as(scores)
    top = (
        scores.detach().new_full((count, scores.shape[1]), -torch.inf).scatter_reduce(0, where, scores.detach(), "amax")
    )
    raised = torch.exp(scores - top[bag])
    return raised / sum_per_bag(raised, bag, count)[bag]
