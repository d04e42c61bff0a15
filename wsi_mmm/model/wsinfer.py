"""Models of the WSInfer zoo: a folder with ``config.json`` and ``torchscript_model.pt``. No torch; nothing is opened
but the configuration, and the script only for its hash.

The format is that of https://github.com/SBU-BMI/wsinfer-zoo (wsinfer_zoo/schemas/model-config.schema.json, version
1.0); what the numbers mean is that of https://github.com/SBU-BMI/wsinfer (wsinfer/modellib/run_inference.py and
transforms.py): torchvision's Resize of a PIL image, ToTensor, Normalize; softmax over classes, a sigmoid where there
is one.
"""

from __future__ import annotations

import colorsys
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from wsi_mmm.errors import ModelError
from wsi_mmm.model.bounds import MAX_CLASSES, MAX_IMAGE
from wsi_mmm.model.card import CARD, SCRIPT, DecoderCard, EncoderCard, ModelCard, TaskCard
from wsi_mmm.model.find_weights import find_snapshot, local_places
from wsi_mmm.model.recipe import IMAGENET_MEAN, IMAGENET_STD, ColourTriple
from wsi_mmm.model.weights_config import HUB, split_source

CONFIG = "config.json"
TASK = "classify"
"""The name of the one task that such a model has."""
MAX_CONFIG_BYTES = 1 << 20
MAX_TILE = 8192
MAX_NAME = 200
_VERSION = "1.0"
_STEPS = ("Resize", "ToTensor", "Normalize")
_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # numbers of PIL, as torchvision takes them
_SAME_COLOURS: tuple[ColourTriple, ColourTriple] = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(frozen=True, slots=True)
class TileTransform:
    """The steps from a tile to what the network takes. ``size``: (height, width) px after resizing; None: not resized,
    a single number: the length of the shorter side. ``interpolation``: "nearest", "bilinear", "bicubic".
    ``mean``, ``std`` of RGB in [0, 1]."""

    size: tuple[int, ...] | None = None
    interpolation: str = "bilinear"
    mean: ColourTriple = _SAME_COLOURS[0]
    std: ColourTriple = _SAME_COLOURS[1]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON, for the process that runs the model."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ScriptModel:
    """A model of the zoo: where its script lies, the sha256 of that, the card and the transform that its configuration
    comes to, and ``identity``, the sha256 of script and configuration together."""

    script: Path
    sha256: str
    card: ModelCard
    transform: TileTransform
    identity: str


def find_script(name: str) -> Path | None:
    """The folder of a TorchScript model: a folder with one, or ``hf-hub:org/name`` in the hub's cache; None: ``name``
    means another kind of model. ModelError: of the hub, and not on this machine, where nothing is downloaded."""
    source, rest = split_source(name)
    if source == HUB:
        folder = find_snapshot(rest, local_places())
        if folder is not None and (folder / SCRIPT).is_file():
            return folder
        repository = rest.partition("@")[0]
        raise ModelError(
            f"{name} is not on this machine, or has no {SCRIPT}: where there is network, hf download {repository} "
            f"--local-dir {repository.rpartition('/')[2]}; then give that folder as the model"
        )
    return Path(name).expanduser() if is_script_folder(name) else None


def is_script_folder(name: str) -> bool:
    """Return whether ``name`` is a folder with TorchScript and no model of ours."""
    folder = Path(name).expanduser()
    return "://" not in name and (folder / SCRIPT).is_file() and not (folder / CARD).is_file()


def read_script_model(folder: Path) -> ScriptModel:
    """The model in a folder; its script is hashed and not opened otherwise. ModelError naming what is wrong."""
    path, script = folder / CONFIG, folder / SCRIPT
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelError(f"{path} has more than {MAX_CONFIG_BYTES:,} bytes: take the {CONFIG} of the model")
        data = path.read_bytes()
        raw = json.loads(data)
    except FileNotFoundError as error:
        raise ModelError(f"{folder} holds {SCRIPT} but no {CONFIG}: copy the whole folder of the model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: take the {CONFIG} of the model") from error
    try:
        with script.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"the model {script} cannot be read: {error.strerror}") from error
    card, transform = parse_config(raw, str(path), folder.resolve().name)
    identity = hashlib.sha256(json.dumps([hashlib.sha256(data).hexdigest(), sha256]).encode()).hexdigest()
    return ScriptModel(script, sha256, card, transform, identity)


def parse_config(raw: Any, source: str, name: str = "model") -> tuple[ModelCard, TileTransform]:
    """The card and the transform of a configuration that was read from JSON. ModelError names the first fault."""
    if not isinstance(raw, Mapping):
        _refuse(source, f"is {type(raw).__name__}, not an object")
    if raw.get("spec_version") != _VERSION:
        _refuse(source, f"is of spec_version {raw.get('spec_version')!r}; {_VERSION!r} can be read")
    classes = raw.get("class_names")
    if not isinstance(classes, list) or not 0 < len(classes) <= MAX_CLASSES:
        _refuse(source, f"has no list class_names of at most {MAX_CLASSES:,}")
    for one in classes:
        if not isinstance(one, str) or not one.strip() or len(one) > MAX_NAME or not one.isprintable():
            _refuse(source, f"has the class name {str(one)[:40]!r}, which is none")
    if len(set(classes)) != len(classes):
        _refuse(source, "has two classes of one name")
    if raw.get("num_classes") != len(classes):
        _refuse(source, f"says num_classes {raw.get('num_classes')!r} and names {len(classes)} classes")
    tile = _whole_number(source, raw, "patch_size_pixels", 16, MAX_TILE)
    mpp: Any = raw.get("spacing_um_px")
    if not _is_number(mpp) or not 0.001 <= mpp <= 1000:
        _refuse(source, f"has spacing_um_px {mpp!r}: micrometres per pixel are wanted")
    transform = _read_transform(source, raw.get("transform"))
    title = raw.get("name") if isinstance(raw.get("name"), str) and raw["name"].isprintable() else name
    mean, std = (transform.mean, transform.std) if min(transform.std) > 0 else (IMAGENET_MEAN, IMAGENET_STD)
    task = TaskCard(
        name=TASK, kind="classify" if len(classes) > 1 else "multilabel", head="vector", outputs=len(classes),
        classes=tuple(classes), colors=tuple(map(_class_color, range(len(classes)))),
    )  # fmt: skip
    card = ModelCard(
        name=(title or name)[:MAX_NAME], encoder=EncoderCard(name=str(raw.get("architecture") or "unknown")[:MAX_NAME]),
        decoder=DecoderCard(bottleneck=0), mpp=float(mpp), tile_size=tile, overlap=0, mean=mean, std=std, tasks=(task,),
    )  # fmt: skip
    return card, transform


def _read_transform(source: str, raw: Any) -> TileTransform:
    """Resize (if it is there), ToTensor, Normalize (if it is there), in this sequence and with torchvision's names."""
    if not isinstance(raw, list) or not all(isinstance(step, Mapping) for step in raw):
        _refuse(source, "has no list transform")
    names = [step.get("name") for step in raw]
    if "ToTensor" not in names or names != [one for one in _STEPS if one in names]:
        shown = ", ".join(str(one)[:40] for one in names[:8])
        _refuse(source, f"has the transform {shown}: Resize, ToTensor, Normalize can be done, in this sequence")
    given: dict[str, Mapping[str, Any]] = {}
    for step in raw:
        arguments = step.get("arguments") or {}
        if not isinstance(arguments, Mapping):
            _refuse(source, f"has arguments of {step['name']} that are no object")
        given[step["name"]] = arguments
    if given["ToTensor"]:
        _refuse(source, "has arguments of ToTensor, which takes none")
    found: dict[str, Any] = {}
    if "Resize" in given:
        found |= _read_resize(source, given["Resize"])
    if "Normalize" in given:
        found |= _read_normalize(source, given["Normalize"])
    return TileTransform(**found)


def _read_resize(source: str, given: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(given) - {"size", "interpolation", "antialias"})  # PIL smooths whatever antialias says
    if unknown:
        _refuse(source, f"has the argument {str(unknown[0])[:40]!r} of Resize, which cannot be done")
    size = given.get("size")
    sides = size if isinstance(size, list) and 1 <= len(size) <= 2 else [size]
    if not all(type(side) is int and 1 <= side <= MAX_IMAGE for side in sides):
        _refuse(source, f"has the size {size!r} of Resize: one or two whole numbers to {MAX_IMAGE:,} are wanted")
    asked = given.get("interpolation", "bilinear")
    name = _FILTERS.get(asked, "") if type(asked) is int else asked
    if name not in _FILTERS.values():
        _refuse(source, f"has the interpolation {asked!r} of Resize: nearest, bilinear or bicubic are known")
    return {"size": tuple(sides), "interpolation": name}


def _read_normalize(source: str, given: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(given) - {"mean", "std", "inplace"})
    if unknown:
        _refuse(source, f"has the argument {str(unknown[0])[:40]!r} of Normalize, which cannot be done")
    found = {}
    for key in ("mean", "std"):
        values: Any = given.get(key)
        good = isinstance(values, list) and len(values) == 3 and all(map(_is_number, values))
        if not good or (key == "std" and min(values) <= 0):
            _refuse(source, f"has the {key} {str(values)[:60]} of Normalize: three numbers are wanted, above 0 for std")
        found[key] = tuple(map(float, values))
    return found


def _whole_number(source: str, raw: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = raw.get(name)
    if type(value) is not int or not least <= value <= most:
        _refuse(source, f"has {name} {value!r}: a whole number from {least} to {most:,} is wanted")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse(source: str, fault: str) -> NoReturn:
    raise ModelError(f"{source} {fault}: take the {CONFIG} that was published with the model")


def _class_color(number: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618 % 1.0, 0.75, 0.85)
    return round(red * 255), round(green * 255), round(blue * 255)
