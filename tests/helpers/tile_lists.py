"""Files that list the tiles of a slide, with the attributes that TRIDENT and CLAM write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np


def trident_file(
    path: Path, coords: Any, *, size: int, slide: tuple[int, int], magnification: int = 20, target: float = 20,
    overlap: int = 0, **more: Any,
) -> Path:  # fmt: skip
    """As ``coords_to_h5`` of TRIDENT: one row per chunk, the size at level 0 rounded down."""
    coords = np.asarray(coords, np.int64).reshape(-1, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        found = file.create_dataset("coords", data=coords, maxshape=(None, 2), chunks=(1, 2))
        found.attrs.update({
            "patch_size": size, "patch_size_level0": size * magnification // target, "overlap": overlap,
            "level0_magnification": magnification, "target_magnification": target, "name": path.stem,
            "savetodir": "/data/out", "level0_width": slide[0], "level0_height": slide[1], **more,
        })  # fmt: skip
    return path


def clam_file(
    path: Path, coords: Any, *, size: int, level: int, downsample: float, level_size: tuple[int, int], **more: Any
) -> Path:
    """As ``process_contour`` of CLAM: tiles are px of a level."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        found = file.create_dataset("coords", data=np.asarray(coords), maxshape=(None, 2))
        found.attrs.update({
            "patch_size": size, "patch_level": level, "downsample": (downsample, downsample),
            "downsampled_level_dim": level_size, "level_dim": level_size, "name": path.stem, "save_path": "out", **more,
        })  # fmt: skip
    return path
