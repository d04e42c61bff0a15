"""Slices of volumes: NIfTI through nibabel, DICOM series through pydicom. A slice is a picture, a volume a group."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_mmm.errors import InputError
from wsi_mmm.plugins import import_package
from wsi_mmm.storage import store
from wsi_mmm.tasks.targets import Target
from wsi_mmm.training.data.base import ItemIndex
from wsi_mmm.training.data.folders import mapped
from wsi_mmm.training.data.images import ImageItems, below
from wsi_mmm.types import F32, U8

MAX_VOXELS = 1 << 30
NIFTI = (".nii", ".nii.gz")
DEFLATED = b"1.2.840.10008.1.2.1.99"  # PS3.5 A.5: its library unpacks such a file whole, however large that is
PERCENTILES = (0.5, 99.5)
_INSTALL = "volumes need nibabel and pydicom: pip install 'wsi-mmm[volumes]'"


IntensityWindow = tuple[float, float] | None
"""Values shown as black and white. None: the percentiles 0.5 and 99.5 of the volume."""


def nifti_slices(
    name: str,
    images: str,
    labels: str | None = None,
    *,
    task: str,
    axis: int = 2,
    values: Mapping[int, int] | None = None,
    window: IntensityWindow = None,
) -> ImageItems:
    """Slices along ``axis`` of every NIfTI volume below ``images``; ``labels`` holds label volumes of the same names.

    ``values``: voxel value -> class index (-1: unknown); None: the value is the class. Grey becomes three equal
    channels. Targets are for `segment`; without ``labels`` there are none.
    """
    uris = sorted(uri for uri in store.list_uris(images) if uri.lower().endswith(NIFTI))
    if not uris:
        raise InputError(f"data '{name}': no .nii or .nii.gz below {store.redact(images)}")
    volumes = lru_cache(maxsize=4)(_read_nifti)
    places = [(uri, n) for uri in uris for n in range(volumes(uri).shape[axis])]
    keys = [f"{below(images, uri)}#{n}" for uri, n in places]

    def image(number: int) -> U8:
        uri, n = places[number]
        return grey(np.take(volumes(uri), n, axis=axis), window, volumes(uri))

    def targets(number: int, shape: tuple[int, int]) -> Mapping[str, Target]:
        if labels is None:
            return {}
        uri, n = places[number]
        other = store.join(labels, below(images, uri))
        found = volumes(other)
        if found.shape != volumes(uri).shape:
            raise InputError(f"{store.redact(other)} has another shape than its volume")
        whole = np.take(found, n, axis=axis).round().astype(np.int32)
        table = values if values is not None else {int(v): int(v) for v in np.unique(whole)}
        return {task: mapped(whole, table, other)}

    index = ItemIndex(keys, [below(images, uri) for uri, _ in places], np.full(len(keys), -1, np.int32))
    return ImageItems(name, (task,), index, image, targets)


def dicom_slices(
    name: str,
    images: str,
    *,
    task: str,
    label: Callable[[str], Target] | None = None,
    window: IntensityWindow = None,
) -> ImageItems:
    """DICOM files (one slice each) below ``images``; the group is the patient (or series) that the file names.

    ``label``: patient -> target of its slices (a class, say); None: without target. Files of other kinds are left out.
    """
    uris = [uri for uri in sorted(store.list_uris(images)) if _is_dicom(uri)]
    if not uris:
        raise InputError(f"data '{name}': no DICOM file below {store.redact(images)}")
    groups = [_patient_id(uri) for uri in uris]

    def image(number: int) -> U8:
        values, own = _read_dicom(uris[number])
        coloured = values.dtype == np.uint8 and values.ndim == 3
        return values if coloured else grey(values, window or own, values)

    def targets(number: int, shape: tuple[int, int]) -> Mapping[str, Target]:
        return {} if label is None else {task: label(groups[number])}

    index = ItemIndex([below(images, uri) for uri in uris], groups, np.full(len(uris), -1, np.int32))
    return ImageItems(name, (task,), index, image, targets)


def grey(values: npt.NDArray[Any], window: IntensityWindow, whole: npt.NDArray[Any]) -> U8:
    """float[h, w] -> uint8[h, w, 3] between the window's values, or percentiles of ``whole``."""
    finite = whole[np.isfinite(whole)] if whole.dtype.kind == "f" else whole
    low, high = window or (np.percentile(finite, PERCENTILES).tolist() if finite.size else (0.0, 0.0))
    share = np.clip((np.nan_to_num(values.astype(np.float64)) - low) / max(high - low, 1e-9), 0.0, 1.0)
    return np.repeat((share * 255.0).round().astype(np.uint8)[..., None], 3, axis=2)


def _read_nifti(uri: str) -> F32:
    nibabel = import_package("nibabel", _INSTALL)
    with tempfile.TemporaryDirectory() as folder:  # nibabel reads files
        local = Path(folder) / uri.rpartition("/")[2]
        path = store.local_path(uri) if store.is_local(uri) else local
        if path == local:
            local.write_bytes(store.read_bytes(uri))
        try:
            image = nibabel.load(path)
            if len(image.shape) != 3 or int(np.prod(image.shape, dtype=np.int64)) > MAX_VOXELS:
                raise InputError(f"{store.redact(uri)} has the shape {image.shape}; volumes have three axes")
            found: F32 = np.asarray(image.dataobj, np.float32)
        except (OSError, ValueError, EOFError, nibabel.filebasedimages.ImageFileError) as error:
            raise InputError(f"{store.redact(uri)} is no readable NIfTI file ({error})") from error
    return found


def _is_dicom(uri: str) -> bool:
    named = uri.lower().endswith((".dcm", ".dicom"))
    return named or ("." not in uri.rpartition("/")[2] and store.read_bytes(uri)[128:132] == b"DICM")


def _patient_id(uri: str) -> str:
    header = _read_header(uri, stop=True)
    return str(header.get("PatientID") or header.get("SeriesInstanceUID") or uri)


def _read_header(uri: str, *, stop: bool) -> Any:
    pydicom = import_package("pydicom", _INSTALL)
    data = store.read_bytes(uri)
    if DEFLATED in data:
        raise InputError(
            f"{store.redact(uri)} is a deflated DICOM file, which may unpack to anything: save it otherwise"
        )
    try:
        return pydicom.dcmread(io.BytesIO(data), stop_before_pixels=stop)
    except (pydicom.errors.InvalidDicomError, ValueError, AttributeError, EOFError) as error:
        raise InputError(f"{store.redact(uri)} is no readable DICOM file ({error})") from error


def _read_dicom(uri: str) -> tuple[npt.NDArray[Any], IntensityWindow]:
    """Values (rescaled, of one frame) and the window that the file names."""
    data = _read_header(uri, stop=False)
    try:
        size = int(data.Rows) * int(data.Columns) * int(data.get("NumberOfFrames", 1) or 1)
        if size > MAX_VOXELS or int(data.get("NumberOfFrames", 1) or 1) != 1:
            raise InputError(f"{store.redact(uri)} holds several frames; whole-slide DICOM is read as a slide")
        values = data.pixel_array
        if values.ndim == 3:
            return np.asarray(values, np.uint8), None
        values = values * float(data.get("RescaleSlope", 1)) + float(data.get("RescaleIntercept", 0))
        if data.get("PhotometricInterpretation") == "MONOCHROME1":
            values = -values
        return values, _named_window(data)
    except (AttributeError, ValueError, RuntimeError, NotImplementedError, KeyError) as error:
        raise InputError(f"{store.redact(uri)} has pixels that cannot be read ({error})") from error


def _named_window(data: Any) -> IntensityWindow:
    named = data.get("WindowCenter"), data.get("WindowWidth")
    if None in named or data.get("PhotometricInterpretation") == "MONOCHROME1":
        return None
    centre, width = (float(value[0] if hasattr(value, "__len__") else value) for value in named)
    return centre - width / 2, centre + width / 2
