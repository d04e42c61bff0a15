"""The slides, models and cache entries that a process keeps open, and the context that a unit runs in."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from wsi_mmm.cache import CacheEntry
from wsi_mmm.cache.slide_pool import SlideKey, SlidePool, TileCaching
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.units import SlideTask, UnitFacts, WorkUnit
from wsi_mmm.errors import MissingPackage, ModelError, ModelNotLoaded, PluginError, WsiError, first_line
from wsi_mmm.model.identity import device_kind
from wsi_mmm.slides import Reader, Slide
from wsi_mmm.slides.base import Fetched
from wsi_mmm.storage import store
from wsi_mmm.tiles.stream import Prefetcher
from wsi_mmm.timing import StageTimer, Step, StepTime, timed, worker_name
from wsi_mmm.types import Grid, Tiles

if TYPE_CHECKING:
    from wsi_mmm.model.answers import TileRunner
    from wsi_mmm.model.card import ModelCard
    from wsi_mmm.model.script_runner import ScriptRunner
    from wsi_mmm.tasks.base import Task

FAILED_SECONDS = 5.0  # for which a model that could not be loaded is not tried again
KEPT_ENTRIES = 32  # cache entries, so that a process that has seen thousands of slides is as small as before

open_slides = SlidePool()
_lock = threading.RLock()
_loading = threading.Lock()  # of its own: slides are opened and their tissue is found while a model loads
_runners: dict[tuple[str, str, int | None, str], TileRunner] = {}
_failures: dict[tuple[str, str, int | None, str], tuple[float, WsiError]] = {}
_models: dict[tuple[str, str], str] = {}
_tasks: dict[tuple[str, str, tuple[str, ...]], list[Task]] = {}
_entries: OrderedDict[tuple[str, int], CacheEntry] = OrderedDict()


UnitFetches = Prefetcher[WorkUnit, Fetched | None]
"""Gives a forward unit the bytes that were fetched for it before its turn."""
Turn = Callable[[Step], AbstractContextManager[object]]


class UnitContext:
    """The slide, grid, cache, tasks and model of a unit, each opened when first used; close it at the end.

    For one thread. ``turn``: gives, for a step, a context in which an executor lets this thread do it.
    """

    def __init__(self, unit: WorkUnit, fetches: UnitFetches | None = None, turn: Turn = nullcontext) -> None:
        self.unit, self.task, self.recipe = unit, unit.slide, unit.slide.recipe
        self.fetches, self._turn = fetches, turn
        self._times: list[StepTime] = []
        self._opened = ExitStack()
        self._slide: Slide | None = None

    @property
    def grid(self) -> Grid:
        """The target grid of a slide that is planned."""
        assert self.unit.grid is not None
        return self.unit.grid

    @property
    def slide(self) -> Slide:
        """The slide, open until the unit ends. Raises what `open_slide` raises."""
        if self._slide is None:
            with timed("prepare"):
                self._slide = self._opened.enter_context(open_slides.slide(slide_key(self.task)))
        return self._slide

    @property
    def cache(self) -> CacheEntry:
        """The cache entry that holds the values of the slide."""
        return cache_entry(self.unit.entry, self.grid, self.recipe.block_tiles)

    @property
    def tasks(self) -> list[Task]:
        """The tasks of the recipe."""
        return recipe_tasks(self.recipe)

    @property
    def runner(self) -> TileRunner:
        """The model on its device. Raises ModelNotLoaded, StorageError."""
        try:
            return load_runner(self.recipe)
        except (ModelError, MissingPackage, PluginError) as error:
            raise ModelNotLoaded(str(error)) from error

    def reader(self, tiles: Tiles) -> Reader:
        """The reader for ``tiles``: the slide's own, or the tile cache in front of it; open until the unit ends."""
        options, caching = self.recipe.options, None
        _ = self.slide  # opening it is timed
        if options.cache is not None and options.cache_tiles != "off":
            caching = TileCaching(options.cache, "on" if options.cache_tiles == "on" else "auto", options.cache_quota)
        return self._opened.enter_context(open_slides.reader(slide_key(self.task), tiles, caching))

    def tile_cache_text(self) -> str:
        """The measurement and choice for the slide's tiles in this process, for people; empty when there was none."""
        options = self.recipe.options
        if options.cache is None or options.cache_tiles != "auto":
            return ""
        return next(iter(open_slides.choice_texts(self.slide.info.uri)), "")

    @contextmanager
    def step(self, step: Step) -> Iterator[None]:
        """Wait for the turn of a step, and time it; a step that raises leaves no time behind."""
        with self._turn(step):
            with StageTimer(step, self.unit.name) as timer:
                yield
            self._times.append(timer.result)

    def facts(self) -> UnitFacts:
        """The facts of the unit's result, as of now."""
        unit, bytes_read = self.unit, self._slide.reader.stats().bytes_read if self._slide else 0
        return UnitFacts(
            unit.kind, unit.slide.id, unit.block, os.getpid(), worker_name(), bytes_read, peak_rss_mb(),
            tuple(self._times),
        )  # fmt: skip

    def close(self) -> None:
        """Give back what was opened."""
        self._opened.close()


def slide_key(task: SlideTask) -> SlideKey:
    """The key of a task's slide in `open_slides`."""
    return SlideKey(task.uri, task.mpp, task.recipe.options.reader, task.scene)


def load_runner(recipe: Recipe) -> TileRunner:
    """The model of a recipe on its device, loaded once per process by what it is, wherever it lies."""
    options = recipe.options
    runtime = recipe.runtime_on(device_kind(options.device))
    key = (f"{recipe.model_hash}/{recipe.tasks}", options.device, options.threads, runtime)
    with timed("prepare"), _loading:
        if key not in _runners:
            at, failed = _failures.get(key, (0.0, None))
            if failed is not None and time.monotonic() - at < FAILED_SECONDS:
                raise failed  # of the units that waited for it, none tries again
            try:
                _runners[key] = _make_runner(recipe, runtime)
            except WsiError as error:
                _failures[key] = time.monotonic(), error
                raise
        return _runners[key]


def _make_runner(recipe: Recipe, runtime: str) -> TileRunner:
    if recipe.script:
        return _make_script_runner(recipe)
    try:
        from wsi_mmm.model.checkpoint import load_model, open_encoder
        from wsi_mmm.model.choose import locate_weights, unread_encoder
        from wsi_mmm.model.runner import Runner
    except ImportError as error:
        raise MissingPackage(
            f"the worker on {os.uname().nodename} cannot run models: it has no package {error.name!r}; "
            "install wsi-mmm with its dependencies on every worker"
        ) from error
    if recipe.network is not None:
        try:
            path = locate_weights(recipe.network, recipe.weights)
        except ModelError as error:
            raise ModelError(f"the worker on {os.uname().nodename}: {error}") from error
        chosen = unread_encoder(recipe.network, path, recipe.weights)
        model = open_encoder(chosen, identity=recipe.model_hash)
    else:
        model = load_model(_local_model(recipe))
    options = recipe.options
    quantise = {task.info.name: task.quantise for task in recipe_tasks(recipe)}
    runner = Runner(
        model, device=options.device, threads=options.threads, quantise=quantise, runtime=runtime,
        cache=_user_cache(recipe),
    )  # fmt: skip
    try:
        runner.warm_up(recipe.tile, recipe.tasks)
    except WsiError:
        raise
    except Exception as error:  # torch and timm raise what they like where a size does not fit
        name = store.redact(recipe.model)
        raise ModelError(
            f"{name} does not take tiles of {recipe.tile} px ({first_line(error)}): another --tile-size?"
        ) from error
    return runner


def _make_script_runner(recipe: Recipe) -> ScriptRunner:
    from wsi_mmm.model.script_runner import ScriptRunner
    from wsi_mmm.model.wsinfer import read_script_model

    if not recipe.options.allow_torchscript:
        raise ModelError(f"{store.redact(recipe.model)} is TorchScript, which the run does not allow")
    runner = ScriptRunner(read_script_model(Path(_local_model(recipe))), recipe.options.threads)
    try:
        runner.warm_up(recipe.tile)
    except WsiError:
        runner.close()
        raise
    return runner


def _local_model(recipe: Recipe) -> str:
    """The folder of a recipe's model on this machine. ModelError when it is not the one that the run began with."""
    from wsi_mmm.model.fetch import fetch_model, forget_model
    from wsi_mmm.model.identity import model_identity
    from wsi_mmm.model.wsinfer import find_script, read_script_model

    key = (recipe.model, recipe.model_hash)
    if key in _models:
        return _models[key]
    for _ in range(2):
        script = find_script(recipe.model) if recipe.script else None
        here = str(script) if script else fetch_model(recipe.model, recipe.user_cache)
        found = read_script_model(script).identity if script else model_identity(here, _read_card(recipe, here))
        if found == recipe.model_hash:
            return _models.setdefault(key, here)
        forget_model(recipe.model)  # a process that lives long may hold an earlier one
    raise ModelError(
        f"the model {store.redact(recipe.model)} on {os.uname().nodename} is not the one the run was begun with: "
        "copy that to every worker, or begin the run again"
    )


def _read_card(recipe: Recipe, folder: str) -> ModelCard:
    """The card of a recipe's model in a folder of this machine."""
    from wsi_mmm.model.card import read_card
    from wsi_mmm.model.wsinfer import read_script_model

    return read_script_model(Path(folder)).card if recipe.script else read_card(folder)


def _user_cache(recipe: Recipe) -> Path | None:
    """The folder of what is kept per user here, or None where there is no home to keep it in."""
    with suppress(RuntimeError):
        return Path(recipe.user_cache).expanduser() if recipe.user_cache else None
    return None


def recipe_tasks(recipe: Recipe) -> list[Task]:
    """The tasks of a recipe, made once per process from the model's card alone (no torch)."""
    if recipe.encoder or not recipe.tasks:
        return []
    from wsi_mmm.tasks import make_task

    key = (recipe.model, recipe.model_hash, recipe.tasks)
    if key not in _tasks:
        cards = {card.name: card for card in _read_card(recipe, _local_model(recipe)).tasks}
        _tasks[key] = [make_task(cards[name]) for name in recipe.tasks]
    return _tasks[key]


def cache_entry(uri: str, grid: Grid, block: int) -> CacheEntry:
    """The cache entry at ``uri``, its arrays opened once per process; those used longest ago are forgotten."""
    key = (uri, block)
    with _lock:
        if key not in _entries:
            _entries[key] = CacheEntry(uri, grid.rows, grid.columns, block)
        _entries.move_to_end(key)
        while len(_entries) > KEPT_ENTRIES:
            _entries.popitem(last=False)
        return _entries[key]


def forget_entries(prefix: str) -> None:
    """Forget the entries under ``prefix``, whose files are about to be removed."""
    with _lock:
        for key in [key for key in _entries if key[0].startswith(prefix)]:
            del _entries[key]


def release(*, models: bool = True) -> None:
    """Close every slide and forget entries; with ``models``, the models too."""
    open_slides.close()
    with _lock:
        _entries.clear()
        _failures.clear()
        if models:
            _runners.clear()
            _models.clear()
            _tasks.clear()


def peak_rss_mb() -> float:
    """Highest resident memory of this process so far, in MB, as the system accounts it."""
    with suppress(OSError, StopIteration):
        # Not getrusage, where there is more: after exec that still holds the peak of the process that forked this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1024
