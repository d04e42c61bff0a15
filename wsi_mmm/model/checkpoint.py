"""Reading and writing models: ``card.json`` + ``model.safetensors`` in a folder. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from wsi_mmm.errors import ModelError, PluginError, first_line
from wsi_mmm.model.bounds import bounded_parameters
from wsi_mmm.model.card import (
    CARD,
    WEIGHTS,
    EncoderCard,
    ModelCard,
    TaskCard,
    card_json,
    model_path,
    read_card,
)
from wsi_mmm.model.choose import (
    RANDOM,
    ChosenEncoder,
    EncoderOptions,
    bare_card,
    encoder_identity,
    find_encoder,
    hash_encoder,
)
from wsi_mmm.model.encoder import PyramidEncoder, build_encoder
from wsi_mmm.model.find_weights import local_weights
from wsi_mmm.model.fitting import TENSOR_TYPES, fit_weights, published_id
from wsi_mmm.model.heads import HeadSpec, build_head
from wsi_mmm.model.kept_weights import put_weights, take_weights
from wsi_mmm.model.key_maps import prepare_network, rename_tensors
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.model.networks import PooledBackbone, create_network, declared_colours, fill_network, renamed_by_timm
from wsi_mmm.model.plugin_encoder import check_package, is_plugin
from wsi_mmm.model.recipe import IMAGENET_MEAN, IMAGENET_STD, ColourTriple, EncoderRecipe
from wsi_mmm.model.shards import weight_files
from wsi_mmm.model.weights_file import combine_hashes, refuse_foreign
from wsi_mmm.plugins import load_plugin, plugin_names
from wsi_mmm.storage import store
from wsi_mmm.types import TaskInfo

_NETWORK = "encoder.backbone.model."


def build_model(
    card: ModelCard, *, weights: str | None = "random", source: ChosenEncoder | None = None
) -> MultiTaskModel:
    """A model as its card describes it, in training mode; everything but the encoder has random weights.

    ``weights`` of the encoder: "random"; None downloads timm's own, or those of the ``hf-hub:`` id that the encoder is
    called by; else a local ``.safetensors`` file. `declared_normalisation` says which mean and std such weights want.
    ``source``: a chosen encoder whose weights the card's begins with.
    """
    if source is not None and source.path is not None:
        return assemble_model(card, _open_chosen(card.encoder, source.recipe, source.path))
    return assemble_model(card, _build_encoder(card.encoder, weights))


def declared_normalisation(name: str, weights: str | None = "random") -> tuple[ColourTriple, ColourTriple]:
    """Mean and std of RGB in [0, 1] that timm declares for the encoder ``name``; ImageNet's where it declares none."""
    return declared_colours(_build_encoder(EncoderCard(name=name), weights).backbone)


def load_model(name_or_path: str | Path = "default", device: str | torch.device = "cpu") -> MultiTaskModel:
    """A packaged model or a model folder, in evaluation mode on ``device``.

    ModelError: no such model, broken or foreign files, weights that do not fit the card or were changed since.
    """
    card = read_card(name_or_path)
    path = model_path(name_or_path) / WEIGHTS
    weights = _read_weights(path, card.weights_sha256)
    with bounded_parameters(len(weights), sum(value.numel() for value in weights.values()), str(path)):
        model = assemble_model(card, build_encoder(card.encoder, empty=True))
    _check_fit(model, weights, path)
    pooled = model.encoder.backbone
    if card.encoder.own_pooling is not None and isinstance(pooled, PooledBackbone):  # created without weights
        own = {key.removeprefix(_NETWORK): value for key, value in weights.items() if key.startswith(_NETWORK)}
        pooled.model = fill_network(card.encoder.name, card.encoder.args, pooled.model, own)
        prepare_network(pooled.model, card.encoder.key_map)
        weights = {key: value for key, value in weights.items() if not key.startswith(_NETWORK)}
    model.load_state_dict(weights, strict=False)  # all are there
    return _move_to_device(model, device)


def save_model(
    model: MultiTaskModel, folder: str | Path, *, card: ModelCard | None = None, half: bool = True
) -> ModelCard:
    """Write ``model`` (float16 when ``half``, but tensors too large for it) and ``card`` (None: its own), to which the
    weights' hash is added."""
    state = {key: _to_file_type(value.detach(), half).cpu().contiguous() for key, value in model.state_dict().items()}
    data = save(state)
    done = (card or model.card).model_copy(update={"weights_sha256": hashlib.sha256(data).hexdigest()})
    target = Path(folder)
    store.write_bytes(str(target / WEIGHTS), data)
    store.write_bytes(str(target / CARD), card_json(done).encode())
    return done


def _to_file_type(value: Tensor, half: bool) -> Tensor:
    """Numbers as float16 where that can hold them, else as float32: infinity would be refused when they are loaded."""
    if not value.is_floating_point():
        return value
    small = value.to(torch.float16)
    return small if half and bool(small.isfinite().all()) else value.to(torch.float32)


def load_encoder(
    name: str, weights: str | None = None, device: str | torch.device = "cpu", *, options: EncoderOptions | None = None
) -> MultiTaskModel:
    """A bare encoder as a model without tasks, whose vectors are those that its authors publish.

    ``name``, ``weights``: see `choose_encoder`; ``options``: what they do not say.
    """
    return open_encoder(find_encoder(name, weights, options), device)


def open_encoder(
    chosen: ChosenEncoder, device: str | torch.device = "cpu", *, identity: str | None = None
) -> MultiTaskModel:
    """The model of a chosen encoder. ModelError: weights that do not fit, or that are others than those chosen, or
    than those of the ``identity`` that a run was begun with."""
    recipe, found, whole = chosen.recipe, chosen.sha256, bare_card(chosen.recipe)
    card = whole.encoder
    check_package(recipe)
    if chosen.path is None or recipe.package:
        with torch.random.fork_rng(devices=[]):  # the same on every worker
            torch.manual_seed(0)
            encoder = build_encoder(card, weights=chosen.path)
        found = hash_encoder(chosen).sha256
    else:
        encoder, found = _open_weights(card, recipe, chosen.path)
    wanted = identity or (chosen.identity if chosen.sha256 else None)
    if wanted is not None and encoder_identity(recipe, found) != wanted:
        raise ModelError(
            f"the weights {chosen.path} on {os.uname().nodename} are not those the run was begun with: copy those to "
            "every worker, or begin the run again"
        )
    width = encoder.vector_width or encoder.channels[-1]
    if recipe.dimension not in (0, width):
        raise ModelError(f"the encoder {recipe.name} gives {width} numbers, its entry says {recipe.dimension}")
    return _move_to_device(assemble_model(whole, encoder), device)


def _open_weights(card: EncoderCard, recipe: EncoderRecipe, path: Path) -> tuple[PyramidEncoder, str]:
    """The encoder with the weights at ``path``, which are read once, and their sha256."""
    tensors, found = take_weights(path) or read_tensors(path)
    network = create_network(card.name, card.args, empty=True)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    tensors = rename_tensors(tensors, card.key_map, shapes)
    try:
        fitting = fit_weights(network, tensors, str(path), published_id(recipe))
    except ModelError:
        if not recipe.hub_id or recipe.sources:  # only of what timm itself would load
            raise
        fitting = fit_weights(network, renamed_by_timm(network, tensors), str(path))
    return build_encoder(card, tensors=fitting), found


def _open_chosen(card: EncoderCard, recipe: EncoderRecipe, path: Path) -> PyramidEncoder:
    return build_encoder(card, weights=path) if recipe.package else _open_weights(card, recipe, path)[0]


def _build_encoder(card: EncoderCard, weights: str | None) -> PyramidEncoder:
    """See `build_model` for ``weights``."""
    if weights != RANDOM and (card.own_pooling is not None or is_plugin(card)):
        said = None if is_plugin(card) else EncoderOptions(card.args, IMAGENET_MEAN, IMAGENET_STD)
        chosen = find_encoder(card.name, weights, said)
        if chosen.path is not None:
            return _open_chosen(card, chosen.recipe, chosen.path)
    encoder = build_encoder(card, pretrained=weights is None)
    if weights not in (None, RANDOM) and not is_plugin(card):
        path = local_weights(str(weights))
        _load_backbone(card, encoder, read_tensors(path)[0], path)
    return encoder


def assemble_model(card: ModelCard, encoder: PyramidEncoder) -> MultiTaskModel:
    """A model of a ready ``encoder``, in training mode; everything else that its card names has random weights."""
    vector = encoder.vector_width or encoder.channels[-1]
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


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors of a safetensors file, or of those of an index, float32, and the sha256 of their bytes: read once, from
    the first to the last.

    ModelError: absent, a pickle, truncated or no safetensors.
    """
    refuse_foreign(path)
    tensors: dict[str, Tensor] = {}
    hashes = []
    for part in weight_files(path):
        found, sha256 = _read_file(part)
        tensors |= found
        hashes.append(sha256)
    return tensors, combine_hashes(hashes)


def _read_file(path: Path) -> tuple[dict[str, Tensor], str]:
    try:
        with safe_open(path, "pt") as header, path.open("rb") as file:
            digest = hashlib.sha256()
            (length,) = struct.unpack("<Q", file.peek(8)[:8])
            digest.update(file.read(8 + length))
            tensors = {name: _read_next(file, header.get_slice(name), digest) for name in header.offset_keys()}
            return tensors, digest.hexdigest()
    except (SafetensorError, OSError, ValueError, struct.error, KeyError) as error:
        raise ModelError(f"the weights {path} cannot be read as safetensors: {first_line(error)}") from error


def read_ahead(path: Path) -> str:
    """The sha256 of a file of weights, whose tensors wait for the encoder that is opened within `keep_weights`."""
    tensors, found = read_tensors(path)
    put_weights(path, tensors, found)
    return found


def _read_next(file: BufferedReader, described: Any, digest: Any) -> Tensor:
    """The next tensor of an open file; in float32 if it is floating."""
    if described.get_dtype() not in TENSOR_TYPES:
        raise ValueError(f"tensors of {described.get_dtype()} are not for networks; save them as F32 or F16")
    value = torch.empty(described.get_shape(), dtype=TENSOR_TYPES[described.get_dtype()])
    if value.numel():
        memory = value.reshape(-1).view(torch.uint8).numpy()
        done = 0
        while done < len(memory):
            count = file.readinto(memory.data[done:])
            if not count:
                raise ValueError("the file ends too soon")
            done += count
        digest.update(memory)
    return value.float() if value.is_floating_point() else value


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """Tensors of a model's file, float32. ModelError as of `read_tensors`, and for another hash than ``sha256``."""
    tensors, found = read_tensors(path)
    if sha256 and found != sha256:
        raise ModelError(f"the weights {path} are not those its card was written for: copy the model folder again")
    return tensors


def _check_fit(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Weights of a model must fit exactly. ModelError names the first that does not."""
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


def _load_backbone(card: EncoderCard, encoder: PyramidEncoder, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load a backbone's own file: it must fit timm's plain network, of which the squeezer uses a part."""
    weights = fit_weights(create_network(card.name, card.args, empty=True), weights, str(path))
    wanted = encoder.backbone.state_dict()
    nested = {key: key.removeprefix("model.") for key in wanted}
    flat = {key: key.replace("_", ".", 1) if key.split(".")[0] not in weights else key for key in wanted}
    chosen = {key: weights.get(key, weights.get(nested[key], weights.get(flat[key]))) for key in wanted}
    fitting = {key: value for key, value in chosen.items() if value is not None}
    _check_fit(encoder.backbone, fitting, path)
    encoder.backbone.load_state_dict(fitting)


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
