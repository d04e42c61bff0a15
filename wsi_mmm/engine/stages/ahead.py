"""The tissue of the first slide, found by a forked process while this one imports torch.

Importing is Python from end to end and much of finding tissue is, too, so threads would take turns: measured, the model
begins 0.8 s sooner. The forked process computes what this one would; where it cannot be forked safely, or comes to no
result, this one does the work.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from wsi_mmm.engine.units import SlideTask
from wsi_mmm.slides import Slide, open_slide
from wsi_mmm.storage import store
from wsi_mmm.tiles.tissue import TissueMask, tissue_mask

_LOCKED = ("torch", "obstore", "distributed", "llvmlite")  # with threads or locks of their own below Python

Key = tuple[str, float | None, str | None]


@dataclass(frozen=True, slots=True)
class _Helper:
    """A forked process and the end of the pipe that its mask comes through."""

    pid: int
    pipe: int


@dataclass(frozen=True, slots=True)
class Tissue:
    """A mask; ``spent``: what a receipt says of another process that found it (its memory is free again)."""

    mask: TissueMask
    spent: dict[str, Any] = field(default_factory=dict)


_helpers: dict[Key, _Helper] = {}


def begin(task: SlideTask) -> None:
    """Start looking for the tissue of a slide, if another process can and it is worth one. Returns at once."""
    if not _worth(task):
        return
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: those of OpenBLAS, which knows forks
        pid = os.fork()
    if pid == 0:
        _look(task, writing)
    os.close(writing)
    _helpers[_key(task)] = _Helper(pid, reading)


def tissue_of(slide: Slide, task: SlideTask) -> Tissue:
    """The tissue of a slide, from the process that began with it or found now."""
    helper = _helpers.pop(_key(task), None)
    mask = _taken(helper) if helper else None
    return mask or Tissue(tissue_mask(slide, task.mask or task.recipe.tissue))


def end() -> None:
    """Stop the processes whose result nobody has asked for."""
    for key in list(_helpers):
        helper = _helpers.pop(key)
        os.kill(helper.pid, signal.SIGKILL)
        _taken(helper)


def _key(task: SlideTask) -> Key:
    return task.uri, task.mpp, task.recipe.reader


def _worth(task: SlideTask) -> bool:
    """Whether the model is still to be imported, a file's tissue to be found, and nothing here breaks in a fork."""
    looked_for = not task.error and task.mask is None and task.recipe.tissue == "auto" and store.is_local(task.uri)
    able = sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1
    return looked_for and able and _alone() and not any(name in sys.modules for name in _LOCKED)


def _alone() -> bool:
    """Whether this is the only thread, but for one that draws progress."""
    others = set(threading.enumerate()) - {threading.main_thread()}
    here = threading.current_thread() is threading.main_thread()
    return here and all(type(one).__module__.startswith("rich.") for one in others)


def _look(task: SlideTask, pipe: int) -> NoReturn:
    """What the forked process does; it leaves without taking this process's things apart."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        warnings.simplefilter("ignore")  # the other process opens the slide, too
        with open_slide(*_key(task)) as slide, os.fdopen(pipe, "wb") as file:
            mask = tissue_mask(slide)
            facts = np.array([mask.scale_x, mask.scale_y, slide.reader.stats().bytes_read])
            buffer = io.BytesIO()
            np.savez(buffer, mask=mask.mask, facts=facts)
            file.write(buffer.getvalue())
    finally:
        os._exit(0)  # whatever went wrong goes wrong in the other process again, which says so


def _taken(helper: _Helper) -> Tissue | None:
    """What a process found, once it is through; None when it found nothing."""
    with os.fdopen(helper.pipe, "rb") as file:
        data = file.read()
    with suppress(ChildProcessError):  # where the system reaps for us
        os.waitpid(helper.pid, 0)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            scale_x, scale_y, bytes_read = found["facts"].tolist()
            spent = {"pid": helper.pid, "bytes_read": int(bytes_read), "peak_rss_mb": 0.0}
            return Tissue(TissueMask(found["mask"], scale_x, scale_y), spent)
    except (OSError, ValueError, KeyError, EOFError):
        return None
