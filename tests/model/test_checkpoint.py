"""Model files: what is saved is loaded, and whatever is broken says so in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wsi_mmm.errors import ModelError, OutputError
from wsi_mmm.model.card import card_json, model_path, read_card, zoo_names
from wsi_mmm.model.checkpoint import load_encoder, load_model, pack_tensors, save_model, unpack_tensors
from wsi_mmm.model.choose import EncoderOptions
from wsi_mmm.model.recipe import IMAGENET_MEAN, IMAGENET_STD
from wsi_mmm.storage import store


@pytest.fixture
def copy_of(small_model: Path, tmp_path: Path) -> Path:
    """A copy that may be broken; its card forgets the hash so that the weights themselves are looked at."""
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    return folder


def change_card(folder: Path, **fields: object) -> None:
    """Overwrite fields of a card (None: remove them)."""
    card = json.loads((folder / "card.json").read_text())
    card.update(fields)
    (folder / "card.json").write_text(json.dumps({k: v for k, v in card.items() if v is not None}))


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    """The message, which must be one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_saved_model_gives_the_same_answers(small_model: Path, tmp_path: Path) -> None:
    """Saving in float32 and loading again changes no bit; the card comes back equal."""
    model = load_model(small_model)
    card = save_model(model, tmp_path, half=False)
    again = load_model(tmp_path)
    x = model.prepare(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8))
    with torch.inference_mode():
        one, two = model(x), again(x)
    assert set(one) == {"nuclei", "stain"}
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert read_card(tmp_path) == card
    assert not again.training


def test_the_parts_of_a_model_can_be_used_alone(small_model: Path) -> None:
    """encoder -> pyramid of strides 2 to 32, squeezer -> (map, vector), tasks by name, features."""
    model = load_model(small_model)
    x = model.prepare(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    pyramid = model.encoder(x)
    assert [64 // p.shape[-1] for p in pyramid] == [2, 4, 8, 16, 32]
    bottleneck, vector = model.squeezer(pyramid)
    assert bottleneck.shape == (1, 16, 2, 2)
    assert vector.shape == (1, model.vector_width)
    assert torch.equal(model.features(x), vector)
    assert set(model(x, tasks=["stain"])) == {"stain"}
    with pytest.raises(ModelError, match="no task 'dogs'"):
        model(x, tasks=["dogs"])


def test_an_absent_model_names_what_there_is() -> None:
    """The message lists the packaged models."""
    with pytest.raises(ModelError, match="or one of") as error:
        load_model("no-such-model")
    one_line(error)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format": "other/9"}, "format 'other/9'"),
        ({"mpp": -1}, "mpp"),
        ({"mpp": None}, "mpp"),
        ({"surprise": 1}, "surprise"),
        ({"overlap": 40}, "overlap"),
        ({"mean": [0.5, float("inf"), 0.5]}, "mean"),
        ({"std": [0.5, float("nan"), 0.5]}, "std"),
        ({"encoder": {"name": "no_such_net"}}, "cannot build the encoder 'no_such_net'"),
        ({"decoder": {"bottleneck": 16, "widths": [8]}}, "widths"),
    ],
)
def test_a_card_that_makes_no_sense_is_refused(copy_of: Path, fields: dict[str, object], words: str) -> None:
    """Wrong format, missing, unknown or impossible fields."""
    change_card(copy_of, **fields)
    with pytest.raises(ModelError, match=words) as error:
        load_model(copy_of)
    one_line(error)


def test_a_card_that_is_no_json_is_refused(copy_of: Path) -> None:
    """Half a card is no card."""
    (copy_of / "card.json").write_text('{"format": ')
    with pytest.raises(ModelError, match="JSON"):
        read_card(copy_of)


@pytest.mark.parametrize("data", [b"", b"garbage that is no header at all", None])
@pytest.mark.parametrize("known", [True, False])
def test_broken_weights_are_refused(copy_of: Path, data: bytes | None, known: bool) -> None:
    """Empty, garbage or truncated, whether or not the card knows the hash."""
    weights = copy_of / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100] if data is None else data)
    if not known:
        change_card(copy_of, weights_sha256="")
    with pytest.raises(ModelError, match="weights") as error:
        load_model(copy_of)
    one_line(error)


def test_missing_weights_are_named(copy_of: Path) -> None:
    """The path is in the message."""
    (copy_of / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors are missing"):
        load_model(copy_of)


@pytest.mark.parametrize("fault", ["extra", "lacking", "shape"])
def test_weights_of_another_model_are_refused(copy_of: Path, fault: str) -> None:
    """Unknown keys, missing keys, other shapes."""
    path = copy_of / "model.safetensors"
    tensors = load_file(path)
    key = "heads.stain.out.bias"
    if fault == "extra":
        tensors["surprise"] = torch.zeros(1)
    elif fault == "lacking":
        del tensors[key]
    else:
        tensors[key] = torch.zeros(99)
    save_file(tensors, path)
    change_card(copy_of, weights_sha256="")
    with pytest.raises(ModelError, match="do not fit") as error:
        load_model(copy_of)
    one_line(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(copy_of: Path, value: float) -> None:
    """A training that diverged leaves NaN: a run would find nothing and call it done. The error names the tensor."""
    path = copy_of / "model.safetensors"
    tensors = load_file(path)
    tensors["heads.stain.out.bias"][0] = value
    save_file(tensors, path)
    change_card(copy_of, weights_sha256="")
    with pytest.raises(ModelError, match=r"NaN or infinity in 'heads\.stain\.out\.bias'") as error:
        load_model(copy_of)
    one_line(error)


def test_a_pickle_is_not_opened(copy_of: Path) -> None:
    """A torch file in the place of the weights is refused, not unpickled."""
    torch.save({"a": torch.zeros(1)}, copy_of / "model.safetensors")
    change_card(copy_of, weights_sha256="")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(copy_of)


def test_a_bare_encoder_gives_features(tmp_path: Path) -> None:
    """Random weights, then the same weights from a local file under timm's plain names."""
    import timm

    plain = timm.create_model("resnet10t", pretrained=False)
    path = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in plain.state_dict().items()}, path)
    said = EncoderOptions(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    model = load_encoder("resnet10t", weights=str(path), options=said)
    assert model.tasks == ()
    plain.eval()
    x = model.prepare(torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8))
    with torch.inference_mode():
        assert torch.allclose(model.features(x), plain.forward_features(x).mean((2, 3)), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "strides", "width"),
    [
        ("vit_tiny_patch16_224", [4, 8, 16, 32], 192),
        ("vit_small_patch14_dinov2", [4, 8, 16, 32], 384),
        ("swin_tiny_patch4_window7_224", [4, 8, 16, 32], 768),
        ("convnext_atto", [4, 8, 16, 32], 320),
        ("mobilenetv4_conv_small", [2, 4, 8, 16, 32], 1280),  # timm's vector before the classifier, of 960 channels
    ],
)
def test_any_timm_backbone_gives_a_pyramid(name: str, strides: list[int], width: int) -> None:
    """Convolutional or not: maps of the strides that are promised (ViTs resampled), and a vector float[n, D]."""
    model = load_encoder(name, weights="random")
    x = model.prepare(torch.zeros(1, 224, 224, 3, dtype=torch.uint8))
    with torch.inference_mode():
        assert [224 // m.shape[-1] for m in model.encoder(x)] == strides == list(model.encoder.strides)
        assert model.features(x).shape == (1, width) == (1, model.vector_width)


def test_weights_that_cannot_be_downloaded_name_the_option() -> None:
    """Offline, the message says how to pass a file."""
    with pytest.raises(ModelError, match=r"give (a \.safetensors file of them|it) as weights") as error:
        load_encoder("hf-hub:nobody/nothing-of-the-kind")
    one_line(error)


def test_an_encoder_unknown_to_timm_is_refused() -> None:
    """One line with the name."""
    with pytest.raises(ModelError, match="no_such_net"):
        load_encoder("no_such_net", weights="random")


def test_any_tensors_survive_a_checkpoint(tmp_path: Path) -> None:
    """Tensors and facts come back; a file that is none is refused; an unwritable place is an OutputError."""
    path = tmp_path / "deep" / "c.safetensors"
    store.write_bytes(str(path), pack_tensors({"a": torch.arange(3)}, {"step": "7"}))
    tensors, facts = unpack_tensors(path.read_bytes(), str(path))
    assert tensors["a"].tolist() == [0, 1, 2]
    assert facts == {"step": "7"}
    path.write_bytes(b"nothing")
    with pytest.raises(ModelError):
        unpack_tensors(path.read_bytes(), str(path))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        store.write_bytes(str(tmp_path / "file" / "c.safetensors"), pack_tensors({}, {}))


def test_the_packaged_model_is_whole_and_small() -> None:
    """ "default" loads, has both tasks, is under 10 MB, and its card states data, licence, split and limits."""
    assert "default" in zoo_names()
    model = load_model("default")
    assert set(model.tasks) == {"nuclei", "stain"}
    assert sum(f.stat().st_size for f in model_path("default").iterdir()) < 10_000_000
    assert model.card.licence
    assert "research" in model.card.limits
    assert model.card.data
    assert json.loads(card_json(model.card))["weights_sha256"] == model.card.weights_sha256


def test_weights_too_large_for_half_precision_are_kept(small_model: Path, tmp_path: Path) -> None:
    """A variance of 100,000 is no infinity: that tensor is written as float32, the others stay small."""
    model = load_model(small_model)
    name = next(key for key in model.state_dict() if key.endswith("running_var"))
    with torch.no_grad():
        model.get_buffer(name)[0] = 1e5
    save_model(model, tmp_path)
    assert load_model(tmp_path).get_buffer(name)[0] == 1e5
    written = load_file(tmp_path / "model.safetensors")
    assert [key for key, value in written.items() if value.dtype == torch.float32] == [name]
