"""The half of the api that learns; `wsi_mmm.api` has its names too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_mmm.config import read_toml
from wsi_mmm.inputs import expand_inputs

if TYPE_CHECKING:
    from distributed import Client

    from wsi_mmm.training.config import TrainConfig
    from wsi_mmm.training.data.buckets import BucketReport
    from wsi_mmm.training.fewshot_run import Fitted
    from wsi_mmm.training.fit import StepReport, TrainingListener
    from wsi_mmm.training.fractions import Curve
    from wsi_mmm.training.job import Prepared, Trained


def train(
    config: str | Path | Mapping[str, Any],
    *,
    settings: Sequence[str] = (),
    progress: Callable[[StepReport], None] | None = None,
    listener: TrainingListener | None = None,
    client: Client | None = None,
) -> Trained:
    """Train one encoder for many tasks; the same call again resumes from the last checkpoint.

    Args:
        config: a TOML file, or its content as a dict; ``wsi-mmm train --example`` prints one.
        settings: ``"key=value"`` on top of it.
        progress: called with a StepReport after every step: ``.step``, ``.steps``, ``.losses`` by task, ``.pace``.
        listener: a TrainingListener, for validations and checkpoints too; instead of ``progress``.
        client: of a Dask cluster: one rank per worker, silently; all of them must reach ``out`` and the data. Without
            one: in this process, or under torchrun as one of its ranks.

    Returns:
        A Trained: ``.model`` (the folder that ``run`` takes), ``.val`` and ``.test`` (task -> metric -> value).

    Raises:
        OptionError, InputError: before training starts. NotFinite: a loss became NaN. OutputError: the disk is full.
        Cancelled: on Ctrl-C, after a checkpoint.
    """
    from wsi_mmm.training import fit, job

    if client is not None:
        return job.train_on_dask(client, _training(config, settings), _slides_named)
    if listener is None and progress is not None:
        listener = fit.TrainingListener(on_step=progress)
    return job.train(_training(config, settings), listener or fit.QUIET, _slides_named)


def prepare_training(config: str | Path | Mapping[str, Any], settings: Sequence[str] = ()) -> Prepared:
    """Open and divide the data sets (``.summary()``) and build the model, without training."""
    from wsi_mmm.training import job

    return job.prepare(_training(config, settings), _slides_named)


def read_annotations(
    config: str | Path | Mapping[str, Any], settings: Sequence[str] = ()
) -> dict[str, dict[str, BucketReport]]:
    """Data set -> task -> the report of its bucket table on the annotations (``.table()``, ``.as_json()``). No data set
    is opened, so a table that leaves nothing to train on is reported too."""
    from wsi_mmm.training import job

    return job.read_annotations(_training(config, settings), _slides_named)


def train_fractions(
    config: str | Path | Mapping[str, Any],
    *,
    percents: Sequence[float] = (1, 10, 50, 100),
    seeds: int = 3,
    metric: str = "",
    settings: Sequence[str] = (),
    listener: TrainingListener | None = None,
) -> Curve:
    """Train on several shares of the training items, each with seeds 0 to ``seeds - 1`` added to the configuration's.

    The held-out parts are the same in all. Each training has a folder ``<out>/fraction-XX-seed-Y``; those that are done
    are skipped. ``metric``: "task.metric" of the table and the plot ("": validation.best, or the first there is).

    Returns:
        A Curve: ``.rows()`` (percent, items, mean, deviation, values), ``.files``, ``.notes``.

    Raises:
        as `train`; OptionError when a folder holds a training of another configuration.
    """
    from wsi_mmm.training import fit, fractions

    return fractions.train_fractions(
        _training(config, settings), percents,
        seeds=seeds, metric=metric, listener=listener or fit.QUIET, expand=_slides_named,
    )  # fmt: skip


def fit_head(
    features: str | Path,
    labels: str | Path,
    *,
    output: str | Path,
    head: str = "linear",
    classes: Sequence[str] | None = None,
    column: str = "label",
    task: str = "fewshot",
    weights: str | None = None,
    seed: int = 0,
) -> list[Fitted]:
    """Fit a few-shot head to what ``embed`` wrote: ``.kind``, ``.figures`` of held-out groups, ``.kept``.

    ``labels``: a folder with ``<slide>.geojson`` (tiles) or a CSV (slides). A linear head of tiles is also written as a
    model, ``<output>/model``, which ``run`` takes. ``weights``: those given to ``embed`` for a bare encoder.
    """
    from wsi_mmm.training.fewshot_run import learn

    return learn(
        str(features), str(labels), output,
        head=head, classes=classes, column=column, task=task, weights=weights, seed=seed,
    )  # fmt: skip


def _slides_named(words: Sequence[str]) -> list[tuple[str, str, float | None, int | None]]:
    """(id, URI, mpp override, scene) of every slide that ``words`` stand for."""
    return [(spec.id, spec.uri, spec.mpp, spec.scene) for spec in expand_inputs(list(words))]


def _training(config: str | Path | Mapping[str, Any], settings: Sequence[str]) -> TrainConfig:
    from wsi_mmm.training.config import parse

    if isinstance(config, Mapping):
        return parse(config, settings)
    return parse(read_toml(config), settings, str(config))
