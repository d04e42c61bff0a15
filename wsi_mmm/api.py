"""The public functions: run, submit, embed, stream_tiles, load_model, demo."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, cast

from wsi_mmm.api_train import fit_head, prepare_training, read_annotations, train, train_fractions
from wsi_mmm.config import user_cache, visible_gpus
from wsi_mmm.engine.events import Event, Listener, silent
from wsi_mmm.engine.executors.job_registry import JobStatus
from wsi_mmm.engine.executors.tls import tls_of
from wsi_mmm.engine.job import Job
from wsi_mmm.engine.monitoring import run_report
from wsi_mmm.engine.monitoring.observe import NOTHING, Observe
from wsi_mmm.engine.monitoring.run_report import RunReport, load_report
from wsi_mmm.engine.run import RunRequest, run_slides
from wsi_mmm.engine.units import Executor
from wsi_mmm.errors import OptionError, PluginError
from wsi_mmm.model.kept_weights import keep_weights
from wsi_mmm.options import LEAST_TISSUE, EmbedKeywords, RunKeywords, make_options, split_keywords
from wsi_mmm.plugins import load_plugin, plugin_names
from wsi_mmm.requests import (
    Slides,
    check_recipe_here,
    encoder_folders,
    encoder_options,
    encoder_recipe,
    model_recipe,
    request_encoders,
    request_run,
    with_slide_model,
)
from wsi_mmm.slides import Slide
from wsi_mmm.types import Batch

if TYPE_CHECKING:
    from distributed import Client

    from wsi_mmm.engine.executors.dask_jobs import ClusterJob
    from wsi_mmm.model.multitask import MultiTaskModel
    from wsi_mmm.model.onnx import Exported

__all__ = [
    "Event", "Job", "JobStatus", "Observe", "RunReport", "attach", "demo", "embed", "embed_encoders", "export_model",
    "fit_head", "list_jobs", "load_model", "prepare_training", "read_annotations", "run", "stream_tiles", "submit",
    "train", "train_fractions",
]  # fmt: skip


def run(
    slides: Slides,
    model: str | Path = "default",
    *,
    output: str | Path,
    tasks: str | Sequence[str] | None = None,
    workers: int = 0,
    scheduler: str | None = None,
    progress: Listener | None = None,
    observe: Observe = NOTHING,
    **options: Unpack[RunKeywords],
) -> RunReport:
    """Run a model over slides and write one folder per slide; re-running resumes.

    Args:
        slides: a slide, folder, glob, ``s3://`` prefix, manifest CSV, or a list of these and of SlideSpec.
        model: "default", or the folder of a model, on disk or storage (``s3://bucket/model``).
        output: folder or ``s3://`` prefix for results and the run report.
        tasks: name or names of the model's tasks to run; None: all, or those that its card lists as ``default_tasks``.
        workers: 0: in this process with reader threads; n: n local processes.
        scheduler: address of a Dask cluster, ``tcp://host:port``; ``tls://host:port`` with ``tls``, a folder of
            certificates (``ca.crt``, ``tls.crt``, ``tls.key``).
        progress: called with an Event whenever something happened.
        observe: logs, metrics and traces of the run.
        **options: the options of `wsi_mmm.options.RunOptions`, listed in docs/cli.md.

    Returns:
        A RunReport: one row per slide, ``exit_code`` 0 only if every slide succeeded. A slide that fails does not stop
        the others.

    Raises:
        OptionError, ModelError, ManifestError, OutputError, ClusterError: before any slide is begun.
        Cancelled: on Ctrl-C; running the same again resumes.
    """
    request = run_request(slides, model, output=output, tasks=tasks, workers=workers, scheduler=scheduler, **options)
    return execute(request, progress, observe=observe)


def run_request(
    slides: Slides,
    model: str | Path = "default",
    *,
    output: str | Path,
    tasks: str | Sequence[str] | None = None,
    workers: int = 0,
    scheduler: str | None = None,
    **options: Unpack[RunKeywords],
) -> RunRequest:
    """Return the run that `run` would execute, with the same checks; no slide is opened."""
    asked = make_options(options, workers=workers, scheduler=scheduler)
    return request_run(slides, check_recipe_here(model_recipe(str(model), tasks, asked)), output)


def execute(request: RunRequest, progress: Listener | None = None, *, observe: Observe = NOTHING) -> RunReport:
    """Execute a run, in this process, in local processes or on a cluster, as its options say. Raises as `run` does."""
    listener = progress or (_log_warning if observe == NOTHING else silent)
    return run_slides(request, partial(make_executor, request), listener, observe=observe)


def submit(
    client: Client | str,
    slides: Slides,
    model: str | Path = "default",
    *,
    output: str | Path,
    tasks: str | Sequence[str] | None = None,
    observe: Observe = NOTHING,
    detach: bool = True,
    **options: Unpack[RunKeywords],
) -> Job[RunReport] | ClusterJob[RunReport]:
    """Run on the cluster of a Dask ``client``, or at an address, and return at once. Imports no torch here.

    The job lives on the cluster: it goes on when this process ends, and `attach` finds it by its ``.id``. With
    ``detach=False`` this process drives the run, and the run ends with it. ``options`` are those of `run`. Both kinds
    of job have ``.progress``, ``.result(timeout)``, ``.cancel()``, ``.done``.
    """
    from wsi_mmm.engine.executors.dask import DaskExecutor, client_of

    asked = make_options(options, scheduler=_scheduler_address(client))
    request = request_run(slides, model_recipe(str(model), tasks, asked), output)
    connected = client_of(client, tls=request.tls)
    if not detach:
        executor = partial(DaskExecutor, connected)
        return Job(lambda listener, stop: run_slides(request, executor, listener, stop, observe=observe))
    from wsi_mmm.engine.executors.dask_jobs import JobSpec, launch_job

    remote = replace(request, tls=None)  # paths of this machine
    load = partial(load_report, remote.output, remote.recipe, remote.tasks)
    job = JobSpec(partial(run_slides, remote, observe=observe), load)
    return launch_job(connected, request.output, len(request.tasks), job)


def attach(client: Client | str, job: str, *, tls: str | Path | None = None) -> ClusterJob[RunReport]:
    """Return the job of that id on the cluster of a Dask ``client``, or at an address, whoever submitted it.

    It has ``.status``, ``.progress``, ``.watch()``, ``.result(timeout)``, ``.cancel()``, ``.forget()``.
    ClusterError when the cluster knows no such job.
    """
    from wsi_mmm.engine.executors.dask_jobs import find_job

    return find_job(client, job, tls=tls_of(tls, _scheduler_address(client)))


def list_jobs(client: Client | str, *, tls: str | Path | None = None) -> list[tuple[JobStatus, bool]]:
    """Return every job that a cluster knows, the oldest first, and whether it is alive: False when it should run and
    the process that ran it is gone. Jobs that have ended stay until they are forgotten or fifty newer ones came."""
    from wsi_mmm.engine.executors.dask_jobs import job_statuses

    return job_statuses(client, tls=tls_of(tls, _scheduler_address(client)))


def embed(
    slides: Slides,
    encoder: str = "default",
    *,
    output: str | Path,
    workers: int = 0,
    scheduler: str | None = None,
    progress: Listener | None = None,
    observe: Observe = NOTHING,
    export: str | Sequence[str] = (),
    **options: Unpack[EmbedKeywords],
) -> RunReport:
    """Compute features only: one vector per tile, in ``<output>/<slide>/features.zarr``.

    ``encoder``: a model name or folder (its encoder is used), a timm name, ``hf-hub:org/name`` or ``local-dir:folder``;
    ``weights``: a local safetensors file for it, the folder of one, or "random". What these do not say: ``pool`` (cls,
    patch_mean, cls+patch_mean, gap, native), ``input_size`` px that tiles are resized to, ``mean`` and ``std`` of RGB,
    ``encoder_args`` of the timm network. Tiles are 256 px without overlap, at the mpp of a model or at
    0.5, unless ``options`` say otherwise.
    ``tiles``: a file of TRIDENT or CLAM that lists tiles, or a folder with one per slide: these are embedded, and
    ``coords`` of the features are the file's, row for row.
    ``slide``: a vector per slide, too, in ``<output>/<slide>/slide_features.h5``: "mean" of its tiles', or the folder
    of the bag model or ABMIL that makes it.
    ``export``: further formats per slide, of "h5" (TRIDENT, CLAM), "pt", "stamp" and "h5ad"; of slides' vectors
    "slide-h5" and "slide-stamp", and all in one table, "slides-h5" and "slides-h5ad". Otherwise as `run`.
    """
    formats = run_report.known_exports(export, slide=options.get("slide"))
    with keep_weights():
        request = embed_request(slides, encoder, output=output, workers=workers, scheduler=scheduler, **options)
        report = execute(request, progress, observe=observe)
    run_report.export_features(report, formats)
    return report


def embed_encoders(
    slides: Slides,
    encoders: Sequence[str],
    *,
    output: str | Path,
    workers: int = 0,
    scheduler: str | None = None,
    progress: Listener | None = None,
    observe: Observe = NOTHING,
    export: str | Sequence[str] = (),
    **options: Unpack[EmbedKeywords],
) -> dict[str, RunReport]:
    """Compute the features of several encoders in one pass over the pixels: encoder -> its report.

    As `embed` of each to ``<output>/<encoder>``, bit for bit, but tiles of the same size and mpp are read and decoded
    once. The same call again resumes; an encoder added later leaves the others as they are. ``weights``: "random", or
    None: those that each name stands for.
    """
    formats = run_report.known_exports(export, slide=options.get("slide"))
    reports = {}
    with keep_weights():
        requests = embed_requests(slides, encoders, output=output, workers=workers, scheduler=scheduler, **options)
        for encoder, request in zip(encoders, requests, strict=True):
            reports[encoder] = execute(request, progress, observe=observe)
            run_report.export_features(reports[encoder], formats)
    return reports


def embed_requests(
    slides: Slides,
    encoder: Sequence[str],
    *,
    output: str | Path,
    workers: int = 0,
    scheduler: str | None = None,
    **options: Unpack[EmbedKeywords],
) -> list[RunRequest]:
    """Return the runs that `embed_encoders` would execute, in their sequence; options of one encoder are refused."""
    own, rest = split_keywords(options)
    weights, slide = own.pop("weights", None), own.pop("slide", None)
    asked = make_options(rest, workers=workers, scheduler=scheduler)
    if isinstance(encoder, str) or not encoder or not all(isinstance(one, str) for one in encoder):
        raise OptionError(f"{encoder!r} is no list of encoders: give one or more names")
    if any(said is not None for said in own.values()) or weights not in (None, "random"):
        raise OptionError(
            "weights, pool, input_size, mean, std and encoder_args are of one encoder: embed it alone, or put the "
            "weights where their name finds them (docs/encoders.md)"
        )
    if slide not in (None, "mean"):
        raise OptionError("a slide model fits the vectors of one encoder: embed that alone, or give slide mean")
    folders = encoder_folders(encoder)
    recipes = [encoder_recipe(name, weights, asked) for name in encoder]
    recipes = [check_recipe_here(with_slide_model(one, slide)) for one in recipes]
    return request_encoders(slides, recipes, output, folders=folders)


def embed_request(
    slides: Slides,
    encoder: str = "default",
    *,
    output: str | Path,
    workers: int = 0,
    scheduler: str | None = None,
    **options: Unpack[EmbedKeywords],
) -> RunRequest:
    """Return the run that `embed` would execute, with the same checks; no slide is opened."""
    own, rest = split_keywords(options)
    asked = make_options(rest, workers=workers, scheduler=scheduler)
    recipe = encoder_recipe(encoder, own.get("weights"), asked, encoder_options(own))
    recipe = with_slide_model(recipe, own.get("slide"))
    return request_run(slides, check_recipe_here(recipe), output)


def stream_tiles(
    slide: Slide | str | Path,
    mpp: float | None = None,
    size: int | None = None,
    overlap: int | None = None,
    *,
    tiles: str | Path | None = None,
    tissue: str = "auto",
    min_tissue: float = LEAST_TISSUE,
    batch_size: int = 64,
    workers: int = 2,
) -> Iterator[Batch]:
    """Yield the tiles of a slide: ``.pixels`` uint8[n, size, size, 3], ``.xy`` int64[n, 2] level-0 px (x, y).

    Tiles are 256 px at 0.5 mpp without overlap unless said; with ``tiles``, a file of TRIDENT or CLAM, those that it
    lists, in its sequence. They and their sequence (row by row) are those of `embed` with the same options: ``.xy`` of
    all batches are the ``coords`` of its features. The last batch may be short; ``workers`` threads read ahead of the
    caller. Holds up to two rows of tiles, or some 256 MB.
    """
    from wsi_mmm.slides import open_slide
    from wsi_mmm.tiles.grid import make_grid
    from wsi_mmm.tiles.listed import place_tiles, stream_listed
    from wsi_mmm.tiles.stream import stream
    from wsi_mmm.tiles.tile_file import read_tile_list
    from wsi_mmm.tiles.tissue import select_tiles, tissue_mask

    held = slide if isinstance(slide, Slide) else open_slide(str(slide))
    try:
        if tiles is not None:
            listed = read_tile_list(str(tiles))
            placed = place_tiles(held.info, listed, batch_size, size=size, mpp=mpp, overlap=overlap)
            yield from stream_listed(held.reader, placed, batch_size=batch_size, workers=workers)
            return
        mpp = 0.5 if mpp is None else mpp
        held.scale(mpp)
        grid = make_grid(held.info, mpp, tile=256 if size is None else size, overlap=overlap or 0)
        index = select_tiles(grid, tissue_mask(held, tissue), min_tissue)
        yield from stream(held.reader, grid, index, batch_size=batch_size, workers=workers, by_row=True)
    finally:
        if held is not slide:
            held.close()


def load_model(name_or_path: str | Path = "default", device: str = "cpu") -> MultiTaskModel:
    """Load a model by name, folder or URI; ``model.encoder(x)``, ``.squeezer(pyramid)``, ``model(x, tasks=[...])``.

    ``x``: float[n, 3, h, w], RGB normalised by the model's mean and std, h and w multiples of 32:
    ``x = model.prepare(tiles)`` makes it of tiles uint8[n, h, w, 3] as `stream_tiles` gives them, as a tensor.
    """
    from wsi_mmm.model.checkpoint import load_model as load
    from wsi_mmm.model.fetch import fetch_model

    return load(fetch_model(str(name_or_path), user_cache()), device=device)


def export_model(
    model: str | Path = "default",
    *,
    output: str | Path,
    tasks: str | Sequence[str] | None = None,
    weights: str | None = None,
    tile_size: int | None = None,
) -> Exported:
    """Write a model as one ONNX file; gives its ``.path``, ``.tasks``, ``.side`` (None: any) and ``.difference``.

    ``model``: as for ``embed``, with ``weights``; ``tasks``: None: all; ``tile_size``: fix it at so many px.
    MissingPackage without the extra ``onnx``; ModelError when it cannot be translated or gives other answers.
    """
    from wsi_mmm.model.checkpoint import load_encoder
    from wsi_mmm.model.fetch import fetch_model
    from wsi_mmm.model.fold import fold_norms
    from wsi_mmm.model.identity import check_runtime, is_model
    from wsi_mmm.model.onnx import export_onnx

    check_runtime("onnx")
    here = fetch_model(str(model), user_cache())
    loaded = load_model(here) if is_model(here) else load_encoder(here, weights)
    names = [tasks] if isinstance(tasks, str) else tasks
    folded, _ = fold_norms(loaded.eval())
    return export_onnx(folded, Path(output).expanduser(), tasks=names, side=tile_size)


def demo(
    output: str | Path = "demo", *, seed: int = 0, progress: Listener | None = None, **options: Unpack[RunKeywords]
) -> RunReport:
    """Generate a seeded synthetic slide under ``output`` and run the default model on it."""
    from wsi_mmm.slides.fake import synthetic_slide

    folder = Path(output)
    path = folder / "synthetic.tiff"
    if not path.exists():
        synthetic_slide(path, seed=seed)
    return run(str(path), output=folder / "results", progress=progress, **options)


def make_executor(request: RunRequest) -> Executor:
    """Make the executor of a request: of a plug-in, a cluster, local processes, or this process."""
    options = request.recipe.options
    scheme = (options.scheduler or "").partition("://")[0]
    if scheme in plugin_names("executors"):
        make = load_plugin("executors", scheme)
        if not callable(make):
            raise PluginError(f"the executor {scheme!r} of a plug-in is no function of a RunRequest")
        return cast("Executor", make(request))
    if options.scheduler:
        from wsi_mmm.engine.executors.dask import connect

        return connect(options.scheduler, tls=request.tls)
    if options.workers:
        from wsi_mmm.engine.executors.dask_local import local_cluster

        return local_cluster(options.workers, visible_gpus())
    from wsi_mmm.engine.executors.threads import ThreadsExecutor

    return ThreadsExecutor(request.recipe)


def _log_warning(event: Event) -> None:
    """Show the warnings of a run that nobody listens to, by Python's logging."""
    if event.kind == "warning":
        logging.getLogger(__name__).warning("%s", event.message)


def _scheduler_address(client: Client | str) -> str | None:
    return client if isinstance(client, str) else None
