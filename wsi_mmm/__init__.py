"""wsi_mmm: whole-slide images in, QuPath-ready GeoJSON out.

The names below are the public ones. Each is imported when it is first asked for, so that ``import wsi_mmm``
loads neither torch, dask, zarr nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from wsi_mmm._version import __version__

if TYPE_CHECKING:
    from wsi_mmm.api import Event as Event
    from wsi_mmm.api import Job as Job
    from wsi_mmm.api import Observe as Observe
    from wsi_mmm.api import RunReport as RunReport
    from wsi_mmm.api import attach as attach
    from wsi_mmm.api import demo as demo
    from wsi_mmm.api import embed as embed
    from wsi_mmm.api import export_model as export_model
    from wsi_mmm.api import fit_head as fit_head
    from wsi_mmm.api import list_jobs as list_jobs
    from wsi_mmm.api import load_model as load_model
    from wsi_mmm.api import prepare_training as prepare_training
    from wsi_mmm.api import read_annotations as read_annotations
    from wsi_mmm.api import run as run
    from wsi_mmm.api import stream_tiles as stream_tiles
    from wsi_mmm.api import submit as submit
    from wsi_mmm.api import train as train
    from wsi_mmm.api import train_fractions as train_fractions
    from wsi_mmm.config import SlideSpec as SlideSpec
    from wsi_mmm.errors import WsiError as WsiError
    from wsi_mmm.inputs import expand_inputs as expand_inputs
    from wsi_mmm.slides import Slide as Slide
    from wsi_mmm.slides import open_slide as open_slide
    from wsi_mmm.types import SlideInfo as SlideInfo

_HOMES = {
    "Event": "wsi_mmm.api",
    "Job": "wsi_mmm.api",
    "Observe": "wsi_mmm.api",
    "RunReport": "wsi_mmm.api",
    "Slide": "wsi_mmm.slides",
    "SlideInfo": "wsi_mmm.types",
    "SlideSpec": "wsi_mmm.config",
    "WsiError": "wsi_mmm.errors",
    "attach": "wsi_mmm.api",
    "demo": "wsi_mmm.api",
    "embed": "wsi_mmm.api",
    "export_model": "wsi_mmm.api",
    "expand_inputs": "wsi_mmm.inputs",
    "list_jobs": "wsi_mmm.api",
    "load_model": "wsi_mmm.api",
    "open_slide": "wsi_mmm.slides",
    "fit_head": "wsi_mmm.api",
    "prepare_training": "wsi_mmm.api",
    "read_annotations": "wsi_mmm.api",
    "train_fractions": "wsi_mmm.api",
    "run": "wsi_mmm.api",
    "stream_tiles": "wsi_mmm.api",
    "submit": "wsi_mmm.api",
    "train": "wsi_mmm.api",
}

__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604  (a literal plus names that are strings)


def __getattr__(name: str) -> object:
    """Import a public name from its home on first use (PEP 562); an unknown name is an AttributeError."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'wsi_mmm' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
