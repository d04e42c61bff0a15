"""The recipe of an encoder: all that turns pixels and weights into its published vector. JSON; no torch here."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from wsi_mmm.errors import ModelError
from wsi_mmm.model.bounds import check_arguments

Pooling = Literal["cls", "patch_mean", "cls+patch_mean", "gap", "native"]
Interpolation = Literal["bicubic", "bilinear"]
ColourTriple = tuple[float, float, float]

IMAGENET_MEAN: ColourTriple = (0.485, 0.456, 0.406)
IMAGENET_STD: ColourTriple = (0.229, 0.224, 0.225)


class EncoderRecipe(BaseModel):
    """One encoder: an entry of the registry, or what a user said of a bare timm network.

    ``architecture`` and ``arguments``: the timm name that the network is created with. ``mean``, ``std``: of RGB in
    [0, 1]; None: the weights' own configuration says it. ``tile_px``: width of the tiles that are read at ``mpp``;
    ``input_px``: what they are resized to (antialiased ``interpolation``) before the network, 0: not at all.

    ``pooling``: "cls", the class token; "patch_mean", the mean of the patch tokens; "cls+patch_mean", both, one after
    the other; all three after the last norm. "gap": the mean over the positions of the last map; "native": timm's own
    vector before the classifier. ``registers``: tokens after the class token that are no patches (None: as many as the
    network declares). ``dimension``: numbers in a vector, 0: not known before the network is built.

    ``precision``: what its authors compute with on a GPU. ``file``: name of the weights in the repository ``hub_id``;
    ``key_map``: how its tensors are renamed, empty: they have timm's names. ``sources``: where these facts come from.
    ``package``: NAME==VERSION of the installed package whose code is the network; empty: timm's is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str = Field(min_length=1)
    architecture: str = Field(min_length=1)
    arguments: dict[str, Any] = {}
    mean: ColourTriple | None = None
    std: ColourTriple | None = None
    input_px: int = Field(default=0, ge=0, le=4096)
    tile_px: int = Field(default=256, ge=16, le=8192)
    mpp: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    interpolation: Interpolation = "bicubic"
    pooling: Pooling = "native"
    registers: int | None = Field(default=None, ge=0)
    dimension: int = Field(default=0, ge=0)
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    file: str = ""
    key_map: str = ""
    licence: str = ""
    gated: bool = False
    hub_id: str = ""
    sources: tuple[str, ...] = ()
    package: str = ""

    @model_validator(mode="after")
    def _check_colours(self) -> EncoderRecipe:
        if (
            not all(math.isfinite(v) for v in (*(self.mean or ()), *(self.std or (1.0,))))
            or min(self.std or (1.0,)) <= 0
        ):
            raise ValueError("mean and std must be finite numbers, and std positive")
        check_arguments(self.arguments)
        return self

    @property
    def has_weights(self) -> bool:
        """True when it needs a file of weights: the code of a package may be all there is."""
        return not self.package or bool(self.hub_id or self.file)

    def value_facts(self) -> dict[str, Any]:
        """Return what its vectors depend on beside the weights, as JSON: names, licence and sources are left out."""
        names = {
            "architecture",
            "arguments",
            "mean",
            "std",
            "input_px",
            "interpolation",
            "pooling",
            "registers",
            "key_map",
        }
        package = {"package": self.package} if self.package else {}
        return self.model_dump(mode="json", include=names) | package


def parse_recipe(raw: Any, source: str = "encoder") -> EncoderRecipe:
    """Check a recipe in JSON (text, or what was read of it). ModelError names the first thing wrong with it."""
    try:
        found = json.loads(raw) if isinstance(raw, str) else raw
        return EncoderRecipe.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise ModelError(f"{source} is no valid encoder: {where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{source} is no valid encoder: it cannot be read as JSON") from error
