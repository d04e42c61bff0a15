"""Training: pure draws, targets that fit the pictures, one gradient for all tasks, a loop that can be interrupted."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Generator

from wsi_mmm.errors import InputError, ModelError, RecipeError
from wsi_mmm.model.card import DecoderCard, EncoderCard, ModelCard, TaskCard
from wsi_mmm.model.checkpoint import build_model
from wsi_mmm.tasks import make_task
from wsi_mmm.training import augment
from wsi_mmm.training import step as stepping
from wsi_mmm.training.compose import MARGIN, Composer, beyond_slide, cut_labels, cut_pixels, picture_of
from wsi_mmm.training.loop import CHECKPOINT, Feed, Plan, train
from wsi_mmm.training.recipe import read_recipe
from wsi_mmm.training.sampler import Mix, Shelf, Warp, draw
from wsi_mmm.training.sources import LabelledImage, StainedTile, load_nuclei, split

CARD = ModelCard(
    name="small", encoder=EncoderCard(name="resnet18", args={"channels": [8, 16, 24, 32]}),
    decoder=DecoderCard(bottleneck=16, widths=(8, 8, 16, 16)), mpp=0.5, tile_size=64, overlap=16,
    mean=(0.7, 0.6, 0.7), std=(0.2, 0.2, 0.2),
    tasks=(
        TaskCard(name="nuclei", kind="instances", head="map", outputs=4, classes=("nucleus",), colors=((0, 1, 2),)),
        TaskCard(
            name="stain", kind="classify", head="vector", outputs=4,
            classes=("H&E", "IHC", "Giemsa", "other"), colors=((0, 0, 0),) * 4,
        ),
    ),
)  # fmt: skip
TASKS = {card.name: make_task(card) for card in CARD.tasks}
SHELF = Shelf((7.0, 9.0), ((0, 1), (2,), (3,)))


def image(seed: int) -> LabelledImage:
    """Dark discs on a light ground."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :128]
    labels = np.zeros((96, 128), np.int32)
    for i in range(1, 13):
        labels[(y - rng.uniform(0, 96)) ** 2 + (x - rng.uniform(0, 128)) ** 2 < 64] = i
    pixels = np.where(labels[..., None] > 0, (90, 60, 140), (220, 190, 225)).astype(np.uint8)
    return LabelledImage(f"{seed}.png", pixels, labels, 8.0, "purple")


def composer() -> Composer:
    """Two images, four tiles, crops of 64 px."""
    rng = np.random.default_rng(0)
    tiles = [StainedTile("s", rng.integers(0, 256, (96, 96, 3), np.uint8), stain, False) for stain in (0, 0, 1, 2)]
    return Composer([image(1), image(2)], tiles, tasks=TASKS, size=64)


@given(st.integers(0, 2**31), st.integers(0, 10**6))
def test_draws_are_a_pure_function_of_seed_and_step(seed: int, step: int) -> None:
    """Equal (seed, step) draw the same; the next step draws something else; nuclei come first."""
    mix = Mix(3, 2)
    one = draw(seed, step, SHELF, mix)
    assert one == draw(seed, step, SHELF, mix) != draw(seed, step + 1, SHELF, mix)
    assert [d.kind == "nuclei" for d in one] == [True] * 3 + [False] * 2


def test_a_batch_is_a_pure_function_of_draws_and_generator() -> None:
    """Bit-equal pixels and targets, in range, of the promised shapes."""
    draws = draw(0, 0, SHELF, Mix(4, 6))
    one, two = (composer().batch(draws, Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one.pixels, two.pixels)
    assert torch.equal(one.targets["stain"], two.targets["stain"])
    assert one.pixels.shape == (10, 3, 64, 64)
    assert float(one.pixels.min()) >= 0
    assert float(one.pixels.max()) <= 1
    assert one.targets["nuclei"].shape == (10, 5, 32, 32)
    assert torch.equal(one.targets["nuclei"].nan_to_num(-9), two.targets["nuclei"].nan_to_num(-9))
    assert one.targets["stain"][:4].tolist() == [-1] * 4


@given(st.floats(0.4, 1.6), st.floats(0, 6.28), st.sampled_from([1, -1]), st.floats(0, 1), st.floats(0, 1))
def test_labels_are_cut_where_pixels_are_cut(zoom: float, angle: float, flip: int, x: float, y: float) -> None:
    """However a crop is turned, mirrored and scaled, dark px are labelled ones (up to the px on outlines)."""
    source = image(3)
    warp = Warp(zoom, zoom * 1.1, angle, flip, x, y)
    dark = cut_pixels(picture_of(source), warp, 64).mean(0).numpy() < 0.6
    labelled = cut_labels(source.labels, warp, 64)[MARGIN:-MARGIN, MARGIN:-MARGIN] > 0
    assert (dark != labelled).mean() < 0.08


def test_beyond_the_slide_there_is_white_on_one_side_at_times() -> None:
    """About a quarter of the crops lose a strip, never all of it."""
    g = Generator().manual_seed(0)
    masks = [beyond_slide(g, 64)[MARGIN:-MARGIN, MARGIN:-MARGIN] for _ in range(200)]
    share = np.mean([m.any() for m in masks])
    assert 0.15 < share < 0.35
    assert max(m.mean() for m in masks) <= 0.61


def test_restaining_keeps_nuclei_darker_than_their_ground() -> None:
    """Whatever colours are drawn, nuclei keep more optical density than the background on average."""
    source = image(4)
    x = picture_of(source).levels[0].repeat(16, 1, 1, 1)[..., :96]
    mask = torch.from_numpy(source.labels[:, :96] > 0).float()[None, None].repeat(16, 1, 1, 1)
    od = augment.to_od(augment.restain(x, mask, Generator().manual_seed(0))).mean(1, keepdim=True)
    inside, outside = (
        (od * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)),
        (od * (1 - mask)).sum((1, 2, 3)) / (1 - mask).sum((1, 2, 3)),
    )
    assert float((inside > outside).float().mean()) > 0.8


def test_task_by_task_accumulation_is_the_gradient_of_the_joint_loss() -> None:
    """Backward per task adds up to one backward of the weighted sum."""
    torch.manual_seed(0)
    batch = composer().batch(draw(0, 1, SHELF, Mix(3, 4)), Generator().manual_seed(1))
    model = build_model(CARD).eval()
    weights = {"nuclei": 1.0, "stain": 0.3}
    gradients = []
    for way in (stepping.accumulate, stepping.backward):
        model.zero_grad(set_to_none=True)
        way(stepping.losses(model, batch, TASKS), weights)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def trained(folder: Path, stop_after: int | None = None) -> torch.Tensor:
    """All weights after four steps; ``stop_after``: interrupt once that many are done."""
    torch.manual_seed(0)
    model = build_model(CARD)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0  # the only draw that is not a function of the step

    def watch(_: object) -> str:
        if stop_after is not None:
            raise KeyboardInterrupt
        return ""

    plan = Plan(4, mix=Mix(2, 1), every=stop_after or 2, threads=1)
    done = train(model, Feed(TASKS, composer(), SHELF), plan=plan, folder=folder, say=lambda _: None, evaluate=watch)
    return torch.cat([p.flatten() for p in done.parameters()])


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    """Four steps at once, or two, an interruption, and two more: equal to the bit. A broken checkpoint is refused."""
    whole = trained(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "b", stop_after=2)
    assert torch.equal(whole, trained(tmp_path / "b"))
    (tmp_path / "a" / CHECKPOINT).write_bytes(b"no checkpoint")
    with pytest.raises(ModelError):
        trained(tmp_path / "a")


def test_the_split_is_stratified_and_seeded() -> None:
    """About a fifth of each look is held out, the same for the same seed, and nothing is in both parts."""
    looks = ["pale"] * 10 + ["purple"] * 20 + ["pink"] * 4
    images = [
        LabelledImage(str(i), np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.int32), float(i), look)
        for i, look in enumerate(looks)
    ]
    learn, judge = split(images, 3)
    assert {i.name for i in learn}.isdisjoint(i.name for i in judge)
    assert len(learn) + len(judge) == 34
    assert [sum(i.look == look for i in judge) for look in ("pale", "purple", "pink")] == [2, 4, 1]
    assert [i.name for i in split(images, 3)[1]] == [i.name for i in judge]


def test_nuclei_are_read_from_a_zip(tmp_path: Path) -> None:
    """Images with their labels; anything else is an InputError."""
    path = tmp_path / "nuclei.zip"
    with zipfile.ZipFile(path, "w") as archive:
        source = image(1)
        for name, array in (("images/a.png", source.pixels), ("labels/a.png", source.labels.astype(np.uint16))):
            file = io.BytesIO()
            Image.fromarray(array).save(file, "PNG")
            archive.writestr(name, file.getvalue())
    (found,) = load_nuclei(path)
    assert found.name == "a.png"
    assert (found.labels == source.labels).all()
    assert 5 < found.radius < 9
    path.write_bytes(b"no zip")
    with pytest.raises(InputError, match="no zip"):
        load_nuclei(path)


def test_the_recipe_that_is_shipped_is_sound_and_a_bad_one_is_refused(tmp_path: Path) -> None:
    """The card in it makes a model and tasks; unknown keys and broken TOML are named."""
    shipped = Path(__file__).parents[2] / "pipelines" / "train_default.toml"
    recipe = read_recipe(shipped)
    card = ModelCard.model_validate(recipe.card)
    assert {task.name: make_task(task).channels for task in card.tasks} == {"nuclei": 4, "stain": 4}
    bad = tmp_path / "bad.toml"
    bad.write_text(shipped.read_text().replace("steps =", "stepz ="))
    with pytest.raises(RecipeError, match="step"):
        read_recipe(bad)
    bad.write_text("= 1")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(bad)
