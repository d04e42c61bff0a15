"""Folding norms: another order of the same sums, and never another function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from wsi_mmm.model.checkpoint import load_encoder, load_model
from wsi_mmm.model.fold import fold_norms
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.model.runner import Runner


def lively(model: MultiTaskModel) -> MultiTaskModel:
    """The model with norms that say something: a fresh one's are nearly the identity."""
    numbers = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, low, high in (("running_mean", -0.5, 0.5), ("running_var", 0.5, 2.0)):
                module.get_buffer(name).uniform_(low, high, generator=numbers)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=numbers)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=numbers)
    return model


def norms(model: nn.Module) -> int:
    """How many batch norms a model has."""
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def noise(side: int = 64) -> Tensor:
    """Two seeded tiles."""
    return torch.randint(0, 256, (2, side, side, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("name", ["mobilenetv4_conv_small", "tf_efficientnet_b0", "resnetv2_50"])
def test_folding_changes_an_encoder_by_rounding_only(name: str) -> None:
    """Activations inside norms, TensorFlow's padding and norms before convolutions included."""
    torch.manual_seed(0)
    model = lively(load_encoder(name, "random"))
    lean = fold_norms(model)[0]
    assert norms(lean) < norms(model)
    with torch.inference_mode():
        wanted, found = (m.features(m.prepare(noise())) for m in (model, lean))
    assert float((wanted - found).abs().max()) <= 1e-4 * float(wanted.abs().max())


def test_heads_and_decoder_are_folded_too(small_model: Path) -> None:
    """Every norm of a model with tasks goes that a convolution feeds alone; the model given is left as it was."""
    model = lively(load_model(small_model))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lean = fold_norms(model)[0]
    assert norms(lean) == len(model.decoder.norm)  # type: ignore[union-attr,arg-type]  # these follow a sum
    with torch.inference_mode():
        wanted, found = (m.forward_all(m.prepare(noise()))[1] for m in (model, lean))
    for task, logits in wanted.items():
        assert torch.allclose(logits, found[task], atol=1e-4 * float(logits.abs().max()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_convolution_that_something_else_reads_too_is_left_alone() -> None:
    """Folding it would change the other reader's input: the answers differ, so the plain model is kept."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)

        def forward(self, x: Tensor) -> list[Tensor]:
            made = self.conv(x)
            return [self.norm(made) + made]

    model = load_encoder("resnet10t", "random")
    model.encoder.backbone, model.encoder.channels, model.encoder.resampled = Twice(), (32,), False
    kept, words = fold_norms(lively(model).eval())
    assert kept is model
    assert words == "not folded: the answers would change by more than 0.0001 of the largest"
    assert Runner(model, "cpu", 1).describe()["norms"] == words


def test_a_model_without_norms_is_not_copied() -> None:
    """A transformer passes as it is."""
    model = load_encoder("convnext_atto", "random")
    assert fold_norms(model) == (model, "none to fold")


def test_a_model_that_cannot_be_tried_runs_as_it_is() -> None:
    """At its card's tile size, which need not be the one it is run at; the report's words say why."""

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)

        def forward(self, x: Tensor) -> list[Tensor]:
            assert x.shape[-1] == 64, "Input width doesn't match model (64)."
            return [self.norm(self.conv(x))]

    model = load_encoder("resnet10t", "random")
    model.encoder.backbone, model.encoder.channels, model.encoder.resampled = Picky(), (32,), False
    runner = Runner(model, "cpu", 1)
    assert runner.model is model
    assert runner.describe()["norms"].startswith("not folded: the model could not be tried at 256 px (Input width")
    assert runner.run(noise().numpy()).features.shape == (2, 32)


def test_the_report_says_how_many_norms_were_folded(small_model: Path) -> None:
    """Of how many."""
    model = load_model(small_model)
    total, left = norms(model), norms(fold_norms(model)[0])
    assert 0 < left < total
    assert Runner(model, "cpu", 1).describe()["norms"] == f"{total - left} of {total} folded into convolutions"
