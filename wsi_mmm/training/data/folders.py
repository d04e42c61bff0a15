"""Folders of patches: a folder per class, picture + mask, picture + instances."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np

from wsi_mmm.errors import InputError
from wsi_mmm.storage import store
from wsi_mmm.tasks.targets import Target
from wsi_mmm.training.data.base import ItemIndex
from wsi_mmm.training.data.images import ImageItems, Origin, below, pictures_below, read_image, read_labels
from wsi_mmm.types import I32

LABEL_ENDINGS = (".png", ".tif", ".tiff", ".npy", ".bmp")
IGNORE = 255
"""Px value of a mask that means "unknown" unless ``values`` says otherwise."""


def class_folders(
    origin: Origin,
    root: str,
    *,
    task: str,
    classes: Sequence[str],
    folders: Mapping[str, str] | None = None,
) -> ImageItems:
    """``<root>/**/<folder>/**/picture``: the first folder of a path that is a class or is mapped to one by ``folders``
    ("": left out), so that ``train/<class>/picture`` is understood, too.

    InputError names a folder that is no class, and a class without pictures.
    """
    uris, keys, labels = [], [], []
    table = {name: name for name in classes} | dict(folders or {})
    for uri in pictures_below(root):
        key = below(root, uri)
        chosen = next((table[folder] for folder in key.split("/")[:-1] if folder in table), None)
        if chosen == "":
            continue
        if chosen is None or chosen not in classes:
            raise InputError(
                f"data '{origin.name}': {key} lies in no folder of a class; classes are {', '.join(classes)}; "
                'map other folders to them with folders = {...}, or to "" to leave them out'
            )
        uris.append(uri)
        keys.append(key)
        labels.append(list(classes).index(chosen))
    numbers = np.array(labels, np.int32)
    bare = [c for i, c in enumerate(classes) if not (numbers == i).any()]
    if bare:
        raise InputError(f"data '{origin.name}': no picture of class {bare[0]!r} below {store.redact(root)}")
    index = ItemIndex(keys, origin.groups(keys), numbers)
    return ImageItems(
        origin.name, (task,), index, lambda n: read_image(uris[n]), lambda n, _: {task: int(numbers[n])}, origin.factor,
    )  # fmt: skip


def image_masks(
    origin: Origin,
    images: str,
    masks: str,
    *,
    task: str,
    values: Mapping[int, int] | None = None,
    classes: int,
) -> ImageItems:
    """Pictures below ``images`` with a label image of the same relative path and stem below ``masks``, for `segment`.

    ``values``: px value -> class index (-1: unknown); None: the value is the class, 255 unknown. Values that mean
    nothing are an error of the picture, not background.
    """
    uris, files = _match_files(origin, images, masks)
    table = _value_table(values, classes)

    def target(n: int, shape: tuple[int, int]) -> Target:
        return mapped(_read_labels(files[n], shape), table, files[n])

    return _paired_images(origin, images, uris, task=task, target=target)


def image_class_masks(
    origin: Origin,
    images: str,
    masks: str,
    *,
    task: str,
    classes: Sequence[str],
) -> ImageItems:
    """Pictures below ``images`` and, per class, masks below ``<masks>/<class>``, for `multisegment`: above 0 is 1, 255
    in a mask that also holds 1 is unknown. A class without a mask of a picture is unknown there."""
    uris = pictures_below(images)
    by_class = [_by_stem(store.join(masks, c)) for c in classes]
    if not any(by_class):
        raise InputError(
            f"data '{origin.name}': no masks below {store.redact(masks)}/<class>; classes: {', '.join(classes)}"
        )

    def target(n: int, shape: tuple[int, int]) -> Target:
        out = np.full((len(classes), *shape), -1, np.int8)
        for k, found in enumerate(by_class):
            uri = found.get(_path_stem(below(images, uris[n])))
            if uri is not None:
                values = _read_labels(uri, shape)
                out[k] = values > 0
                if ((values > 0) & (values < IGNORE)).any():
                    out[k][values == IGNORE] = -1
        return out

    return _paired_images(origin, images, uris, task=task, target=target)


def image_instances(
    origin: Origin,
    images: str,
    labels: str,
    *,
    task: str,
    classes: str | None = None,
    values: Mapping[int, int] | None = None,
    count: int = 1,
) -> ImageItems:
    """Pictures below ``images`` with an instance image (0 background, a number per object) below ``labels``.

    Of a task with several classes (``count``) the target is int32[2, h, w]; ``classes``: where label images of the
    same names say the class of each px, read as those of `image_masks` (None: classes are unknown).
    """
    uris, files = _match_files(origin, images, labels)
    maps = None if classes is None else _match_files(origin, images, classes)[1]
    table = _value_table(values, count)

    def target(n: int, shape: tuple[int, int]) -> Target:
        numbers = _read_labels(files[n], shape)
        if count < 2:
            return numbers
        known = np.full_like(numbers, -1) if maps is None else mapped(_read_labels(maps[n], shape), table, maps[n])
        return np.stack([numbers, np.where(numbers > 0, known, -1)])

    return _paired_images(origin, images, uris, task=task, target=target)


def _value_table(values: Mapping[int, int] | None, classes: int) -> dict[int, int]:
    return dict(values) if values is not None else {**{i: i for i in range(classes)}, IGNORE: -1}


def mapped(values: I32, table: Mapping[int, int], uri: str) -> I32:
    """Px values -> class indices. InputError naming a value that ``table`` does not know."""
    found, where = np.unique(values, return_inverse=True)
    unknown = sorted(set(found.tolist()) - set(table))
    if unknown:
        known = ", ".join(map(str, sorted(table)))
        raise InputError(f"{store.redact(uri)} holds the value {unknown[0]}, which means nothing; known: {known}")
    return np.array([table[v] for v in found.tolist()], np.int32)[where].reshape(values.shape)


def _paired_images(
    origin: Origin,
    root: str,
    uris: Sequence[str],
    *,
    task: str,
    target: Callable[[int, tuple[int, int]], Target],
) -> ImageItems:
    keys = [below(root, uri) for uri in uris]
    index = ItemIndex(keys, origin.groups(keys), np.full(len(keys), -1, np.int32))
    return ImageItems(
        origin.name, (task,), index, lambda n: read_image(uris[n]), lambda n, s: {task: target(n, s)}, origin.factor
    )


def _match_files(origin: Origin, images: str, labels: str) -> tuple[list[str], list[str]]:
    """Pictures, and the label image of each, by path and stem. InputError names a picture without one."""
    found, uris, files = _by_stem(labels), pictures_below(images), []
    for uri in uris:
        stem = _path_stem(below(images, uri))
        if stem not in found:
            raise InputError(
                f"data '{origin.name}': no label image {stem}.png (or .tif, .npy) below {store.redact(labels)}"
            )
        files.append(found[stem])
    return uris, files


def _by_stem(root: str) -> dict[str, str]:
    uris = [uri for uri in store.list_uris(root) if uri.lower().endswith(LABEL_ENDINGS)]
    return {_path_stem(below(root, uri)): uri for uri in uris}


def _path_stem(key: str) -> str:
    return str(PurePosixPath(key).with_suffix(""))


def _read_labels(uri: str, shape: tuple[int, int]) -> I32:
    values = read_labels(uri)
    if values.shape != shape:
        found, wanted = (" x ".join(map(str, side)) for side in (values.shape, shape))
        raise InputError(f"{store.redact(uri)} is {found} px, its picture {wanted}: save both at one size")
    return values
