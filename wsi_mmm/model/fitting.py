"""Weights that fit a timm network exactly, or an error that names the first tensor that does not, and the way out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from wsi_mmm.errors import ModelError
from wsi_mmm.model.kept_weights import peek_weights
from wsi_mmm.model.key_maps import rename_tensors
from wsi_mmm.model.networks import create_network, grid_side, network_config
from wsi_mmm.model.recipe import EncoderRecipe
from wsi_mmm.model.registry import encoder_entries
from wsi_mmm.model.weights_file import list_tensors
from wsi_mmm.plugins import plugin_names

_WRAPPERS = ("module.", "encoder.", "backbone.", "model.")
_HEADS = ("head.", "head_dist.", "fc.", "classifier.", "last_linear.")
TENSOR_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Types of numbers in safetensors files that are read."""
_UNUSED = frozenset({"mask_token"})
"""Tensors of training alone."""

TensorShapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Misfit:
    """Two sets of names and shapes: those of the ``weights`` and those that the ``network`` wants."""

    weights: TensorShapes
    network: TensorShapes

    @property
    def surplus(self) -> list[str]:
        """Names that the network has no place for, in the weights' order."""
        return [name for name in self.weights if name not in self.network]

    @property
    def missing(self) -> list[str]:
        """Names that the weights lack."""
        return [name for name in self.network if name not in self.weights]

    @property
    def reshaped(self) -> list[str]:
        """Names of both whose shapes differ."""
        return [name for name, shape in self.network.items() if self.weights.get(name, shape) != shape]


def check_listed_weights(recipe: EncoderRecipe, path: Path) -> None:
    """ModelError, as of `fit_weights`, when the tensors that a file lists do not fit; their numbers are looked at where
    they were read for its hash, and not read else.

    Files that timm itself renames and those of a package's encoder are left to the loading.
    """
    if (recipe.hub_id and not recipe.sources) or recipe.architecture in plugin_names("encoders"):
        return
    network = create_network(recipe.architecture, recipe.arguments, empty=True)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    listed = list_tensors(path)
    types = {kind for kind, _ in listed.values()}
    if odd := sorted(types - TENSOR_TYPES.keys()):
        raise ModelError(f"the weights {path} hold tensors of {odd[0]}, which are not computed with: take F32 or F16")
    tensors = {
        key: torch.empty(shape, dtype=TENSOR_TYPES[kind], device="meta") for key, (kind, shape) in listed.items()
    }
    fit_weights(network, rename_tensors(tensors, recipe.key_map, shapes), str(path), published_id(recipe))
    for key, value in peek_weights(path).items():
        _check_numbers(key, value, str(path))


def _check_numbers(key: str, value: Tensor, source: str) -> None:
    if not value.is_meta and value.is_floating_point() and not torch.isfinite(value).all():
        raise ModelError(f"the weights {source} hold NaN or infinity in '{key}': take another copy of them")


def published_id(recipe: EncoderRecipe) -> str:
    """The repository of a published encoder; empty for a network that a user describes."""
    return recipe.hub_id if recipe.sources else ""


def fit_weights(network: nn.Module, tensors: Mapping[str, Tensor], source: str, hub_id: str = "") -> dict[str, Tensor]:
    """The tensors under the names of ``network``, without those of a classifier. They are not copied.

    ModelError naming the first that is missing, surplus, of another shape, or not finite; ``source`` is named in it.
    ``hub_id``: the only repository whose weights fit ("": there is none). Of tensors on the meta device only the names,
    shapes and types are looked at.
    """
    wanted = network.state_dict()
    named = _strip_wrappers(tensors, wanted)
    classifiers = _classifier_names(network)
    fitting = {key: value for key, value in named.items() if key in wanted or not _may_be_dropped(key, classifiers)}
    for key, value in wanted.items():
        if key.endswith("num_batches_tracked") and key not in fitting:
            fitting[key] = torch.zeros((), dtype=value.dtype)
    misfit = Misfit(*({key: tuple(value.shape) for key, value in part.items()} for part in (fitting, wanted)))
    if fault := _describe_misfit(misfit, hub_id):
        raise ModelError(f"the weights {source} do not fit the encoder: {fault}")
    for key, value in fitting.items():
        if wanted[key].is_floating_point() and not value.is_floating_point():
            raise ModelError(
                f"the weights {source} hold whole numbers ({str(value.dtype).removeprefix('torch.')}) in '{key}': "
                "quantised weights are not computed with, take those in F32 or F16"
            )
        _check_numbers(key, value, source)
    return fitting


def _strip_wrappers(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the modules that training wrapped around the network."""
    named: dict[str, Tensor] = {}
    for key, value in tensors.items():
        short = key
        for wrapper in _WRAPPERS:
            short = short if short in wanted else short.removeprefix(wrapper)
        named[short if short in wanted or key not in wanted else key] = value
    return named


def _classifier_names(network: nn.Module) -> tuple[str, ...]:
    declared = network_config(network).get("classifier") or ()
    names = (declared,) if isinstance(declared, str) else tuple(declared)
    return (*_HEADS, *(f"{name}." for name in names))


def _may_be_dropped(key: str, classifiers: tuple[str, ...]) -> bool:
    return key.startswith(classifiers) or key in _UNUSED


# ---------------------------------------------------------------- what does not fit, and why


def _describe_misfit(misfit: Misfit, hub_id: str) -> str:
    """The first fault and what would mend it; empty when everything fits. ``hub_id``: see `fit_weights`."""
    surplus, missing, reshaped = misfit.surplus, misfit.missing, misfit.reshaped
    if surplus:
        first = next((name for name in surplus if not name.endswith("num_batches_tracked")), surplus[0])
        fault = f"the network has no '{first}' ({len(surplus)} surplus tensors)"
    elif missing:
        fault = f"they lack '{missing[0]}' ({len(missing)} tensors)"
    elif reshaped:
        key = reshaped[0]
        fault = f"'{key}' is {_shape_text(misfit.weights[key])}, the network's {_shape_text(misfit.network[key])}"
    else:
        return ""
    if names := _fitting_entries(misfit.weights):
        return f"{fault}; they fit embed --encoder {' or '.join(names)}"
    if hub_id:
        return f"{fault}; they are not those that {hub_id} publishes, which hf download {hub_id} brings"
    if not misfit.weights.keys() & misfit.network.keys():
        return f"{fault}; they are of quite another network: give embed --encoder the one that they were trained as"
    hint = next((text for find in _HINTS if (text := find(misfit))), "")
    return f"{fault}; {hint or 'give the architecture and arguments that they were trained with'}"


def _fitting_entries(weights: TensorShapes) -> list[str]:
    """Names of the registry whose network has exactly these tensors, in timm's names."""
    token = weights.get("cls_token", ())
    found = []
    for name, entry in encoder_entries().items():
        recipe = entry.recipe
        if len(token) == 3 and not recipe.key_map and recipe.dimension in (token[-1], 2 * token[-1]):
            network = create_network(recipe.architecture, recipe.arguments, empty=True)
            if {key: tuple(value.shape) for key, value in network.state_dict().items()} == dict(weights):
                found.append(name)
    return found


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _arguments_text(**arguments: object) -> str:
    return f"embed --encoder-args '{json.dumps(arguments)}'"


def _hint_names(misfit: Misfit) -> str:
    """Checkpoints in the names of other libraries."""
    names = misfit.surplus
    if any(name.startswith(("embeddings.", "encoder.layer.", "layer.", "vit.", "dinov2.")) for name in names):
        return "they have the names of transformers: give the encoder by its name in 'wsi-mmm models encoders'"
    if any(re.match(r"blocks\.\d+\.\d+\.", name) for name in names):
        return "they have Meta's DINOv2 names in chunks: give the encoder by its name in 'wsi-mmm models encoders'"
    return ""


def _hint_gated(misfit: Misfit) -> str:
    """SwiGLU: the first matrix of an MLP makes twice what the second takes; Meta calls it w12."""
    if any(".mlp.w12." in name for name in misfit.surplus):
        return "they have SwiGLU in Meta's names (w12): give the encoder by its name in 'wsi-mmm models encoders'"
    for name, shape in misfit.weights.items():
        if name.endswith(".mlp.fc1.weight"):
            other = misfit.weights.get(name.replace(".fc1.", ".fc2."))
            due = misfit.network.get(name)
            due_out = misfit.network.get(name.replace(".fc1.", ".fc2."))
            packed = other is not None and shape[0] == 2 * other[1]
            plain = due is not None and due_out is not None and due[0] == due_out[1]
            if packed and plain:
                base = "vit_giant_patch14_reg4_dinov2" if "reg_token" in misfit.weights else "vit_giant_patch14_dinov2"
                return (
                    f"their MLPs are SwiGLU (fc1 is doubled): give embed --encoder {base} with "
                    f"{_gated_arguments(misfit.weights)}, or the encoder's name in 'wsi-mmm models encoders'"
                )
            return ""
    return ""


def _gated_arguments(weights: TensorShapes) -> str:
    arguments: dict[str, object] = {}
    embed = weights.get("patch_embed.proj.weight")
    if embed is not None:
        arguments |= {"patch_size": embed[-1], "embed_dim": embed[0]}
        second = weights.get("blocks.0.mlp.fc1.weight")
        if second is not None:
            arguments["mlp_ratio"] = round(second[0] / embed[0], 5)
    arguments["depth"] = _depth_of(weights)
    return f"{_arguments_text(**arguments).removeprefix('embed ')} and its num_heads"


def _hint_scale(misfit: Misfit) -> str:
    """LayerScale."""
    if any(name.endswith(".ls1.gamma") for name in misfit.surplus):
        return f"they have LayerScale: give {_arguments_text(init_values=1e-5)}"
    if any(name.endswith(".ls1.gamma") for name in misfit.missing):
        return f"they have no LayerScale: give {_arguments_text(init_values=None)}"
    return ""


def _hint_registers(misfit: Misfit) -> str:
    """Register tokens."""
    here, there = misfit.weights.get("reg_token"), misfit.network.get("reg_token")
    if here != there and (here is not None or there is not None):
        return f"give {_arguments_text(reg_tokens=here[1] if here else 0)}"
    return ""


def _hint_depth(misfit: Misfit) -> str:
    """Another number of blocks."""
    here, there = _depth_of(misfit.weights), _depth_of(misfit.network)
    if not here or not there or here == there:
        return ""
    return f"they have {here} blocks, the network {there}: give {_arguments_text(depth=here)}"


def _depth_of(shapes: TensorShapes) -> int:
    return len({found.group(1) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))})


def _hint_norm(misfit: Misfit) -> str:
    """The last norm before or after pooling; norms before the first block."""
    surplus, missing = set(misfit.surplus), set(misfit.missing)
    if "norm.weight" in surplus and "fc_norm.weight" in missing:
        return f"give {_arguments_text(global_pool='token')}"
    if "fc_norm.weight" in surplus and "norm.weight" in missing:
        return f"give {_arguments_text(global_pool='avg')}"
    if "norm_pre.weight" in surplus:
        return f"give {_arguments_text(pre_norm=True)}"
    return ""


def _hint_sizes(misfit: Misfit) -> str:
    """Width, patch and image size of a ViT."""
    here, there = misfit.weights.get("patch_embed.proj.weight"), misfit.network.get("patch_embed.proj.weight")
    if here is None or there is None or len(here) != 4:
        return ""
    if here[0] != there[0]:
        return f"their tokens have {here[0]} numbers, the network's {there[0]}: give a network of that width"
    if here[-1] != there[-1]:
        return f"give {_arguments_text(patch_size=here[-1])}"
    if "pos_embed" in misfit.reshaped and len(misfit.weights["pos_embed"]) == 3:
        return _position_hint(misfit, here[-1])
    return ""


def _position_hint(misfit: Misfit, step: int) -> str:
    """Positions of another grid, or with those of class and register tokens where the network has none, and back."""
    count, due = misfit.weights["pos_embed"][1], misfit.network["pos_embed"][1]
    registers = misfit.network.get("reg_token", (1, 0, 0))[1]
    own = next((prefix for prefix in (0, 1, 1 + registers) if grid_side(due - prefix)), 0)
    for prefix in (own, 0, 1, 1 + registers):
        if side := grid_side(count - prefix):
            words: dict[str, object] = {} if prefix == own else {"no_embed_class": prefix == 0}
            if side != grid_side(due - own):
                words["img_size"] = side * step
            return f"give {_arguments_text(**words)}"
    return ""


_HINTS = (_hint_names, _hint_gated, _hint_scale, _hint_registers, _hint_depth, _hint_norm, _hint_sizes)
