"""Parameters and metrics of every kind of task, once: cards are checked by them, and docs/training.md shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PER_CLASS = ":<class>"


@dataclass(frozen=True, slots=True)
class TaskParameter:
    """A number in ``params`` of a task. ``name`` may end in PER_CLASS: then there is one for each class. ``default``
    None: where it is not given, ``meaning`` says what holds."""

    name: str
    default: float | None
    meaning: str


@dataclass(frozen=True, slots=True)
class TaskMetric:
    """A metric of a kind of task, higher for better ones unless ``lower``."""

    name: str
    meaning: str
    lower: bool = False


def _weight(what: str = "weight of a class in the loss") -> TaskParameter:
    return TaskParameter(f"weight{PER_CLASS}", 1.0, what)


def _smoothing(default: float) -> TaskParameter:
    return TaskParameter("smoothing", default, "label smoothing, a share from 0 to below 1")


PARAMETERS: dict[str, tuple[TaskParameter, ...]] = {
    "classify": (_smoothing(0.02), _weight()),
    "detect": (
        TaskParameter("threshold", 90, "byte (0 to 255) from which a px is the centre of an object"),
        TaskParameter("overlap", 0.4, "intersection over union above which one of two boxes goes"),
        TaskParameter("size", 16, "usual side of an object in px of the model's resolution"),
    ),
    "instances": (
        TaskParameter("foreground", 150, "byte from which a px is part of an object"),
        TaskParameter("votes", 1000, "votes that make a centre"),
        TaskParameter("area", 24, "least area of an object in px of the model's resolution"),
        TaskParameter("hops", 12, "steps that a vote takes towards its centre"),
        TaskParameter("core", 136, "byte of depth from which a px votes"),
        TaskParameter("other", -1, "number of the class of objects whose likeliest class is not `sure`, -1: none"),
        TaskParameter("sure", 0.5, "least probability of an object's class; with `other`"),
        _weight(),
    ),
    "multilabel": (_smoothing(0.0), _weight("weight in the loss of tiles that have the label")),
    "multisegment": (TaskParameter("threshold", 128, "byte from which a px is drawn"), _weight()),
    "reconstruct": (
        TaskParameter("patch", 16, "side of the squares that are hidden, px"),
        TaskParameter("share", 0.5, "share of the squares that is hidden; 0: the picture is shown in grey instead"),
        TaskParameter("centre", 0.7, "mean of the values that are drawn, of RGB in 0 to 1"),
        TaskParameter("spread", 0.2, "their standard deviation"),
    ),
    "regress": (
        TaskParameter("centre", 0.0, "mean of the targets"),
        TaskParameter("spread", 1.0, "their standard deviation"),
        TaskParameter(f"centre{PER_CLASS}", None, "mean of one of several numbers (none: `centre`)"),
        TaskParameter(f"spread{PER_CLASS}", None, "its standard deviation (none: `spread`)"),
        TaskParameter("huber", 0, "1: Huber loss instead of squared error"),
    ),
    "segment": (
        TaskParameter(
            "background",
            None,
            "number of the class that is not drawn, -1: none; the task's key `background` names it",
        ),
        _smoothing(0.02),
        _weight(),
    ),
    "survive": (
        TaskParameter("bins", 0, "0: Cox's proportional hazards; else intervals of time"),
        TaskParameter("horizon", None, "end of the last interval, which divides the time evenly; with `bins`"),
        TaskParameter("edge:<bin>", None, "end of an interval, `edge:1` to `edge:<bins>`, in place of `horizon`"),
        TaskParameter("efron", 1, "ties of Cox by Efron; 0: by Breslow"),
    ),
}

_FOUND = (
    TaskMetric("f1", "2 x precision x recall / (precision + recall)"),
    TaskMetric("precision", "share of the found objects that are true"),
    TaskMetric("recall", "share of the true objects that are found"),
)

METRICS: dict[str, tuple[TaskMetric, ...]] = {
    "classify": (
        TaskMetric("accuracy", "share of items whose class is right"),
        TaskMetric("balanced_accuracy", "the same per class, mean over the classes"),
        TaskMetric("f1", "F1 per class, mean"),
        TaskMetric("auroc", "area under the ROC curve, one class against the rest, mean"),
        TaskMetric("ap", "average precision, likewise"),
    ),
    "detect": (
        TaskMetric("ap50", "average precision at an intersection over union of 0.5, mean over classes"),
        *_FOUND,
    ),
    "instances": (
        *_FOUND,
        TaskMetric("pq", "panoptic quality (Kirillov 2019)"),
        TaskMetric("aji", "aggregated Jaccard index (Kumar 2017)"),
        TaskMetric("class_f1", "with several classes: F1 per class, mean; outlines match as above, points within 6 px"),
        TaskMetric(
            "points_f1", "with points: F1 of objects whose centroids lie within 6 px of them, whatever their class"
        ),
    ),
    "multilabel": (
        TaskMetric("ap", "mean average precision over the labels"),
        TaskMetric("auroc", "area under the ROC curve, mean"),
        TaskMetric("f1", "F1 at a probability of 0.5, mean"),
        TaskMetric("accuracy", "share that is right at 0.5, mean"),
    ),
    "multisegment": (
        TaskMetric("mean_iou", "intersection over union of px, mean over the classes that occur"),
        TaskMetric("mean_dice", "Dice, likewise"),
    ),
    "reconstruct": (TaskMetric("psnr", "peak signal to noise ratio, dB"),),
    "regress": (
        TaskMetric("mae", "mean absolute error, in units of the target", lower=True),
        TaskMetric("r2", "share of the variance that is explained"),
        TaskMetric("spearman", "correlation of ranks"),
    ),
    "segment": (
        TaskMetric("mean_iou", "intersection over union of px, mean over the classes that occur"),
        TaskMetric("pixel_accuracy", "share of px whose class is right"),
    ),
    "survive": (TaskMetric("concordance", "Harrell's index: share of comparable pairs in the right order"),),
}


def parameter_names(kind: str, classes: Sequence[str]) -> list[str]:
    """The names that ``params`` of a kind may hold, with one for each class where there is one per class."""
    names = []
    for one in PARAMETERS[kind]:
        stem = one.name.removesuffix(PER_CLASS)
        names += [one.name] if stem == one.name else [f"{stem}:{name}" for name in classes]
    return names


def find_metric(kind: str, name: str) -> TaskMetric | None:
    """The metric ``name`` of a kind; None when it has none of that name."""
    return next((one for one in METRICS.get(kind, ()) if one.name == name), None)
