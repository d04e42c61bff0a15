"""wsi_mmm: whole-slide images in, QuPath-ready GeoJSON out.

The names below are the public ones. Each is imported when it is first asked for, so that ``import wsi_mmm``
loads neither torch, dask, zarr nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from wsi_mmm._version import __version__

if TYPE_CHECKING:
    from wsi_mmm.api import (  # noqa: I001
        Event, Job, Observe, RunReport, attach, demo, embed, embed_encoders, export_model, fit_head, list_jobs,
        load_model, prepare_training, read_annotations, run, stream_tiles, submit, train, train_fractions,
    )  # fmt: skip
    from wsi_mmm.config import SlideSpec
    from wsi_mmm.errors import WsiError
    from wsi_mmm.inputs import expand_inputs
    from wsi_mmm.slides import Slide, open_slide
    from wsi_mmm.types import SlideInfo

__all__ = [
    "Event", "Job", "Observe", "RunReport", "Slide", "SlideInfo", "SlideSpec", "WsiError", "__version__", "attach",
    "demo", "embed", "embed_encoders", "expand_inputs", "export_model", "fit_head", "list_jobs", "load_model",
    "open_slide", "prepare_training", "read_annotations", "run", "stream_tiles", "submit", "train", "train_fractions",
]  # fmt: skip

_HOMES = {name: "wsi_mmm.api" for name in __all__ if name != "__version__"} | {
    "Slide": "wsi_mmm.slides", "SlideInfo": "wsi_mmm.types", "SlideSpec": "wsi_mmm.config",
    "WsiError": "wsi_mmm.errors", "expand_inputs": "wsi_mmm.inputs", "open_slide": "wsi_mmm.slides",
}  # fmt: skip


def __getattr__(name: str) -> object:
    """Import a public name from its home on first use (PEP 562); an unknown name is an AttributeError."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'wsi_mmm' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
