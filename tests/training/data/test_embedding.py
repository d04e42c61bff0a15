"""What feature files say of themselves, against the model that learns from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from wsi_mmm import api
from wsi_mmm.errors import ConfigError, OptionError
from wsi_mmm.model.card import EncoderCard, ModelCard
from wsi_mmm.model.checkpoint import build_model, load_encoder, save_model
from wsi_mmm.model.choose import EncoderOptions, choose_encoder
from wsi_mmm.model.recipe import IMAGENET_MEAN, IMAGENET_STD
from wsi_mmm.slides.fake import synthetic_slide
from wsi_mmm.training.data.embedding import Embedding, check_source, embedding_of, source_identity

ENCODER: dict[str, Any] = {"name": "resnet18", "args": {"channels": [8, 8, 16, 16]}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ModelCard]:
    """A model folder, and its card."""
    card = ModelCard.model_validate(
        {"name": "base", "encoder": ENCODER, "decoder": {"bottleneck": 0, "widths": []}, "mpp": 0.5, "tile_size": 256,
         "overlap": 0, "mean": [0.5] * 3, "std": [0.2] * 3}
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    return str(folder), save_model(build_model(card), folder)


def check(found: Embedding, card: ModelCard, **more: Any) -> None:
    facts: dict[str, Any] = {"start": None, "weights": "random", "foreign": False, **more}
    check_source(found, "x.h5", "data 'd'", card=card, **facts)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_hash": "0" * 64}, r"was embedded by 'base' \(model_hash 000000000000\), not by "),
        ({"mpp": 1.0}, r"was embedded with mpp 1, model\.mpp is 0\.5: set model\.mpp = 1"),
        ({"patch_size": 224}, r"with patch_size 224, model\.tile_size is 256: set model\.tile_size = 224"),
        ({"overlap": 64}, r"with overlap 64, model\.overlap is 0: set model\.overlap = 64"),
        ({"model_hash": None}, r"x\.h5 does not say its model_hash, .*set foreign = true if its vectors are those"),
        ({"mpp": None}, "does not say its mpp"),
    ],
)
def test_vectors_that_the_model_would_not_make_are_refused(
    base: tuple[str, ModelCard], changed: dict[str, Any], words: str
) -> None:
    """The line names the file, both values and the fix; what fits is taken."""
    folder, card = base
    made = {"encoder": "base", "model_hash": source_identity(folder, None), "mpp": 0.5, "patch_size": 256, "overlap": 0}
    check(embedding_of(made), card, start=folder)
    with pytest.raises(ConfigError, match=words):
        check(embedding_of({**made, **changed}), card, start=folder)


def test_foreign_vectors_are_taken_on_the_users_word_alone(base: tuple[str, ModelCard]) -> None:
    """What their file does say must still fit; a random encoder made nobody's vectors."""
    folder, card = base
    check(Embedding(), card, start=folder, foreign=True)
    check(Embedding(tile_size=256), card, start=folder, foreign=True)
    with pytest.raises(ConfigError, match=r"model\.tile_size is 256"):
        check(Embedding(tile_size=512), card, start=folder, foreign=True)
    with pytest.raises(ConfigError, match="cannot hold vectors of this model, whose encoder is random"):
        check(Embedding(), card, foreign=True)


def test_other_pixels_or_pooling_than_the_source_are_refused(base: tuple[str, ModelCard]) -> None:
    """The weights alone do not make a vector: mean, std, pooling and arguments must be those of the source."""
    folder, card = base
    made = Embedding("base", source_identity(folder, None), 0.5, 256, 0)
    for changed, words in (
        ({"mean": (0.6, 0.5, 0.5)}, "with mean .*set model.mean so"),
        ({"squeezer": {"kind": "max"}}, "with squeezer .*set model.squeezer so"),
        ({"encoder": EncoderCard(name="resnet18")}, r"with encoder\.args .*set model\.encoder\.args so"),
    ):
        other = ModelCard.model_validate({**card.model_dump(), **changed})
        with pytest.raises(ConfigError, match=words):
            check(made, other, start=folder)
    frozen = card.model_copy(update={"encoder": card.encoder.model_copy(update={"norm": "frozen"})})
    check(made, frozen, start=folder)


def test_a_bare_encoder_is_known_by_its_weights(tmp_path: Path) -> None:
    """Vectors of `embed --encoder NAME --weights FILE`: the same file is right, another one is not."""
    torch.manual_seed(0)
    for name in ("one", "two"):
        save_file(timm.create_model("resnet10t").state_dict(), tmp_path / f"{name}.safetensors")
    one, two = (str(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    said = EncoderOptions(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    card = load_encoder("resnet10t", one, options=said).card
    network = choose_encoder("resnet10t", one, said).recipe.model_dump_json()
    made = Embedding("resnet10t", source_identity("resnet10t", one, network), 0.5, 256, 0, network)
    check(made, card, weights=one)
    with pytest.raises(ConfigError, match=r"was embedded by 'resnet10t' .*not by 'resnet10t'"):
        check(made, card, weights=two)


def test_a_bag_model_is_not_applied_at_another_scale(base: tuple[str, ModelCard], tmp_path: Path) -> None:
    """Its vectors would be others: refused before a slide is opened; the card's own values may be repeated."""
    task = {"name": "grade", "kind": "classify", "head": "bag", "outputs": 2, "classes": ["a", "b"],
            "colors": [[0, 0, 0]] * 2}  # fmt: skip
    card = ModelCard.model_validate({**base[1].model_dump(), "tasks": [task], "weights_sha256": ""})
    save_model(build_model(card), tmp_path / "bag")
    synthetic_slide(tmp_path / "s.tiff", 1, width=128, height=128, mpp=0.5, nuclei=4)
    for options in ({"mpp": 1.0}, {"tile_size": 128}):
        with pytest.raises(OptionError, match=r"task 'grade' learnt from tiles of 256 px at 0\.5 mpp"):
            api.run_request(str(tmp_path / "s.tiff"), str(tmp_path / "bag"), output=tmp_path / "o", **options)  # type: ignore[arg-type]
    api.run_request(str(tmp_path / "s.tiff"), str(tmp_path / "bag"), output=tmp_path / "o", mpp=0.5)
