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
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from wsi_mmm.config import EmpaiaJob, SlideSpec
from wsi_mmm.empaia.client import AppApi, Limits
from wsi_mmm.empaia.job_inputs import SLIDE, JobInputs, read_job_inputs, regions_geojson
from wsi_mmm.empaia.messages import INCOMPLETE, STOPPED, message_of
from wsi_mmm.empaia.transport import Patience
from wsi_mmm.errors import JobError, OptionError, OutputError, OutputTaken, PlatformError, StorageError, WsiError
from wsi_mmm.slides.service.app_api import SCHEME
from wsi_mmm.storage import store

if TYPE_CHECKING:
    from wsi_mmm.empaia.bodies import Polygon
    from wsi_mmm.empaia.posting import JobOutputs
    from wsi_mmm.empaia.results import Results
    from wsi_mmm.engine.job import Job
    from wsi_mmm.engine.monitoring.run_report import RunReport
    from wsi_mmm.engine.run import RunRequest
    from wsi_mmm.model.card import ModelCard
    from wsi_mmm.types import SlideInfo

T = TypeVar("T")
LIMITS = Limits(items=5000)
_POSTING_MARK = "posting.json"
_INTERRUPTED = "The job was interrupted while its results were being sent; please start a new job."
_STARTED_TWICE = "The job was started twice at the same time; please start a new job."
_POLL_SECONDS = 0.1  # seconds between looks at the engine
_PROGRESS_TIMEOUT = 10.0  # seconds that the platform gets to hear how far the job is
_STOP_TIMEOUT = 5.0  # seconds that the engine gets to stop, once the platform knows
_RUN, _POST = 0.05, 0.9  # progress when the slide is begun, and when posting begins


@dataclass(frozen=True, slots=True)
class App:
    """How an app works.

    ``scheduler``: of a Dask cluster whose workers have the job's EMPAIA variables and see ``folder``.
    ``folder``: path or URI for files on the way; None: one of this machine that is removed at the end.
    ``pictures``: lossless ones, so that results are those of the slide's file, or smaller ones. ``pause``: seconds
    between two reports of progress.
    """

    model: str = "default"
    vendor: str = "wsi_mmm"
    scheduler: str | None = None
    tls: str | None = None
    folder: str | None = None
    device: str = "auto"
    pictures: Literal["png", "jpeg"] = "png"
    pause: float = 2.0


@dataclass(frozen=True, slots=True)
class JobEnd:
    """How a job ended. ``error``: why it failed, in technical words; ``reported``: whether the platform knows."""

    how: Literal["finalized", "failed", "stopped"]
    message: str = ""
    error: str = ""
    reported: bool = True


def run_app(job: EmpaiaJob, app: App | None = None, *, patience: Patience | None = None) -> JobEnd:
    """Do the job of the environment. Called in the main thread, SIGTERM and SIGINT stop it."""
    return asyncio.run(_run_job(job, app or App(), patience))


def stop_app(job: EmpaiaJob, *, patience: Patience | None = None) -> JobEnd:
    """Tell the platform that the job was stopped before it began."""

    async def tell() -> JobEnd:
        async with AppApi(job, patience=patience) as api:
            return _without_token(await _report_failure(api, STOPPED, "", "stopped"), job)

    return asyncio.run(tell())


async def _run_job(job: EmpaiaJob, app: App, patience: Patience | None) -> JobEnd:
    stop = asyncio.Event()
    _stop_on_signals(stop)
    async with AppApi(job, LIMITS, patience=patience) as api:
        runner = _JobRunner(api, job, app)
        doing, stopped = asyncio.ensure_future(runner.run()), asyncio.ensure_future(stop.wait())
        await asyncio.wait({doing, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not doing.done():
            doing.cancel()
            with suppress(asyncio.CancelledError, Exception):  # stopping matters, not what else went wrong
                await doing
            ended = await _report_failure(api, STOPPED, "", "stopped")
            await runner.wait_for_engine()
        else:
            ended = await _end_job(api, doing.exception())
        runner.clean_up(ended)
        return _without_token(ended, job)


async def _end_job(api: AppApi, error: BaseException | None) -> JobEnd:
    if error is None:
        try:
            await api.finalize()
            return JobEnd("finalized")
        except (PlatformError, OutputError) as refused:
            error = refused
    return await _report_failure(api, message_of(error), _technical_text(error), "failed")


def _technical_text(error: BaseException) -> str:
    """The error as a log shows it: of a message for pathologists, its cause."""
    if isinstance(error, JobError):
        return "" if error.__cause__ is None else _technical_text(error.__cause__)
    return str(error) if isinstance(error, WsiError) else f"unexpected {type(error).__name__}: {error}"


async def _report_failure(api: AppApi, message: str, error: str, how: Literal["failed", "stopped"]) -> JobEnd:
    try:
        await api.failure(message)
        return JobEnd(how, message, error)
    except PlatformError as refused:
        return JobEnd(how, message, f"{error or message}; the platform could not be told: {refused}", reported=False)


def _stop_on_signals(stop: asyncio.Event) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)


def _without_token(ended: JobEnd, job: EmpaiaJob) -> JobEnd:
    """``ended`` without the token, wherever an error text holds it."""
    return JobEnd(ended.how, ended.message, " ".join(ended.error.replace(job.token, "***").split()), ended.reported)


async def _run_in_thread(function: Callable[[], T]) -> T:
    """``function()`` in a daemon thread of its own: the program does not wait for it when it ends."""
    found: Future[T] = Future()
    found.set_running_or_notify_cancel()

    def run() -> None:
        try:
            found.set_result(function())
        except BaseException as error:  # noqa: BLE001  (raised where the future is awaited)
            found.set_exception(error)

    threading.Thread(target=run, name="empaia-thread", daemon=True).start()
    return await asyncio.wrap_future(found)


class _JobRunner:
    """Runs a job up to its end."""

    def __init__(self, api: AppApi, job: EmpaiaJob, app: App) -> None:
        self._api, self._job, self._app = api, job, app
        own = str(Path(tempfile.gettempdir()) / f"wsi-mmm-empaia-{job.id}")  # the same for a job that is started again
        self._folder = app.folder.rstrip("/") if app.folder else own
        self._engine: Job[RunReport] | None = None
        self._last_share, self._last_time = 0.0, float("-inf")

    async def run(self) -> None:
        """Everything but ending the job."""
        from wsi_mmm.empaia.posting import post_all

        inputs = await read_job_inputs(self._api)
        outputs = await self._run_slide(inputs)
        await _run_in_thread(self._mark_posting)
        shares: list[float] = [0.0]
        posting = asyncio.ensure_future(post_all(self._api, outputs, shares.append))
        try:
            while not posting.done():
                await asyncio.wait({posting}, timeout=self._app.pause)
                await self._report_progress(_POST + (1 - _POST) * shares[-1])
            await posting
        finally:
            posting.cancel()
            await asyncio.gather(posting, return_exceptions=True)

    async def _run_slide(self, inputs: JobInputs) -> JobOutputs:
        """Run the slide through the engine: the outputs to post."""
        from wsi_mmm.empaia.posting import JobOutputs
        from wsi_mmm.storage.retry import retry_unit

        request = await _run_in_thread(lambda: self._prepare_request(inputs))
        card, info, tissue = await _run_in_thread(lambda: retry_unit(partial(_open_slide, inputs=inputs), request))
        await self._report_progress(_RUN)
        results = await self._run_engine(request)
        return JobOutputs(inputs, card, self._app.vendor, results, tissue, info)

    def _prepare_request(self, inputs: JobInputs) -> RunRequest:
        """The checked request for the engine. JobError when this job has begun to post before."""
        from wsi_mmm import api
        from wsi_mmm.config import user_cache
        from wsi_mmm.model.card import read_card
        from wsi_mmm.model.fetch import fetch_model

        if self._app.scheduler and not self._app.folder:
            raise OptionError("on a cluster the work folder must be one that all workers see; name it with --work")
        _make_folder(self._folder)
        if store.exists(store.join(self._folder, _POSTING_MARK)):
            raise JobError(_INTERRUPTED)
        spec = SlideSpec(f"{SCHEME}://{self._job.id}/{SLIDE}?image_format={self._app.pictures}", SLIDE)
        regions = None
        if inputs.regions:
            regions = store.join(self._folder, "regions.geojson")
            store.write_bytes(regions, regions_geojson(inputs.regions))
        tasks = [task.name for task in read_card(fetch_model(self._app.model, user_cache())).tasks]  # as its EAD says
        return api.run_request(
            spec, self._app.model, output=store.join(self._folder, "results"), tasks=tasks,
            scheduler=self._app.scheduler, tls=self._app.tls, regions=regions, features=False, overlay=False,
            measure="none", device=self._app.device,
        )  # fmt: skip

    async def _run_engine(self, request: RunRequest) -> Results:
        """Run the engine, reporting progress: the results of the slide."""
        from wsi_mmm.api import make_executor
        from wsi_mmm.empaia.results import results_at
        from wsi_mmm.engine.job import Job
        from wsi_mmm.engine.run import run_slides

        engine = self._engine = Job(
            lambda listener, stop: run_slides(request, partial(make_executor, request), listener, stop)
        )
        try:
            while not engine.done:
                await asyncio.sleep(_POLL_SECONDS)
                await self._report_progress(_RUN + (_POST - _RUN) * engine.progress.fraction)
        except asyncio.CancelledError:
            engine.cancel()
            raise
        try:
            [row] = engine.result().slides
        except OutputTaken as error:
            raise JobError(_STARTED_TWICE) from error
        if row.status not in ("done", "empty"):
            raise JobError(INCOMPLETE) from StorageError(row.error or row.status)
        return await _run_in_thread(lambda: results_at(request.tasks[0].output))

    async def _report_progress(self, share: float) -> None:
        """Tell the platform, not too often; a platform that does not listen keeps nobody waiting."""
        now = time.monotonic()
        if share - self._last_share < 0.01 or now - self._last_time < self._app.pause:
            return
        self._last_share, self._last_time = share, now
        with suppress(PlatformError, TimeoutError):
            await asyncio.wait_for(self._api.progress(share), timeout=_PROGRESS_TIMEOUT)

    def _mark_posting(self) -> None:
        """From now on nobody else may post. JobError when somebody else has begun to."""
        where = store.join(self._folder, _POSTING_MARK)
        if store.is_local(where):
            try:
                store.local_path(where).open("x").close()
            except FileExistsError as error:
                raise JobError(_INTERRUPTED) from error
            except OSError as error:
                raise OutputError(f"cannot write to {self._folder}: {error.strerror or error}") from error
        elif store.exists(where):
            raise JobError(_INTERRUPTED)
        else:
            store.write_bytes(where, b"{}")

    async def wait_for_engine(self) -> None:
        """Wait at most `_STOP_TIMEOUT` for the engine to stop."""
        end = time.monotonic() + _STOP_TIMEOUT
        while self._engine is not None and not self._engine.done and time.monotonic() < end:
            await asyncio.sleep(_POLL_SECONDS)

    def clean_up(self, ended: JobEnd) -> None:
        """Remove the folder that is this job's own, when the platform knows how the job ended."""
        if ended.reported and not self._app.folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def _open_slide(request: RunRequest, inputs: JobInputs) -> tuple[ModelCard, SlideInfo, list[Polygon]]:
    """(model card, slide info, tissue polygons): the slide is opened once, and stays open for the engine."""
    from wsi_mmm.config import user_cache
    from wsi_mmm.empaia.geometry import joined, tissue_polygons
    from wsi_mmm.engine.stages import context
    from wsi_mmm.model.card import read_card
    from wsi_mmm.model.fetch import fetch_model
    from wsi_mmm.tiles.tissue import tissue_mask

    [task] = request.tasks
    with context.open_slides.slide(context.slide_key(task)) as slide:
        slide.scale(request.recipe.mpp)
        area = joined([region.area for region in inputs.regions])
        found = tissue_polygons(tissue_mask(slide), inputs.wsi, area)
        return read_card(fetch_model(request.recipe.model, user_cache())), slide.info, found


def _make_folder(folder: str) -> None:
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
