"""The app: one job of the EMPAIA platform from its mode to its end, by the engine that runs everything else.

A job ends once, by `finalize` or by `failure`, whatever happens; a signal to stop is a failure, too. Outputs are posted
when the slide is done, so a job that dies before and is started again in the same work folder resumes. From the moment
posting begins a mark lies in that folder: a job that is started again after that cannot know what has arrived, and
fails, so nothing is ever posted twice. Where the folder is gone, the collections are new ones, or the platform refuses
them.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from wsi_mmm.config import EmpaiaJob, SlideSpec
from wsi_mmm.empaia.asked import SLIDE, Asked, asked, regions_geojson
from wsi_mmm.empaia.batches import Limits
from wsi_mmm.empaia.client import AppApi
from wsi_mmm.empaia.messages import INCOMPLETE, STOPPED, message_of
from wsi_mmm.empaia.transport import Patience
from wsi_mmm.errors import JobError, OptionError, OutputError, OutputTaken, PlatformError, StorageError, WsiError
from wsi_mmm.slides.service.app_api import SCHEME
from wsi_mmm.storage import store

T = TypeVar("T")
LIMITS = Limits(items=5000)
_MARK = "posting.json"
_AGAIN = "The job was interrupted while its results were being sent; please start a new job."
_TWICE = "The job was started twice at the same time; please start a new job."
_WATCH = 0.1  # seconds between looks at the engine
_HEARD = 10.0  # seconds that the platform gets to hear how far the job is
_LEAVE = 5.0  # seconds that the engine gets to stop, once the platform knows
_RUN, _POST = 0.05, 0.9  # progress when the slide is begun, and when posting begins


@dataclass(frozen=True, slots=True)
class App:
    """How an app works.

    ``scheduler``: of a Dask cluster whose workers have the job's EMPAIA variables and see the folder ``work``.
    ``work``: folder or URI of what is written on the way; None: one of this machine that is removed at the end.
    ``pictures``: lossless ones, so that results are those of the slide's file, or smaller ones. ``pause``: seconds
    between two reports of progress.
    """

    model: str = "default"
    vendor: str = "wsi_mmm"
    scheduler: str | None = None
    tls: str | None = None
    work: str | None = None
    device: str = "auto"
    pictures: Literal["png", "jpeg"] = "png"
    pause: float = 2.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended. ``error``: why it failed, in technical words; ``told``: whether the platform knows."""

    how: Literal["finalized", "failed", "stopped"]
    message: str = ""
    error: str = ""
    told: bool = True


def run_app(job: EmpaiaJob, app: App | None = None, *, patience: Patience | None = None) -> Ended:
    """Do the job of the environment. Called in the main thread, SIGTERM and SIGINT stop it."""
    return asyncio.run(_job(job, app or App(), patience))


def stop_app(job: EmpaiaJob, *, patience: Patience | None = None) -> Ended:
    """Tell the platform that the job was stopped before it began."""

    async def tell() -> Ended:
        async with AppApi(job, patience=patience) as api:
            return _clean(await _fail(api, STOPPED, "", "stopped"), job)

    return asyncio.run(tell())


async def _job(job: EmpaiaJob, app: App, patience: Patience | None) -> Ended:
    stop = asyncio.Event()
    _on_signals(stop)
    async with AppApi(job, LIMITS, patience=patience) as api:
        work = _Work(api, job, app)
        doing, stopped = asyncio.ensure_future(work.do()), asyncio.ensure_future(stop.wait())
        await asyncio.wait({doing, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not doing.done():
            doing.cancel()
            with suppress(asyncio.CancelledError, Exception):  # stopping matters, not what else went wrong
                await doing
            ended = await _fail(api, STOPPED, "", "stopped")
            await work.leave()
        else:
            ended = await _end(api, doing.exception())
        work.tidy(ended)
        return _clean(ended, job)


async def _end(api: AppApi, error: BaseException | None) -> Ended:
    if error is None:
        try:
            await api.finalize()
            return Ended("finalized")
        except (PlatformError, OutputError) as refused:
            error = refused
    return await _fail(api, message_of(error), _technical(error), "failed")


def _technical(error: BaseException) -> str:
    """What a log says of it: of what is worded for a pathologist, the cause."""
    if isinstance(error, JobError):
        return "" if error.__cause__ is None else _technical(error.__cause__)
    return str(error) if isinstance(error, WsiError) else f"unexpected {type(error).__name__}: {error}"


async def _fail(api: AppApi, message: str, error: str, how: Literal["failed", "stopped"]) -> Ended:
    try:
        await api.failure(message)
        return Ended(how, message, error)
    except PlatformError as refused:
        return Ended(how, message, f"{error or message}; the platform could not be told: {refused}", told=False)


def _on_signals(stop: asyncio.Event) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)


def _clean(ended: Ended, job: EmpaiaJob) -> Ended:
    """Without the token, whoever's words hold it."""
    return Ended(ended.how, ended.message, " ".join(ended.error.replace(job.token, "***").split()), ended.told)


async def _aside(work: Callable[[], T]) -> T:
    """``work`` in a thread of its own that nobody waits for when the program ends."""
    loop, found = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def done(error: BaseException | None, value: Any) -> None:
        if not found.done():
            found.set_result(value) if error is None else found.set_exception(error)

    def run() -> None:
        try:
            outcome: tuple[BaseException | None, Any] = (None, work())
        except BaseException as error:  # noqa: BLE001  (handed to whoever waits)
            outcome = (error, None)
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(done, *outcome)

    threading.Thread(target=run, name="empaia-aside", daemon=True).start()
    return await found  # type: ignore[no-any-return]


class _Work:
    """The work of a job, up to its end."""

    def __init__(self, api: AppApi, job: EmpaiaJob, app: App) -> None:
        self._api, self._job, self._app = api, job, app
        self._folder = app.work.rstrip("/") if app.work else _own_folder(job)
        self._engine: Any = None
        self._said, self._when = 0.0, float("-inf")

    async def do(self) -> None:
        """Everything but the end."""
        from wsi_mmm.empaia.posting import post_all

        question = await asked(self._api)
        answer = await self._answered(question)
        await _aside(self._mark)
        shares: list[float] = [0.0]
        posting = asyncio.ensure_future(post_all(self._api, answer, shares.append))
        try:
            while not posting.done():
                await asyncio.wait({posting}, timeout=self._app.pause)
                await self._progress(_POST + (1 - _POST) * shares[-1])
            await posting
        finally:
            posting.cancel()
            await asyncio.gather(posting, return_exceptions=True)

    async def _answered(self, question: Asked) -> Any:
        """What is to be posted: the slide run through the engine."""
        from wsi_mmm.empaia.posting import Answer
        from wsi_mmm.storage.retry import retry_unit

        order = await _aside(lambda: self._order(question))
        card, info, tissue = await _aside(lambda: retry_unit(partial(_looked_at, question=question), order))
        await self._progress(_RUN)
        results = await self._run(order)
        return Answer(question, card, self._app.vendor, results, tissue, info)

    def _order(self, question: Asked) -> Any:
        """The order of the engine, checked. JobError when this job has begun to post before."""
        from wsi_mmm import api

        if self._app.scheduler and not self._app.work:
            raise OptionError("on a cluster the work folder must be one that all workers see; name it with --work")
        _make(self._folder)
        if store.exists(store.join(self._folder, _MARK)):
            raise JobError(_AGAIN)
        options: dict[str, Any] = {"features": False, "overlay": False, "device": self._app.device}
        if question.regions:
            where = store.join(self._folder, "regions.geojson")
            store.write_bytes(where, regions_geojson(question.regions))
            options["regions"] = where
        if self._app.tls:
            options["tls"] = self._app.tls
        spec = SlideSpec(f"{SCHEME}://{self._job.id}/{SLIDE}?image_format={self._app.pictures}", SLIDE)
        output = store.join(self._folder, "results")
        return api.run_request(spec, self._app.model, output=output, scheduler=self._app.scheduler, **options)

    async def _run(self, order: Any) -> Any:
        """Run the engine, saying how far it is: the results of the slide."""
        from wsi_mmm.api import executor_factory
        from wsi_mmm.empaia.results import results_at
        from wsi_mmm.engine.job import Job
        from wsi_mmm.engine.run import run_slides

        engine = self._engine = Job(lambda listener, stop: run_slides(order, executor_factory(order), listener, stop))
        try:
            while not engine.done:
                await asyncio.sleep(_WATCH)
                await self._progress(_RUN + (_POST - _RUN) * engine.progress.fraction)
        except asyncio.CancelledError:
            engine.cancel()
            raise
        try:
            [row] = engine.result().slides
        except OutputTaken as error:
            raise JobError(_TWICE) from error
        if row.status not in ("done", "empty"):
            raise JobError(INCOMPLETE) from StorageError(row.error or row.status)
        return await _aside(lambda: results_at(order.tasks[0].output))

    async def _progress(self, share: float) -> None:
        """Tell the platform, not too often; a platform that does not listen keeps nobody waiting."""
        now = time.monotonic()
        if share - self._said < 0.01 or now - self._when < self._app.pause:
            return
        self._said, self._when = share, now
        with suppress(PlatformError, TimeoutError):
            await asyncio.wait_for(self._api.progress(share), timeout=_HEARD)

    def _mark(self) -> None:
        """From now on nobody else may post. JobError when somebody else has begun to."""
        where = store.join(self._folder, _MARK)
        if store.is_local(where):
            try:
                store.local_path(where).open("x").close()
            except FileExistsError as error:
                raise JobError(_AGAIN) from error
            except OSError as error:
                raise OutputError(f"cannot write to {self._folder}: {error.strerror or error}") from error
        elif store.exists(where):
            raise JobError(_AGAIN)
        else:
            store.write_bytes(where, b"{}")

    async def leave(self) -> None:
        """Wait a little for the engine to put its work down."""
        end = time.monotonic() + _LEAVE
        while self._engine is not None and not self._engine.done and time.monotonic() < end:
            await asyncio.sleep(_WATCH)

    def tidy(self, ended: Ended) -> None:
        """Remove the folder that is this job's own, when the platform knows how the job ended."""
        if ended.told and not self._app.work:
            shutil.rmtree(self._folder, ignore_errors=True)


def _looked_at(order: Any, question: Asked) -> tuple[Any, Any, Any]:
    """(model card, slide info, tissue polygons): the slide is opened once, and stays open for the engine."""
    from wsi_mmm.config import user_cache
    from wsi_mmm.empaia.geometry import joined
    from wsi_mmm.empaia.tissue import tissue_polygons
    from wsi_mmm.engine.stages import context
    from wsi_mmm.model.card import read_card
    from wsi_mmm.model.fetched import fetched
    from wsi_mmm.tiles.tissue import tissue_mask

    [task] = order.tasks
    with context.slide_of(task) as slide:
        slide.scale(order.recipe.mpp)
        area = joined([region.area for region in question.regions])
        found = tissue_polygons(tissue_mask(slide), question.wsi, area)
        return read_card(fetched(order.recipe.model, user_cache())), slide.info, found


def _own_folder(job: EmpaiaJob) -> str:
    """The same for a job that is started again on this machine."""
    return str(Path(tempfile.gettempdir()) / f"wsi-mmm-empaia-{job.id}")


def _make(folder: str) -> None:
    """Make the work folder, for nobody else's eyes. OutputError when it is somebody else's."""
    if not store.is_local(folder):
        return
    path = store.local_path(folder)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = path.lstat().st_uid
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}") from error
    if path.is_symlink() or owner != os.geteuid():
        raise OutputError(f"{folder} belongs to somebody else; name another folder with --work")
