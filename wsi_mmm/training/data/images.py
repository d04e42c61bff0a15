"""Picture files -> arrays: pixels and label images, of bounded size, at the model's resolution."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from wsi_mmm.errors import InputError, StorageError, WsiError
from wsi_mmm.storage import store
from wsi_mmm.tasks.targets import Boxes, Target
from wsi_mmm.training.data.base import ItemIndex, Sample, first_groups
from wsi_mmm.types import I32, U8

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
MAX_PX = 1 << 26
"""Px of a picture above which it is refused: larger ones are read as slides."""

MAX_SIDE = 1 << 15


@dataclass(frozen=True, slots=True)
class Origin:
    """Common facts of a folder of images: the data set's ``name``; ``group``, a regular expression whose first group,
    found in the path of a picture, names its patient or slide (None: every picture is by itself); ``factor``: px of
    the model's resolution per px of the files (their mpp / the model's mpp)."""

    name: str
    group: str | None = None
    factor: float = 1.0

    def groups(self, keys: Sequence[str]) -> list[str]:
        """The group of each key. InputError when the pattern is none, or does not fit a key."""
        if self.group is None:
            return list(keys)
        found = first_groups(self.group, keys, f"data '{self.name}': group")
        misfits = [key for key, group in zip(keys, found, strict=True) if group is None]
        if misfits:
            raise InputError(f"data '{self.name}': the group pattern does not fit {misfits[0]}")
        return [group for group in found if group is not None]


@dataclass(frozen=True)
class ImageItems:
    """A DataSource of whole pictures. ``image``: item -> uint8[h, w, 3]; ``targets``: item, (h, w) -> target by task.

    Both may raise InputError or StorageError: then the item is a failed sample. ``factor``: px of the model's
    resolution per px of the file; pixels and target are resampled by it.
    """

    name: str
    tasks: tuple[str, ...]
    index: ItemIndex
    image: Callable[[int], U8]
    targets: Callable[[int, tuple[int, int]], Mapping[str, Target]]
    factor: float = 1.0

    def read(self, numbers: Sequence[int], size: int) -> list[Sample]:
        """The pictures, whole; ``size`` is not looked at."""
        return [self._read_image(number) for number in numbers]

    def _read_image(self, number: int) -> Sample:
        key = self.index.keys[number]
        try:
            pixels = self.image(number)
            targets = self.targets(number, (pixels.shape[0], pixels.shape[1]))
        except WsiError as error:
            return Sample(key, failed=str(error))
        if self.factor != 1.0:
            pixels = resampled(pixels, self.factor)
            targets = {task: resample_target(target, self.factor) for task, target in targets.items()}
        return Sample(key, pixels, targets=targets)


def resampled(pixels: U8, factor: float) -> U8:
    """Pixels uint8[h, w, 3] scaled by ``factor``: area average down, bilinear up."""
    size = (max(1, round(pixels.shape[1] * factor)), max(1, round(pixels.shape[0] * factor)))
    method = Image.Resampling.BOX if factor < 1 else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(pixels).resize(size, method))


def resample_target(target: Target, factor: float) -> Target:
    """Label images int[..., h, w] by nearest neighbour, boxes by arithmetic; what has no place stays as it is."""
    if isinstance(target, Boxes):
        height, width = (max(1, round(side * factor)) for side in (target.height, target.width))
        by = np.array([width / target.width, height / target.height] * 2, np.float32)
        return Boxes(target.xyxy * by, target.labels, height, width)
    if not isinstance(target, np.ndarray) or target.ndim < 2:
        return target
    sides = [(side, max(1, round(side * factor))) for side in target.shape[-2:]]
    rows, columns = (((np.arange(wanted) + 0.5) * side / wanted).astype(np.int64) for side, wanted in sides)
    return np.ascontiguousarray(target[..., rows[:, None], columns])


# ---------------------------------------------------------------- files


def read_image(uri: str) -> U8:
    """uint8[h, w, 3]; transparent px are white, 16-bit grey is scaled. InputError: no picture, or too large."""
    with _open_image(uri) as image:
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            whole = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole)
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image, np.float64)
            return np.repeat(np.clip(values / 257.0, 0, 255).round().astype(np.uint8)[..., None], 3, axis=2)
        return np.asarray(image.convert("RGB"))


def read_labels(uri: str) -> I32:
    """int32[h, w] from a palette, grey (8, 16, 32 bit) or one-channel picture, or a .npy of integers."""
    if uri.lower().endswith(".npy"):
        return _read_npy(uri)
    with _open_image(uri) as image:
        if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
            raise InputError(
                f"{store.redact(uri)} is a label image in {image.mode} colours; save class numbers as grey or palette"
            )
        return np.asarray(image).astype(np.int32)


def _read_npy(uri: str) -> I32:
    file = io.BytesIO(store.read_bytes(uri))
    try:
        shape, dtype = _npy_header(file)
        if len(shape) != 2 or dtype.kind not in "iub" or math.prod(shape) > MAX_PX:
            raise InputError(f"{store.redact(uri)} holds {dtype}{list(shape)}, not integers [h, w]")
        file.seek(0)
        labels: I32 = np.lib.format.read_array(file, allow_pickle=False).astype(np.int32)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{store.redact(uri)} is no array file: {error}") from error
    return labels


def _npy_header(file: io.BytesIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of a .npy file, to be checked before memory is allocated for it."""
    versions = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in versions:
        raise ValueError(f"version {version}")
    shape, _, dtype = versions[version](file)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which can run code")
    return shape, dtype


def _open_image(uri: str) -> Image.Image:
    """The picture with its pixels loaded; its size is looked at before they are."""
    data = store.read_bytes(uri)
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PX or max(image.size) > MAX_SIDE:
            raise InputError(
                f"{store.redact(uri)} is {image.width} x {image.height} px: too large for a patch; list it as a slide"
            )
        image.load()
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{store.redact(uri)} is no readable picture ({error})") from error
    return image


def pictures_below(root: str) -> list[str]:
    """URIs of the pictures below a folder or prefix, sorted. InputError when there is none."""
    try:
        found = [uri for uri in store.list_uris(root) if uri.lower().endswith(ENDINGS)]
    except StorageError as error:
        raise InputError(f"{store.redact(root)} cannot be listed: {error}") from error
    found = sorted(uri for uri in found if not uri.rpartition("/")[2].startswith("."))
    if not found:
        raise InputError(f"no picture ({', '.join(ENDINGS)}) below {store.redact(root)}")
    return found


def below(root: str, uri: str) -> str:
    """``uri`` relative to ``root``."""
    base = root if "://" in root else store.local_path(root).absolute().as_posix()
    plain = uri if "://" in uri else store.local_path(uri).absolute().as_posix()
    return plain.removeprefix(base.rstrip("/") + "/")
