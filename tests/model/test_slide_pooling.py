"""Vectors of slides against plain torch in float64, written from the published equations (Ilse 2018; MIL-Lab; CLAM)."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import ModelCard
from wsi_mmm.model.checkpoint import build_model, save_model
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.model.slide_model import SlideModel, TileVectors, choose_slide_model, mean_vector
from wsi_mmm.model.slide_pooling import open_slide_model

INPUTS, WIDTH, HIDDEN = 24, 16, 12
TILES = np.random.default_rng(0).normal(size=(700, INPUTS)).astype(np.float32) * 3
VECTORS = TileVectors("uni2-h", "abc", INPUTS, 0.5, 64, 0)


def blocks(vectors: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """The rows a few at a time."""
    for start in range(0, len(vectors), size):
        yield vectors[start : start + size]


def linear(out: int, inputs: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return scale * torch.randn(out, inputs) / inputs**0.5, 0.1 * torch.randn(out)


def mil_lab(layers: int = 1, heads: int = 1, *, gate: bool = True, classes: int = 3) -> dict[str, Tensor]:
    """Tensors as MIL-Lab's ABMILModel saves them; strong attention, so that the softmax matters."""
    torch.manual_seed(layers + 10 * heads)
    parts = {f"patch_embed.{3 * n}": linear(WIDTH, WIDTH if n else INPUTS) for n in range(layers)}
    if gate:
        parts |= {f"global_attn.attention_{one}.0": linear(HIDDEN, WIDTH, 3) for one in "ab"}
        parts["global_attn.attention_c"] = linear(heads, HIDDEN, 20)
    else:
        parts |= {"global_attn.module.0": linear(HIDDEN, WIDTH), "global_attn.module.3": linear(heads, HIDDEN, 20)}
    if classes:
        parts["classifier"] = linear(classes, WIDTH * heads)
    return {
        f"model.{name}.{kind}": value for name, both in parts.items() for kind, value in zip(KINDS, both, strict=True)
    }


KINDS = ("weight", "bias")


def clam() -> dict[str, Tensor]:
    """Tensors as CLAM's CLAM_SB saves them."""
    torch.manual_seed(5)
    parts = {
        "attention_net.0": linear(WIDTH, INPUTS), "attention_net.3.attention_a.0": linear(HIDDEN, WIDTH),
        "attention_net.3.attention_b.0": linear(HIDDEN, WIDTH), "attention_net.3.attention_c": linear(1, HIDDEN, 20),
        "classifiers": linear(2, WIDTH), "instance_classifiers.0": linear(2, WIDTH),
        "instance_classifiers.1": linear(2, WIDTH),
    }  # fmt: skip
    return {f"{name}.{kind}": value for name, both in parts.items() for kind, value in zip(KINDS, both, strict=True)}


def abmil_reference(tensors: dict[str, Tensor], embed: list[str], score: list[str], vectors: np.ndarray) -> np.ndarray:
    """h = ReLU(W x + b) per layer, A = softmax over tiles, A^T h per head one after the other; float64."""

    def apply(name: str, x: Tensor) -> Tensor:
        return x @ tensors[f"{name}.weight"].double().T + tensors[f"{name}.bias"].double()

    h = torch.from_numpy(vectors).double()
    for name in embed:
        h = torch.relu(apply(name, h))
    inner = torch.tanh(apply(score[0], h))
    if len(score) == 3:
        inner = inner * torch.sigmoid(apply(score[1], h))
    weights = torch.softmax(apply(score[-1], inner), dim=0)
    assert weights.max() > 3 / len(vectors)  # else any mean would do
    return (weights.T @ h).flatten().numpy()


GATED = ["model.global_attn.attention_a.0", "model.global_attn.attention_b.0", "model.global_attn.attention_c"]
PLAIN = ["model.global_attn.module.0", "model.global_attn.module.3"]
FIRST = ["model.patch_embed.0"]
CLAM = [f"attention_net.3.attention_{one}" for one in ("a.0", "b.0", "c")]


@pytest.mark.parametrize(
    ("tensors", "embed", "score", "kind"),
    [
        (mil_lab(), FIRST, GATED, "MIL-Lab"),
        (mil_lab(classes=0), FIRST, GATED, "MIL-Lab"),
        (mil_lab(3, 2), [*FIRST, "model.patch_embed.3", "model.patch_embed.6"], GATED, "MIL-Lab"),
        (mil_lab(gate=False), FIRST, PLAIN, "MIL-Lab"),
        (clam(), ["attention_net.0"], CLAM, "CLAM"),
    ],
    ids=["feather", "headless", "deep", "plain", "clam"],
)
def test_an_abmil_gives_the_vector_of_its_equations(
    tensors: dict[str, Tensor], embed: list[str], score: list[str], kind: str, tmp_path: Path
) -> None:
    """To 1e-6 for any blocks, in float32; a copy elsewhere has the same identity, other weights another."""
    save_file(tensors, tmp_path / "model.safetensors")
    slide = choose_slide_model(str(tmp_path), None, VECTORS)
    assert (slide.kind, slide.inputs, slide.foreign) == (kind, INPUTS, True)
    wanted = abmil_reference(tensors, embed, score, TILES)
    pool = open_slide_model(slide, None)
    for size in (1, 64, 699, 10_000):
        found = pool(blocks(TILES, size))
        assert found.dtype == np.float32 and found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    assert pool(blocks(TILES, 64)).tobytes() == pool(blocks(TILES, 64)).tobytes()
    shuffled = pool(blocks(TILES[np.random.default_rng(1).permutation(len(TILES))], 64))
    assert np.abs(shuffled - wanted).max() <= 1e-6 * np.abs(wanted).max()
    save_file(tensors, tmp_path / "copy.safetensors")
    assert choose_slide_model(str(tmp_path / "copy.safetensors"), None, VECTORS).identity == slide.identity
    save_file({**tensors, next(iter(tensors)): next(iter(tensors.values())) + 1}, tmp_path / "model.safetensors")
    (tmp_path / "copy.safetensors").unlink()
    assert choose_slide_model(str(tmp_path), None, VECTORS).identity != slide.identity
    with pytest.raises(ModelError, match="is not the one the run was begun with: copy that"):
        open_slide_model(slide, None)


@pytest.mark.parametrize("inputs", [768, 1536, 1024], ids=["conch_v15", "uni_v2", "uni"])
def test_feather_has_its_published_shapes(inputs: int, tmp_path: Path) -> None:
    """One layer to 512, gated attention of 384, one head, no classifier; the vector has 512 numbers."""
    torch.manual_seed(inputs)
    parts = {"model.patch_embed.0": linear(512, inputs), **{name: linear(384, 512, 3) for name in GATED[:2]}}
    parts[GATED[2]] = linear(1, 384, 20)
    tensors = {f"{name}.{kind}": value for name, both in parts.items() for kind, value in zip(KINDS, both, strict=True)}
    save_file(tensors, tmp_path / "model.safetensors")
    tiles = np.random.default_rng(2).normal(size=(60, inputs)).astype(np.float32)
    slide = choose_slide_model(str(tmp_path), None, TileVectors("e", "i", inputs, 0.5, 256, 0))
    found, wanted = open_slide_model(slide, None)(blocks(tiles, 25)), abmil_reference(tensors, FIRST, GATED, tiles)
    assert found.shape == (512,)
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_blocks_are_let_go(tmp_path: Path) -> None:
    """However many tiles a slide has: at most two blocks are alive at once."""
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def make_blocks() -> Iterator[np.ndarray]:
        nonlocal most
        for seed in range(30):
            block = np.random.default_rng(seed).normal(size=(50, INPUTS)).astype(np.float32)
            alive.append(weakref.ref(block))
            yield block
            del block
            most = max(most, sum(one() is not None for one in alive))

    save_file(mil_lab(), tmp_path / "m.safetensors")
    for slide in (SlideModel(), choose_slide_model(str(tmp_path), None, VECTORS)):
        open_slide_model(slide, None)(make_blocks())
    assert most <= 2


def test_huge_scores_do_not_overflow(tmp_path: Path) -> None:
    """Scores of thousands, falling and rising: one tile takes all, and the vector is its embedding."""
    tensors = mil_lab()
    tensors["model.global_attn.attention_c.weight"] *= 1e5
    save_file(tensors, tmp_path / "m.safetensors")
    pool = open_slide_model(choose_slide_model(str(tmp_path), None, VECTORS), None)
    wanted = abmil_reference(tensors, FIRST, GATED, TILES)
    for rows in (TILES, TILES[::-1].copy()):
        found = pool(blocks(rows, 7))
        assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_the_mean_is_summed_in_float64() -> None:
    """A million values beside a large one: float32 sums would lose them; blocks do not matter."""
    vectors = np.full((100_001, 2), 0.1, np.float32)
    vectors[0] = 1e8
    exact = (1e8 + 100_000 * float(np.float32(0.1))) / 100_001
    for size in (1000, 4096, 200_000):
        assert mean_vector(blocks(vectors, size)).tolist() == [np.float32(exact)] * 2
    with pytest.raises(ModelError, match="without tiles"):
        mean_vector(iter([np.zeros((0, 3), np.float32)]))


# ---------------------------------------------------------------- bag models of ours

CARD: dict[str, Any] = {
    "format": "wsi-mmm-model/1", "name": "bags", "licence": "CC-BY-4.0",
    "encoder": {"name": "resnet18", "args": {"channels": [8, 8, 8, INPUTS]}},
    "decoder": {"bottleneck": 8, "widths": [8, 8, 8, 8]}, "mpp": 0.5, "tile_size": 64, "overlap": 0,
    "mean": [0.7, 0.6, 0.7], "std": [0.2, 0.2, 0.2],
    "tasks": [{"name": "grade", "kind": "classify", "head": "bag", "outputs": 2, "classes": ["a", "b"],
               "colors": [[90, 90, 90]] * 2}],
}  # fmt: skip


def bag_model(folder: Path, **bag: Any) -> MultiTaskModel:
    """A model folder with random weights and strong attention."""
    torch.manual_seed(3)
    made = build_model(ModelCard.model_validate({**CARD, "bag": bag})).eval()
    if made.grouper is not None and made.grouper.score is not None:
        made.grouper.score.out.weight.data *= 20  # type: ignore[operator, union-attr]
    save_model(made, folder, half=False)
    return made


def choose_bag_model(folder: Path, **changed: Any) -> SlideModel:
    """The bag model for the vectors of its own encoder."""
    from wsi_mmm.model.card import read_card
    from wsi_mmm.model.identity import model_identity

    own = model_identity(str(folder), read_card(folder))
    facts = {"encoder": "own", "identity": own, "width": 0, "mpp": 0.5, "tile": 64, "overlap": 0, **changed}
    return choose_slide_model(str(folder), None, TileVectors(**facts))


@pytest.mark.parametrize(
    "bag",
    [
        {"kind": "gated", "width": 8, "hidden": 5, "heads": 2}, {"kind": "gated", "width": 0, "hidden": 5},
        {"kind": "mean", "width": 8}, {"kind": "mean", "width": 0},
        {"kind": "transformer", "width": 8, "heads": 2, "layers": 1, "hidden": 4},
    ],
    ids=lambda bag: f"{bag['kind']}-{bag['width']}",
)  # fmt: skip
def test_a_bag_model_gives_the_vector_that_its_head_reads(bag: dict[str, Any], tmp_path: Path) -> None:
    """The whole bag through the aggregator in float64 gives the same to 1e-6 (float32 self-attention: 1e-5),
    and so the answers of a run."""
    made = bag_model(tmp_path, **bag)
    slide = choose_bag_model(tmp_path)
    assert (slide.kind, slide.licence, slide.foreign) == ("bag", "CC-BY-4.0", False)
    found = open_slide_model(slide, None)(blocks(TILES, 97))
    assert made.grouper is not None
    with torch.inference_mode():
        x, one_bag = torch.from_numpy(TILES), torch.zeros(len(TILES), dtype=torch.int64)
        logits = made.bag_logits(x, one_bag)[0]["grade"]
        assert torch.allclose(made.heads["grade"](torch.from_numpy(found)[None]), logits, atol=1e-5)
        wanted = made.double().grouper(x.double(), one_bag)[0][0].numpy()
    assert np.abs(found - wanted).max() <= (1e-5 if bag["kind"] == "transformer" else 1e-6) * np.abs(wanted).max()


# ---------------------------------------------------------------- what does not fit


def faulty(name: str, folder: Path) -> str:
    """Weights with one fault."""
    tensors, path = mil_lab(), folder / "model.safetensors"
    if name == "surplus":
        tensors["model.organ_embedding.weight"] = torch.zeros(3, 3)
    elif name == "missing":
        del tensors["model.global_attn.attention_c.bias"]
    elif name == "shapes":
        tensors["model.global_attn.attention_c.weight"] = torch.zeros(1, HIDDEN + 1)
    elif name == "gates":
        tensors["model.global_attn.attention_b.0.weight"] = torch.zeros(HIDDEN + 1, WIDTH)
        tensors["model.global_attn.attention_b.0.bias"] = torch.zeros(HIDDEN + 1)
    elif name == "nan":
        tensors["model.patch_embed.0.bias"][0] = torch.nan
    elif name == "others":
        tensors = {"layer.weight": torch.zeros(2, 2)}
    elif name == "twice":
        tensors |= {key.removeprefix("model."): value.clone() for key, value in tensors.items()}
    save_file(tensors, path)
    if name == "torn":
        path.write_bytes(path.read_bytes()[:-100])
    elif name == "pickle":
        path.unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    elif name == "several":
        save_file(tensors, folder / "other.safetensors")
        path.rename(folder / "one.safetensors")
    return str(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("surplus", "holds 'model.organ_embedding.weight', which no ABMIL has"),
        ("missing", "lacks the tensor that we call 'out.bias'"), ("shapes", r"'out' is \[1, 13\]"),
        ("gates", "different shapes"), ("others", "holds 'layer.weight'"), ("twice", "which no ABMIL has"),
        ("torn", "cut short or damaged"), ("pickle", "wsi-mmm models convert"), ("several", "with --slide"),
    ],
)  # fmt: skip
def test_what_is_no_abmil_is_refused_when_it_is_chosen(name: str, words: str, tmp_path: Path) -> None:
    """By the first tensor that does not fit; nothing is opened that could run code."""
    with pytest.raises(ModelError, match=words):
        choose_slide_model(faulty(name, tmp_path), None, VECTORS)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """When they are read."""
    slide = choose_slide_model(faulty("nan", tmp_path), None, VECTORS)
    with pytest.raises(ModelError, match=r"no finite numbers in 'model.patch_embed.0.bias'"):
        open_slide_model(slide, None)


def test_vectors_that_a_model_does_not_take_are_refused(tmp_path: Path) -> None:
    """An ABMIL by the length of vectors; a bag model by the encoder it learnt from, and by its tiles."""
    (tmp_path / "a").mkdir()
    save_file(mil_lab(), tmp_path / "a" / "model.safetensors")
    with pytest.raises(
        ModelError, match="takes tile vectors of 24 numbers, virchow2 gives 2560: embed with the encoder"
    ):
        choose_slide_model(str(tmp_path / "a"), None, TileVectors("virchow2", "x", 2560, 0.5, 224, 0))
    with pytest.raises(ModelError, match="takes tile vectors of 24 numbers, not 5"):
        open_slide_model(choose_slide_model(str(tmp_path / "a"), None, VECTORS), None)(
            iter([np.zeros((3, 5), np.float32)])
        )
    bag_model(tmp_path / "b", kind="gated", width=8)
    with pytest.raises(ModelError, match="learnt from vectors of its own encoder, not of 'uni': give --encoder"):
        choose_bag_model(tmp_path / "b", encoder="uni", identity="other")
    with pytest.raises(ModelError, match=r"--mpp 0\.5 --tile-size 64 --overlap 0"):
        choose_bag_model(tmp_path / "b", tile=256)
    with pytest.raises(ModelError, match="has no task with a bag head"):
        choose_slide_model("default", None, VECTORS)
    with pytest.raises(ModelError, match="there is no slide model"):
        choose_slide_model(str(tmp_path / "none"), None, VECTORS)


def test_a_bag_model_that_learnt_from_files_takes_their_encoder(tmp_path: Path) -> None:
    """Its card names the encoder of the features that it learnt from."""
    made = bag_model(tmp_path, kind="gated", width=8)
    data = {"features": {"encoder": "uni", "model_hash": "of-uni", "mpp": 0.5, "patch_size": 64, "overlap": 0}}
    save_model(made, tmp_path, half=False, card=made.card.model_copy(update={"data": data}))
    assert choose_bag_model(tmp_path, encoder="uni", identity="of-uni").inputs == INPUTS
    with pytest.raises(ModelError, match="learnt from vectors of 'uni', not of 'virchow'"):
        choose_bag_model(tmp_path, encoder="virchow", identity="of-virchow")


@pytest.mark.parametrize(
    ("head", "licence", "closed"),
    [
        ("license: cc-by-nc-nd-4.0\n", "cc-by-nc-nd-4.0", True), ("license: mit\n", "mit", False),
        ("license: other\nlicense_name: lab-nc\n", "lab-nc", True), ("tags: [a]\n", "", False),
    ],
)  # fmt: skip
def test_the_licence_is_that_of_the_readme(head: str, licence: str, closed: bool, tmp_path: Path) -> None:
    """As the hub has it beside the weights; one that forbids commercial use says so."""
    save_file(mil_lab(), tmp_path / "model.safetensors")
    (tmp_path / "README.md").write_text(f"---\n{head}---\n# Model\nlicense: fake\n")
    slide = choose_slide_model(str(tmp_path), None, VECTORS)
    assert slide.licence == licence == slide.attributes().get("slide_licence", "")
    line, forbids = slide.describe_licence()
    assert (bool(line), forbids) == (bool(licence), closed)
