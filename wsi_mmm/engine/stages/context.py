"""What a process keeps open between works: slides, models, cache entries. One home, so that closing is one call."""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from wsi_mmm import timing
from wsi_mmm.cache import CachedReader, Choice, Entry, Quota, choose, pixels_uri
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.units import SlideTask
from wsi_mmm.errors import MissingPackage, ModelError
from wsi_mmm.slides import Slide, open_slide
from wsi_mmm.storage import store
from wsi_mmm.types import I64, Grid, Tiles

if TYPE_CHECKING:
    from wsi_mmm.model.runner import Runner
    from wsi_mmm.tasks.base import Task

K = TypeVar("K")
V = TypeVar("V")

OPEN_SLIDES = 8
KEPT = (
    32  # of each thing that belongs to a slide, so that a process that has seen thousands of them is as small as before
)

_lock = threading.RLock()
_loading = threading.Lock()  # of its own: slides are opened and their tissue is found while a model loads
_slides: OrderedDict[tuple[str, float | None, str | None], tuple[Slide, int]] = OrderedDict()
_runners: dict[tuple[str, str, int | None, str], Runner] = {}
_models: dict[tuple[str, str], str] = {}
_entries: OrderedDict[tuple[str, int], Entry] = OrderedDict()
_readers: OrderedDict[tuple[str, str], CachedReader] = OrderedDict()
_choices: OrderedDict[tuple[str, str], Choice] = OrderedDict()
_quotas: dict[tuple[str, int], Quota] = {}


def _recent(kept: OrderedDict[K, V], key: K, make: Callable[[], V]) -> V:
    """What is kept under ``key``, made when it is not; those that were asked for longest ago go. Hold the lock."""
    if key not in kept:
        kept[key] = make()
    kept.move_to_end(key)
    while len(kept) > KEPT:
        kept.popitem(last=False)
    return kept[key]


@contextmanager
def slide_of(task: SlideTask) -> Iterator[Slide]:
    """The slide of a task, opened once per process; at most a handful of idle ones stay open."""
    key = (task.uri, task.mpp, task.recipe.options.reader)
    with _lock:
        slide, users = _slides.pop(key) if key in _slides else (_opened(*key), 0)
        _slides[key] = (slide, users + 1)
        _trim()
    try:
        yield slide
    finally:
        with _lock:
            if key in _slides:
                _slides[key] = (slide, _slides[key][1] - 1)


def _opened(uri: str, mpp: float | None, reader: str | None) -> Slide:
    with timing.spent("prepare"):
        return open_slide(uri, mpp, reader)


def _trim() -> None:
    idle = [key for key, (_, users) in _slides.items() if users == 0]
    for key in idle[: max(0, len(_slides) - OPEN_SLIDES)]:
        _slides.pop(key)[0].close()


def reader_of(slide: Slide, task: SlideTask, grid: Grid, index: I64) -> CachedReader | None:
    """The tile cache in front of a slide's reader, where the recipe asks for one or it pays on tiles ``index``."""
    recipe = task.recipe
    if recipe.options.cache is None or recipe.options.cache_tiles == "off":
        return None
    key = (task.uri, pixels_uri(recipe.options.cache, slide.info, grid.scale_x, grid.scale_y))

    def made() -> CachedReader:
        return CachedReader(slide.reader, key[1], grid.scale_x, grid.scale_y, quota=_quota(recipe))

    with _lock:
        reader = _recent(_readers, key, made)
        if reader.inner is not slide.reader:
            reader = _readers[key] = made()
        if recipe.options.cache_tiles == "on":
            return reader
        tiles = Tiles(index[:, ::-1] * grid.stride, grid.tile, grid.scale_x, grid.scale_y)
        return reader if _recent(_choices, key, lambda: choose(reader, tiles)).use else None


def _quota(recipe: Recipe) -> Quota | None:
    if recipe.options.cache is None or recipe.options.cache_quota is None:
        return None
    key = (recipe.options.cache, recipe.options.cache_quota)
    if key not in _quotas:
        _quotas[key] = Quota(store.local_path(recipe.options.cache), recipe.options.cache_quota)
    return _quotas[key]


def tile_cache_words(task: SlideTask) -> str:
    """What was measured and chosen for the tiles of a slide in this process; nothing where nothing was to be chosen."""
    return next((choice.words for (uri, _), choice in _choices.items() if uri == task.uri), "")


def runner_of(recipe: Recipe) -> Runner:
    """The model of a recipe on its device, loaded once per process by what it is, wherever it lies."""
    key = (f"{recipe.model_hash}/{recipe.tasks}", recipe.options.device, recipe.options.threads, recipe.options.runtime)
    with timing.spent("prepare"), _loading:
        if key not in _runners:
            _runners[key] = _load(recipe)
        return _runners[key]


def _load(recipe: Recipe) -> Runner:
    try:
        from wsi_mmm.model.checkpoint import load_encoder, load_model
        from wsi_mmm.model.runner import Runner
    except ImportError as error:
        raise MissingPackage(
            f"the worker on {os.uname().nodename} cannot run models: it has no package {error.name!r}; "
            "install wsi-mmm with its dependencies on every worker"
        ) from error
    if recipe.encoder:
        model = load_encoder(recipe.model, weights=recipe.weights)
    else:
        model = load_model(_model_of(recipe))
    quantise = {task.info.name: task.quantise for task in tasks_of(recipe)}
    options = recipe.options
    runner = Runner(
        model, device=options.device, threads=options.threads, quantise=quantise, runtime=options.runtime,
        cache=_user_cache(recipe),
    )  # fmt: skip
    runner.warm_up(recipe.tile, recipe.tasks)
    return runner


def _model_of(recipe: Recipe) -> str:
    """The folder of a recipe's model on this machine. ModelError when it is not the one that the run began with."""
    from wsi_mmm.model.card import read_card
    from wsi_mmm.model.fetched import fetched, forget
    from wsi_mmm.model.identity import model_identity

    key = (recipe.model, recipe.model_hash)
    if key in _models:
        return _models[key]
    for _ in range(2):
        here = fetched(recipe.model, recipe.user_cache)
        if model_identity(here, read_card(here)) == recipe.model_hash:
            return _models.setdefault(key, here)
        forget(recipe.model)  # a process that lives long may hold an earlier one
    raise ModelError(
        f"the model {store.redact(recipe.model)} on {os.uname().nodename} is not the one the run was begun with: "
        "copy that to every worker, or begin the run again"
    )


def _user_cache(recipe: Recipe) -> Path | None:
    """The folder of what is kept per user here, or None where there is no home to keep it in."""
    with suppress(RuntimeError):
        return Path(recipe.user_cache).expanduser() if recipe.user_cache else None
    return None


def tasks_of(recipe: Recipe) -> list[Task]:
    """The tasks of a recipe, made from the model's card alone (no torch)."""
    if recipe.encoder or not recipe.tasks:
        return []
    from wsi_mmm.model.card import read_card
    from wsi_mmm.tasks import make_task

    cards = {card.name: card for card in read_card(_model_of(recipe)).tasks}
    return [make_task(cards[name]) for name in recipe.tasks]


def entry_of(uri: str, grid: Grid, block: int) -> Entry:
    """The cache entry at ``uri``, its arrays opened once per process."""
    with _lock:
        return _recent(_entries, (uri, block), lambda: Entry(uri, grid.rows, grid.columns, block))


def forget_entries(prefix: str) -> None:
    """Drop what is known of the entries under ``prefix``, whose files are about to go."""
    with _lock:
        for key in [key for key in _entries if key[0].startswith(prefix)]:
            del _entries[key]


def release(*, models: bool = True) -> None:
    """Close every slide and forget entries; with ``models``, the models too."""
    with _lock:
        for slide, _ in _slides.values():
            slide.close()
        _slides.clear()
        _entries.clear()
        _readers.clear()
        _choices.clear()
        _quotas.clear()
        if models:
            _runners.clear()
            _models.clear()


def peak_rss_mb() -> float:
    """Highest resident memory of this process so far, in MB, as the system accounts it."""
    with suppress(OSError, StopIteration):
        # Not getrusage, where there is more: after exec that still holds the peak of the process that forked this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1024
