"""The multi-task model: every head from one encoder pass, old cards as they were, frozen parts that stay."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import ModelCard, TaskCard, card_json, read_card
from wsi_mmm.model.checkpoint import build_model, declared_normalisation, load_model, save_model
from wsi_mmm.model.fold import fold_norms
from wsi_mmm.model.identity import model_identity
from wsi_mmm.model.layers import depth_of, freeze, layers
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.model.runner import Runner

HEADS = {"map": 3, "vector": 2, "bag": 2, "dense": 5, "image": 3}


def task(head: str, outputs: int) -> TaskCard:
    """A task of a head; its kind plays no role here."""
    return TaskCard.model_validate(
        {"name": head, "kind": "x", "head": head, "outputs": outputs, "classes": ["a"], "colors": [[0, 0, 0]]}
    )


def card(name: str = "resnet18", *, args: object = None, levels: int = 4, **fields: object) -> ModelCard:
    """A card with a task for each kind of head."""
    base: dict[str, object] = {
        "name": "all", "encoder": {"name": name, "args": args or {}},
        "decoder": {"bottleneck": 16, "widths": [8] * levels}, "neck": {"width": 8},
        "bag": {"width": 8, "hidden": 4}, "mpp": 0.5, "tile_size": 64, "overlap": 0,
        "mean": [0.7, 0.6, 0.7], "std": [0.2, 0.2, 0.2], "tasks": [task(*pair) for pair in HEADS.items()],
    }  # fmt: skip
    return ModelCard.model_validate(base | fields)


SMALL = {"channels": [8, 16, 24, 32]}
OPTIONS = [
    {},
    {"squeezer": {"kind": "gem"}},
    {"squeezer": {"kind": "attention"}, "bag": {"kind": "transformer", "width": 8, "hidden": 4, "heads": 2}},
    {
        "squeezer": {"kind": "max"},
        "decoder": {"kind": "fpn", "bottleneck": 16, "widths": [8] * 4},
        "bag": {"kind": "mean"},
    },
]


@pytest.fixture(scope="module")
def model() -> MultiTaskModel:
    """Seeded random weights, in evaluation mode."""
    torch.manual_seed(0)
    return build_model(card(args=SMALL)).eval()


def answers(model: MultiTaskModel, seed: int = 0) -> dict[str, torch.Tensor]:
    """Everything the model says of two random tiles and of bags of 1 and 3 vectors."""
    dice = torch.Generator().manual_seed(seed)
    x = model.prepare(torch.randint(0, 256, (2, 64, 64, 3), generator=dice, dtype=torch.uint8))
    vectors, bag = torch.randn(4, model.vector_width, generator=dice), torch.tensor([0, 1, 1, 1])
    with torch.inference_mode():
        vector, logits = model.forward_all(x)
        bags, attention = model.bag_logits(vectors, bag)
    return {"": vector, **logits, **bags, "attention": attention["bag"]}


def test_every_head_answers(model: MultiTaskModel) -> None:
    """Maps at stride 2, dense at 4, images at 1, vectors per tile, bags per bag; the tile pass leaves bags out."""
    found = {name: tuple(value.shape) for name, value in answers(model).items()}
    assert found == {
        "": (2, 32), "map": (2, 3, 32, 32), "vector": (2, 2), "dense": (2, 5, 16, 16), "image": (2, 3, 64, 64),
        "bag": (2, 2), "attention": (4,),
    }  # fmt: skip
    x = model.prepare(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    assert set(model(x, ["bag", "vector"])) == {"vector"}


def test_one_encoder_pass_serves_all_heads(model: MultiTaskModel) -> None:
    """Asked for all tasks, the encoder runs once; shared parts that no asked-for task reads do not run."""
    calls: list[str] = []
    parts = {"encoder": model.encoder, "decoder": model.decoder, "neck": model.neck, "grouper": model.grouper}
    handles = [
        part.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, part in parts.items() if part
    ]
    x = model.prepare(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    model(x)
    assert sorted(calls) == ["decoder", "encoder", "neck"]
    calls.clear()
    model(x, ["vector"])
    assert calls == ["encoder"]
    for handle in handles:
        handle.remove()


def test_a_task_without_a_bag_head_has_no_bag_logits(model: MultiTaskModel) -> None:
    """Named, or in a model that has none at all."""
    vectors, bag = torch.zeros(1, 32), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ModelError, match="task 'map' is not answered per bag"):
        model.bag_logits(vectors, bag, ["map"])
    with pytest.raises(ModelError, match="no task that is answered per bag"):
        build_model(card(args=SMALL, tasks=[task("vector", 2)])).bag_logits(vectors, bag)


@pytest.mark.parametrize("options", OPTIONS)
def test_any_choice_of_parts_survives_saving(options: dict[str, object], tmp_path: Path) -> None:
    """Card and weights come back; the answers are the same to the bit; folded, it says the same but for rounding."""
    torch.manual_seed(0)
    model = build_model(card(args=SMALL, **options)).eval()
    written = save_model(model, tmp_path, half=False)
    again = load_model(tmp_path)
    assert again.card == written == read_card(tmp_path)
    one, two, lean = answers(model), answers(again), answers(fold_norms(again)[0])
    assert all(torch.equal(one[name], two[name]) for name in one)
    for name, value in one.items():
        torch.testing.assert_close(lean[name], value, rtol=1e-3, atol=1e-4)


def test_the_runner_leaves_bags_out(model: MultiTaskModel) -> None:
    """A run with all tasks answers what tiles can answer."""
    runner = Runner(model, "cpu", 1, quantise={name: lambda x: x for name in HEADS})
    found = runner.run(np.zeros((3, 64, 64, 3), np.uint8), list(HEADS))
    assert set(found.maps) == {"map", "dense", "image"} and set(found.tables) == {"vector"}
    runner.close()


@pytest.mark.parametrize(
    ("encoder", "levels"),
    [
        ("convnext_atto", 3),
        ("vit_tiny_patch16_224", 3),
        ("swin_tiny_patch4_window7_224", 3),
        ("mobilenetv4_conv_small", 4),
    ],
)
def test_maps_have_the_tasks_stride_with_any_encoder(encoder: str, levels: int) -> None:
    """Also an encoder whose finest map has stride 4 gives map heads stride 2, images stride 1, dense heads stride 4."""
    model = build_model(card(encoder, levels=levels, bag={"width": 8, "hidden": 4, "heads": 1})).eval()
    with torch.inference_mode():
        found = model(torch.zeros(1, 3, 224, 224))
    assert [found[name].shape[-1] for name in ("map", "image", "dense")] == [112, 224, 56]


def test_old_cards_stay_as_they_are(tmp_path: Path) -> None:
    """A card from before there were necks, bags and norms is written back as the very text on disk, and its model's
    identity has not moved."""
    text = (Path(__file__).parent / "old_card.json").read_text(encoding="utf-8")
    (tmp_path / "card.json").write_text(text, encoding="utf-8")
    old = read_card(tmp_path)
    assert json.loads(card_json(old)) == json.loads(text)
    assert not {"squeezer", "neck", "bag"} & set(json.loads(card_json(old)))
    assert model_identity("default", old).startswith("322310ab800c4f73")


def test_what_changes_answers_changes_the_identity() -> None:
    """Pooling has no weights of its own, and counts."""
    old = read_card("default")
    new = ModelCard.model_validate(old.model_dump() | {"squeezer": {"kind": "max"}})
    assert json.loads(card_json(new))["squeezer"] == {"kind": "max", "heads": 4}
    assert model_identity("default", new) != model_identity("default", old)


def test_frozen_statistics_stay_while_training() -> None:
    """encoder.norm "frozen": a training pass moves no statistics of the encoder, but those of the other parts."""
    model = build_model(card(args=SMALL, encoder={"name": "resnet18", "args": SMALL, "norm": "frozen"})).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(torch.randn(2, 3, 64, 64))
    moved = {name for name, value in model.named_buffers() if not torch.equal(value, before[name])}
    assert moved and not any(name.startswith("encoder.") for name in moved)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("encoder", "depths"),
    [
        ("resnet18", 5),
        ("convnext_atto", 5),
        ("vit_tiny_patch16_224", 13),
        ("mobilenetv4_conv_small", 6),
        ("vgg11", None),
    ],
)
def test_layers_go_from_the_pixels_to_the_answers(encoder: str, depths: int | None) -> None:
    """Every parameter once; the encoder's depths rise from 0 in its own order; then shared parts, then heads."""
    levels = {"convnext_atto": 3, "vit_tiny_patch16_224": 3, "vgg11": 5}.get(encoder, 4)
    model = build_model(card(encoder, levels=levels))
    found = layers(model)
    assert [layer.name for layer in found] == [name for name, _ in model.named_parameters()]
    own = [layer.depth for layer in found if layer.name.startswith("encoder.")]
    assert own == sorted(own) and set(own) == set(range(max(own) + 1))
    assert depths is None or max(own) + 1 == depths
    assert {
        layer.depth for layer in found if layer.name.startswith(("squeezer.", "decoder.", "neck.", "grouper."))
    } == {max(own) + 1}
    assert {layer.depth for layer in found if layer.name.startswith("heads.")} == {max(own) + 2}
    assert depth_of(model) == max(own) + 3


def test_freezing_stops_weights_and_statistics_below() -> None:
    """freeze(model, 3) holds the stem and two stages, their norms' statistics too; freeze(model, 0) lets all go."""
    model = build_model(card(args=SMALL)).train()
    held = freeze(model, 3)
    assert held == sum(layer.depth < 3 for layer in layers(model)) > 0
    before = {name: value.clone() for name, value in model.named_buffers()}
    sum(value.square().mean() for value in model(torch.randn(2, 3, 64, 64)).values()).backward()  # type: ignore[union-attr]
    moved = {name for name, value in model.named_buffers() if not torch.equal(value, before[name])}
    assert not any(name.startswith(("encoder.backbone.bn1", "encoder.backbone.layer2")) for name in moved)
    assert any(name.startswith("encoder.backbone.layer3") for name in moved)
    assert all((layer.parameter.grad is None) for layer in layers(model) if layer.depth < 3)
    assert freeze(model, 0) == 0
    assert all(p.requires_grad for p in model.parameters())
    assert model.get_submodule("encoder.backbone.bn1").training


def test_the_normalisation_is_what_timm_declares() -> None:
    """Inception-style halves for a ViT that was trained with them, ImageNet's for a ResNet."""
    assert declared_normalisation("vit_tiny_patch16_224") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert declared_normalisation("resnet18")[0] == (0.485, 0.456, 0.406)


def test_a_model_begins_from_a_local_encoder_file(tmp_path: Path) -> None:
    """Weights under timm's own names fill the encoder; no norm of it is swapped for another."""
    import timm
    from safetensors.torch import save_file

    plain = timm.create_model("resnet18", **SMALL)
    save_file({k: v.contiguous() for k, v in plain.state_dict().items()}, tmp_path / "w.safetensors")
    model = build_model(card(args=SMALL), weights=str(tmp_path / "w.safetensors"))
    assert torch.equal(model.get_parameter("encoder.backbone.layer1.0.conv1.weight"), plain.layer1[0].conv1.weight)
    kinds = [type(m) for m in plain.modules() if "Norm" in type(m).__name__]
    assert [type(m) for m in model.encoder.modules() if "Norm" in type(m).__name__] == kinds
