"""timm networks with the vector that their authors publish: one pass gives maps for decoders and the pooled vector."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from wsi_mmm.errors import ModelError, first_line
from wsi_mmm.model.choose import TimmFacts
from wsi_mmm.model.recipe import IMAGENET_MEAN, IMAGENET_STD, ColourTriple, Pooling

_FREE_SIZE = {"dynamic_img_size": True}
BUILD_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError, IndexError)


class PooledBackbone(nn.Module):
    """A whole timm network (``model``) and the way its tokens or its last map become a vector.

    ``forward`` gives the maps, finest first, as timm's ``features_only`` does; `forward_pooled` the vector of
    ``vector_width`` numbers too, from one pass. A network without maps (``channels`` empty) gives vectors alone.
    """

    def __init__(self, model: nn.Module, pooling: Pooling, registers: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.prefix = _count_prefix(model, registers)
        self.vector_width = _vector_width(model, pooling)
        self.picks, self.channels, self.strides = _choose_maps(model)
        self.stops_early = "stop_early" in _parameter_names(model, "forward_intermediates")
        if pooling not in ("native", "gap"):
            self._check_tokens()

    def forward(self, x: Tensor) -> list[Tensor]:
        """float[n, 3, h, w] -> maps, finest first."""
        return self.forward_pooled(x, maps=True)[0]

    def forward_pooled(self, x: Tensor, *, maps: bool) -> tuple[list[Tensor], Tensor]:
        """float[n, 3, h, w] -> maps (none unless ``maps``) and the vector float[n, vector_width]."""
        network: Any = self.model
        if not maps:
            return [], self._pool_features(network.forward_features(x))
        if not self.channels:
            raise ModelError(f"timm's {type(network).__name__} gives no maps: use it for vectors only")
        options: dict[str, Any] = {"stop_early": False} if self.stops_early else {}
        final, found = network.forward_intermediates(x, indices=self.picks, norm=False, output_fmt="NCHW", **options)
        return list(found), self._pool_features(final)

    def _pool_features(self, final: Tensor) -> Tensor:
        """The result of timm's ``forward_features`` -> the vector."""
        network: Any = self.model
        if self.pooling == "native":
            vector: Tensor = network.forward_head(final, pre_logits=True)
            return vector.flatten(1)
        if self.pooling == "gap":
            return self._mean_positions(final)
        patches = final[:, self.prefix :].mean(dim=1)
        if self.pooling == "patch_mean":
            return patches
        return final[:, 0] if self.pooling == "cls" else torch.cat((final[:, 0], patches), dim=1)

    def _mean_positions(self, final: Tensor) -> Tensor:
        if final.ndim == 3:
            return final[:, self.prefix :].mean(dim=1)
        last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        return final.mean(dim=(1, 2) if last else (2, 3))

    def _check_tokens(self) -> None:
        """ModelError unless the network has the tokens that the pooling takes, normed."""
        name = type(self.model).__name__
        if not hasattr(self.model, "num_prefix_tokens"):
            raise ModelError(
                f"the pooling '{self.pooling}' needs tokens, which timm's {name} has not: use native or gap"
            )
        if "cls" in self.pooling and not self.prefix:
            raise ModelError(f"the pooling '{self.pooling}' needs a class token, which this {name} has not")
        if isinstance(getattr(self.model, "norm", None), nn.Identity):
            raise ModelError(
                f"this {name} norms its vector after pooling, so its tokens are not normed: use the pooling native, "
                """or embed --encoder-args '{"global_pool": "token"}'"""
            )


def timm_facts(name: str) -> TimmFacts | None:
    """The facts that timm declares of a name; None when it has no such network."""
    if not timm.is_model(name.partition(".")[0]):
        return None
    try:
        found: Any = timm.get_pretrained_cfg(name)
    except RuntimeError:  # a tag that this network has not
        return None
    if found is None:
        return TimmFacts()
    mean, std, hub = found.mean, found.std, found.hf_hub_id or ""
    return TimmFacts(
        (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]),
        hub + (f"{found.architecture}.{found.tag}" if hub.endswith("/") else ""),
        found.hf_hub_filename or "", found.license or "",
    )  # fmt: skip


def network_names() -> list[str]:
    """Names of all networks of timm."""
    return list(timm.list_models())


def renamed_by_timm(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file that timm offers for this network, under the names that timm itself gives them on loading."""
    rename: Any = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    try:
        return dict(rename(dict(tensors), network)) if rename is not None else dict(tensors)
    except BUILD_ERRORS:  # not of the kinds that it knows
        return dict(tensors)


def create_network(architecture: str, arguments: Mapping[str, Any], *, empty: bool) -> nn.Module:
    """The timm network without its classifier; ``empty``: on the meta device, to be filled with `fill_network`.

    Networks whose positions can be resampled take any size of image. ModelError if timm cannot build it.
    """
    options = {"num_classes": 0, **arguments}
    try:
        with torch.device("meta" if empty else "cpu"):
            try:
                return timm.create_model(architecture, pretrained=False, **(_FREE_SIZE | options))
            except TypeError as error:
                if "dynamic_img_size" not in str(error):
                    raise
            return timm.create_model(architecture, pretrained=False, **options)
    except BUILD_ERRORS as error:
        raise ModelError(f"timm cannot build the encoder '{architecture}': {first_line(error)}") from error


def fill_network(
    architecture: str, arguments: Mapping[str, Any], empty: nn.Module, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """``empty`` (of `create_network`) with ``tensors``, which fit it exactly and are not copied.

    What no file holds (tables of positions) is computed; networks for which timm does not say how are built once more.
    """
    empty.load_state_dict(dict(tensors), assign=True)
    for module in empty.modules():
        names = [name for name, value in module.named_buffers(recurse=False) if value.is_meta]
        compute: Any = getattr(module, "init_non_persistent_buffers", None)
        if names and compute is not None:
            for name in names:
                module._buffers[name] = torch.empty_like(module.get_buffer(name), device="cpu")
            compute()
    if not any(value.is_meta for value in _held_tensors(empty)):
        return empty
    network = create_network(architecture, arguments, empty=False)
    network.load_state_dict(dict(tensors), assign=True)
    return network


def _held_tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()
    for module in network.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def declared_colours(network: nn.Module) -> tuple[ColourTriple, ColourTriple]:
    """Mean and std that timm knows for the weights of its tag, else ImageNet's."""
    config = network_config(network)
    mean, std = config.get("mean") or IMAGENET_MEAN, config.get("std") or IMAGENET_STD
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def network_config(network: nn.Module) -> dict[str, Any]:
    """timm's own configuration of a network (``pretrained_cfg``)."""
    for held in (network, getattr(network, "model", None)):
        config = getattr(held, "pretrained_cfg", None)
        if isinstance(config, dict):
            return config
    return {}


def check_input(network: nn.Module, px: int, name: str) -> None:
    """ModelError naming sizes that fit when a network cannot take images of ``px`` x ``px``."""
    embed: Any = getattr(network, "patch_embed", None)
    size, step = getattr(embed, "img_size", None), getattr(embed, "patch_size", None)
    if not isinstance(step, tuple) or getattr(embed, "dynamic_img_pad", False):
        return
    fixed = size[0] if isinstance(size, tuple) and getattr(embed, "strict_img_size", True) else None
    if px != fixed if fixed else px % step[0]:
        near = fixed or max(step[0], px // step[0] * step[0])
        takes = f"of {fixed} px" if fixed else f"that are a multiple of {step[0]} px wide"
        raise ModelError(
            f"the encoder {name} takes images {takes}, not of {px} px: give --tile-size {near} to read such tiles, "
            f"or embed --input-size {near} to resize them"
        )


def _count_prefix(network: nn.Module, registers: int | None) -> int:
    """Tokens before those of the patches: class token and registers."""
    declared = int(getattr(network, "num_prefix_tokens", 0) or 0)
    if registers is None:
        return declared
    has_class = getattr(network, "cls_token", None) is not None
    return int(has_class) + registers


def _vector_width(network: nn.Module, pooling: Pooling) -> int:
    width = int(getattr(network, "num_features", 0) or 0)
    if pooling == "native":
        return int(getattr(network, "head_hidden_size", None) or width)
    return 2 * width if pooling == "cls+patch_mean" else width


def _choose_maps(network: nn.Module) -> tuple[list[int], tuple[int, ...], tuple[int, ...]]:
    """Which of timm's maps are taken, their channels and strides: all, or four depths where all have one stride."""
    info: Any = getattr(network, "feature_info", None)
    if not info or not hasattr(network, "forward_intermediates"):
        return [], (), ()
    facts = list(info)
    picks = list(range(len(facts)))
    if len(facts) > 1 and len({fact["reduction"] for fact in facts}) == 1:
        picks = sorted({max(0, round((i + 1) * len(facts) / 4) - 1) for i in range(4)})
    return picks, tuple(facts[i]["num_chs"] for i in picks), tuple(int(facts[i]["reduction"]) for i in picks)


def _parameter_names(network: nn.Module, method: str) -> set[str]:
    found = getattr(network, method, None)
    return set(inspect.signature(found).parameters) if found is not None else set()


def grid_side(tokens: int) -> int | None:
    """The side of a square grid of so many tokens; None when there is none."""
    side = math.isqrt(max(tokens, 0))
    return side if side and side * side == tokens else None
