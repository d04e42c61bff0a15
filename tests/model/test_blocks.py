"""Global pooling, decoders and neck: shapes, and what each kind promises."""

from __future__ import annotations

import pytest
import torch

from wsi_mmm.errors import ModelError
from wsi_mmm.model.blocks import GlobalPooling, Neck, Resize, build_decoder, build_pool
from wsi_mmm.model.card import DecoderCard, NeckCard, SqueezerCard

CHANNELS = (8, 12, 16, 24, 32)
STRIDES = (2, 4, 8, 16, 32)


def pyramid(side: int = 64, seed: int = 0) -> list[torch.Tensor]:
    """Random maps of an encoder with strides 2 to 32."""
    dice = torch.Generator().manual_seed(seed)
    return [torch.randn(2, c, side // s, side // s, generator=dice) for c, s in zip(CHANNELS, STRIDES, strict=True)]


@pytest.mark.parametrize("kind", ["mean", "max", "gem", "attention"])
def test_pooling_does_not_know_where_things_are(kind: str) -> None:
    """A permutation of the positions leaves every kind of pooling unchanged; any map size will do; gradients flow."""
    torch.manual_seed(0)
    pool = build_pool(SqueezerCard.model_validate({"kind": kind, "heads": 2}), 6).double()
    for parameter in pool.parameters():
        torch.nn.init.normal_(parameter, 1.0)
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    mixed = x.flatten(2)[:, :, torch.randperm(20)].reshape(3, 6, 10, 2)
    assert pool(x).shape == (3, 6)
    torch.testing.assert_close(pool(mixed), pool(x))
    pool(x).square().sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def test_attention_pooling_begins_as_the_mean_and_looks_where_it_learns_to() -> None:
    """Fresh, it is the mean; with a score for one feature, the position that has the feature wins all."""
    pool = build_pool(SqueezerCard(kind="attention", heads=1), 4)
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pool(x), x.mean((2, 3)))
    x[:, :, 1, 2] = torch.tensor([9.0, 1.0, 1.0, 1.0])
    with torch.no_grad():
        pool.score.weight[0, 0] = 200.0  # type: ignore[union-attr, index, operator]
    x[:, 0].masked_fill_(x[:, 0] < 9, -1.0)
    torch.testing.assert_close(pool(x), x[:, :, 1, 2], atol=1e-4, rtol=1e-4)


def test_generalised_mean_lies_between_mean_and_maximum() -> None:
    """Power 1 is the mean of positive values, a large power nearly the maximum; huge values do not overflow."""
    pool = build_pool(SqueezerCard(kind="gem"), 4)
    x = torch.rand(2, 4, 5, 5, generator=torch.Generator().manual_seed(0)) + 0.1
    power = pool.get_parameter("power")
    power.data.fill_(1.0)
    torch.testing.assert_close(pool(x), x.mean((2, 3)))
    power.data.fill_(200.0)
    torch.testing.assert_close(pool(x), x.amax((2, 3)), rtol=0.03, atol=0)
    assert bool(torch.isfinite(pool(x * 1e30)).all())


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    """The message names the option."""
    with pytest.raises(ModelError, match=r"squeezer\.heads is 5"):
        GlobalPooling(32, 16, SqueezerCard(kind="attention", heads=5))


@pytest.mark.parametrize("kind", ["unet", "fpn"])
def test_decoders_give_the_finest_map(kind: str) -> None:
    """Either kind gives float[n, width, h / 2, w / 2] and lets gradients reach every level."""
    card = DecoderCard.model_validate({"kind": kind, "widths": [8] * 4, "bottleneck": 16})
    decoder, maps = build_decoder(card, 16, CHANNELS[:-1]), pyramid()
    bottleneck = torch.randn(2, 16, 2, 2, requires_grad=True)
    for one in maps[:-1]:
        one.requires_grad_()
    out = decoder(bottleneck, maps)
    assert out.shape == (2, 8, 32, 32)
    out.square().sum().backward()
    assert all(one.grad is not None and bool(one.grad.any()) for one in [bottleneck, *maps[:-1]])


def test_an_fpn_of_several_widths_is_refused() -> None:
    """It has one width, and says how to write that."""
    with pytest.raises(ModelError, match="4 times the same number"):
        build_decoder(DecoderCard(kind="fpn"), 16, CHANNELS[:-1])


def test_the_neck_gives_a_map_of_stride_four() -> None:
    """Levels finer than 4 are not looked at; an encoder without a level of stride 4 is refused."""
    neck, maps = Neck(NeckCard(width=10), CHANNELS, STRIDES).eval(), pyramid()
    out = neck(maps)
    assert out.shape == (2, 10, 16, 16)
    assert torch.equal(neck([torch.zeros_like(maps[0]), *maps[1:]]), out)
    assert not torch.equal(neck([*maps[:-1], torch.zeros_like(maps[-1])]), out)
    with pytest.raises(ModelError, match="stride 4"):
        Neck(NeckCard(), (8, 16), (8, 16))


def test_maps_are_resized_only_when_they_must() -> None:
    """The very tensor at the wanted stride; twice the size from stride 4."""
    x = torch.randn(1, 3, 4, 6)
    assert Resize(2, 2)(x) is x
    assert Resize(4, 2)(x).shape == (1, 3, 8, 12)
