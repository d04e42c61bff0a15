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
    from wsi_mmm.training.fit import StepReport
    from wsi_mmm.training.fractions import Curve
    from wsi_mmm.training.job import Prepared, Trained, TrainingListener


def train(
    config: str | Path | Mapping[str, Any],
    *,
    settings: Sequence[str] = (),
    progress: Callable[[StepReport], None] | None = None,
    listener: TrainingListener | None = None,
    client: Client | None = None,
) -> Trained:
    """Train one encoder for many tasks; the same again goes on from the last checkpoint.

    Args:
        config: a TOML file, or its content as a dict; ``wsi-mmm train --example`` prints one.
        settings: ``"key=value"`` on top of it.
        progress: called with a Progress after every step: ``.step``, ``.steps``, ``.losses`` by task, ``.pace``.
        listener: a Listener of the job, to hear of validations and checkpoints too; instead of ``progress``.
        client: of a Dask cluster: a rank trains on every worker, silently. ``out`` and the data must be places that all
            of them see. Without one: in this process, or under torchrun as one of its ranks.

    Returns:
        A Trained: ``.model`` (the folder that ``run`` takes), ``.val`` and ``.test`` (task -> metric -> figure).

    Raises:
        OptionError, InputError: before anything is learnt. NotFinite: a loss became NaN. OutputError: the disk is full.
        Cancelled: on Ctrl-C, after a checkpoint.
    """
    from wsi_mmm.training import job

    if client is not None:
        return job.train_on_dask(client, _training(config, settings), _slides_named)
    heard = job.TrainingListener(on_step=progress) if progress is not None else job.QUIET
    return job.train(_training(config, settings), listener or heard, _slides_named)


def prepare_training(config: str | Path | Mapping[str, Any], settings: Sequence[str] = ()) -> Prepared:
    """Prepare what ``train`` would learn from: data sets opened and divided (``.summary()``), the model as it
    begins."""
    from wsi_mmm.training import job

    return job.prepare(_training(config, settings), _slides_named)


def read_annotations(
    config: str | Path | Mapping[str, Any], settings: Sequence[str] = ()
) -> dict[str, dict[str, BucketReport]]:
    """Data set -> task -> what its bucket table makes of the annotations (``.table()``, ``.as_json()``); learns nothing
    and opens no data set, so that a table can be mended that leaves nothing to learn from."""
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
    from wsi_mmm.training import fractions, job

    return fractions.train_fractions(
        _training(config, settings), percents,
        seeds=seeds, metric=metric, listener=listener or job.QUIET, expand=_slides_named,
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


def _slides_named(words: Sequence[str]) -> list[tuple[str, str, float | None]]:
    """(id, URI, mpp override) of every slide that ``words`` stand for."""
    return [(spec.id, spec.uri, spec.mpp) for spec in expand_inputs(list(words))]


def _training(config: str | Path | Mapping[str, Any], settings: Sequence[str]) -> TrainConfig:
    from wsi_mmm.training.config import parse

    if isinstance(config, Mapping):
        return parse(config, settings)
    return parse(read_toml(config), settings, str(config))
