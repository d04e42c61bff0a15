"""Reading and writing models: ``card.json`` + ``model.safetensors`` in a folder. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from wsi_mmm.errors import ModelError, PluginError, first_line
from wsi_mmm.model.bounds import bounded_parameters
from wsi_mmm.model.card import (
    CARD,
    WEIGHTS,
    DecoderCard,
    EncoderCard,
    ModelCard,
    TaskCard,
    card_json,
    model_path,
    read_card,
)
from wsi_mmm.model.encoder import PyramidEncoder, build_encoder
from wsi_mmm.model.heads import HeadSpec, build_head
from wsi_mmm.model.identity import check_weights
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.plugins import load_plugin, plugin_names
from wsi_mmm.storage import store
from wsi_mmm.types import TaskInfo

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def build_model(card: ModelCard, *, weights: str | None = "random") -> MultiTaskModel:
    """A model as its card describes it, in training mode; everything but the encoder has random weights.

    ``weights`` of the encoder: "random"; None downloads timm's own, or those of the ``hf-hub:`` id that the encoder is
    called by; else a local ``.safetensors`` file. `declared_normalisation` says which mean and std such weights want.
    """
    return _assemble_model(card, _build_encoder(card.encoder.name, weights, card.encoder.args))


def declared_normalisation(
    name: str, weights: str | None = "random"
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and std of RGB in [0, 1] that timm declares for the encoder ``name``; ImageNet's where it declares none."""
    return _declared_mean_std(_build_encoder(name, weights, {}))


def load_model(name_or_path: str | Path = "default", device: str | torch.device = "cpu") -> MultiTaskModel:
    """A packaged model or a model folder, in evaluation mode on ``device``.

    ModelError: no such model, broken or foreign files, weights that do not fit the card or were changed since.
    """
    card = read_card(name_or_path)
    path = model_path(name_or_path) / WEIGHTS
    weights = _read_weights(path, card.weights_sha256)
    with bounded_parameters(len(weights), sum(value.numel() for value in weights.values()), str(path)):
        model = build_model(card)
    _fill_all(model, weights, path)
    return _move_to_device(model, device)


def save_model(
    model: MultiTaskModel, folder: str | Path, *, card: ModelCard | None = None, half: bool = True
) -> ModelCard:
    """Write ``model`` (float16 when ``half``) and ``card`` (None: its own), to which the weights' hash is added."""
    dtype = torch.float16 if half else torch.float32
    state = {
        key: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for key, value in model.state_dict().items()
    }
    data = save(state)
    done = (card or model.card).model_copy(update={"weights_sha256": hashlib.sha256(data).hexdigest()})
    target = Path(folder)
    store.write_bytes(str(target / WEIGHTS), data)
    store.write_bytes(str(target / CARD), card_json(done).encode())
    return done


def load_encoder(name: str, weights: str | None = None, device: str | torch.device = "cpu") -> MultiTaskModel:
    """A bare encoder as a model without tasks: any timm name or ``hf-hub:`` id.

    ``weights``: None downloads timm's own; "random" takes none; else a local ``.safetensors`` file.
    """
    encoder = _build_encoder(name, weights, {})
    mean, std = _declared_mean_std(encoder)
    card = ModelCard(
        name=name, encoder=EncoderCard(name=name), decoder=DecoderCard(bottleneck=0),
        mpp=0.5, tile_size=256, overlap=0, mean=mean, std=std,
    )  # fmt: skip
    return _move_to_device(_assemble_model(card, encoder), device)


def _build_encoder(name: str, weights: str | None, args: Mapping[str, Any]) -> PyramidEncoder:
    """See `build_model` for ``weights``."""
    encoder = build_encoder(name, pretrained=weights is None, args=args)
    if weights not in (None, "random"):
        path = Path(str(weights)).expanduser()
        _load_backbone(encoder, _read_weights(path, ""), path)
    return encoder


def _assemble_model(card: ModelCard, encoder: PyramidEncoder) -> MultiTaskModel:
    vector = encoder.channels[-1]
    spec = HeadSpec(
        card.decoder.widths[0] if card.decoder.widths else 0, vector, card.bag.width or vector, card.neck.width
    )
    heads = {task.name: _task_head(task, spec) for task in card.tasks}
    return MultiTaskModel(card, encoder, heads=heads)


def _task_head(card: TaskCard, spec: HeadSpec) -> nn.Module:
    """The head of a task: one of ours by its name, or the one that the task of a plug-in makes."""
    if card.kind not in plugin_names("tasks"):
        return build_head(card.head, spec, card.outputs)
    kind: Any = load_plugin("tasks", card.kind)
    scope = next((scope for scope, head in kind.heads.items() if head == card.head), None)
    if scope is None:
        raise ModelError(f"task '{card.name}' of kind '{card.kind}' cannot have the head '{card.head}'")
    info = TaskInfo(card.name, card.kind, card.classes, card.colors)
    head = kind.from_params(info, card.params, scope).head(spec)
    if not isinstance(head, nn.Module):
        gave = f"gave {type(head).__name__}, not a torch.nn.Module"
        raise PluginError(f"task '{card.name}': head of the kind '{card.kind}' of a plug-in {gave}")
    return head


def _move_to_device(model: MultiTaskModel, device: str | torch.device) -> MultiTaskModel:
    model.to(device=pick_device(str(device)))
    model.to(memory_format=torch.channels_last)
    return model.eval()


def pick_device(name: str) -> torch.device:
    """The device for "auto", "cpu", "cuda", "cuda:1" or "mps". ModelError if this machine has no such thing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"the device '{name}' cannot be used here: {first_line(error)}") from error
    return device


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file, float32. ModelError if absent, truncated, no safetensors, or of another hash."""
    check_weights(path, sha256)
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"the weights {path} cannot be read as safetensors: {first_line(error)}") from error
    return {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}


def _fill_all(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load weights that must fit exactly. ModelError names the first that does not."""
    wanted = module.state_dict()
    odd = sorted(set(wanted) ^ set(weights))
    if odd:
        verb = "lack" if odd[0] in wanted else "have an unknown"
        raise ModelError(f"the weights {path} do not fit the model: they {verb} '{odd[0]}' ({len(odd)} such in all)")
    for key, value in wanted.items():
        if value.shape != weights[key].shape:
            found, due = tuple(weights[key].shape), tuple(value.shape)
            raise ModelError(f"the weights {path} do not fit the model: '{key}' is {found}, not {due}")
        if not torch.isfinite(weights[key]).all():
            raise ModelError(f"the weights {path} hold NaN or infinity in '{key}': its training diverged; take another")
    module.load_state_dict(dict(weights))


def _load_backbone(encoder: PyramidEncoder, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load a backbone's own file: names as in timm's plain model, classifier and other extras left out."""
    wanted = encoder.backbone.state_dict()
    named = {
        key.removeprefix("encoder.").removeprefix("backbone.").removeprefix("model."): v for key, v in weights.items()
    }
    nested = {key: key.removeprefix("model.") for key in wanted}
    flat = {key: key.replace("_", ".", 1) if key.split(".")[0] not in named else key for key in wanted}
    chosen = {key: named.get(key, named.get(nested[key], named.get(flat[key]))) for key in wanted}
    _fill_all(encoder.backbone, {key: value for key, value in chosen.items() if value is not None}, path)


def _declared_mean_std(encoder: PyramidEncoder) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and std that timm knows for these weights, else ImageNet's."""
    known = getattr(encoder.backbone, "pretrained_cfg", None) or getattr(
        getattr(encoder.backbone, "model", None), "pretrained_cfg", None
    )
    config = known if isinstance(known, dict) else {}
    mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def pack_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """One safetensors file of any tensors, copied to the CPU, with string metadata."""
    return save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, dict(metadata))


def unpack_tensors(data: bytes, source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file of `pack_tensors`. ModelError naming ``source`` if it is none, or not whole."""
    try:
        (length,) = struct.unpack("<Q", data[:8])
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        return load(data), metadata
    except (SafetensorError, struct.error, ValueError) as error:
        raise ModelError(f"{source} is damaged or no safetensors file ({first_line(error)}); remove it") from error
