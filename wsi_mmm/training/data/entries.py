"""Data sets as a configuration lists them: one typed table per kind, each of which opens its Source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from wsi_mmm.errors import ConfigError
from wsi_mmm.model.card import TaskCard
from wsi_mmm.tasks.targets import Target
from wsi_mmm.training.data import folders, points, volumes
from wsi_mmm.training.data.base import DataContext, DatasetEntry, DataSource, ItemIndex
from wsi_mmm.training.data.buckets import DOT_UM
from wsi_mmm.training.data.coco import coco
from wsi_mmm.training.data.images import Origin
from wsi_mmm.training.data.slide_entries import FeatureBags, SlideLabels, SlidesEntry, TaskColumns, TileBags
from wsi_mmm.training.data.split import parts_by_pattern
from wsi_mmm.training.data.tables import read_table, slide_table

PixelOrName = TypeVar("PixelOrName", int, str)


class OfOneTask(DatasetEntry):
    """A data set that has targets of one task."""

    task: str

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks it is of."""
        return (self.task,)


class Pictured(OfOneTask):
    """Folders of pictures. ``mpp`` of the files: they are scaled to the model's (None: taken as they are).

    ``group``: a regular expression with one group that finds the patient or slide in a path. ``part``: one that finds
    train, val or test there, such as "^(train|val|test)/"; what it does not fit is divided as `SplitPart` says.
    """

    mpp: float | None = Field(default=None, gt=0)
    group: str | None = None
    part: str | None = None

    def origin(self, place: DataContext) -> Origin:
        """See `Origin`."""
        return Origin(self.name, self.group, 1.0 if self.mpp is None else self.mpp / place.mpp)

    def fixed(self, index: ItemIndex) -> dict[str, str]:
        """Group -> train, val or test, as ``part`` finds it in paths. ConfigError: no such word, a divided group."""
        return {} if self.part is None else parts_by_pattern(index, self.part, self.name)

    def card(self, place: DataContext, *kinds: str) -> TaskCard:
        """The card of the task. ConfigError when it is of no kind that this data set is for."""
        card = place.tasks[self.task]
        if card.kind not in kinds:
            raise ConfigError(f"data '{self.name}' is for tasks of kind {' or '.join(kinds)}, not '{card.kind}'")
        return card


class ClassFolders(Pictured):
    """A folder per class. ``folders`` maps folder names to classes, or to "" to leave them out."""

    kind: Literal["class-folders"]
    path: str
    folders: dict[str, str] = Field(default_factory=dict)

    def open(self, place: DataContext) -> DataSource:
        """The source."""
        classes = self.card(place, "classify").classes
        return folders.class_folders(
            self.origin(place), self.path, task=self.task, classes=classes, folders=self.folders
        )


class ImageMasks(Pictured):
    """Pictures and label images of the same names. ``values``: px value -> class name ("": unknown)."""

    kind: Literal["image-masks"]
    images: str
    masks: str
    values: dict[int, str] | None = None

    def open(self, place: DataContext) -> DataSource:
        """The source."""
        card = self.card(place, "segment", "multisegment")
        if card.kind == "multisegment":
            return folders.image_class_masks(
                self.origin(place), self.images, self.masks, task=self.task, classes=card.classes
            )
        table = None if self.values is None else _class_indices(self.name, self.values, card)
        return folders.image_masks(
            self.origin(place), self.images, self.masks, task=self.task, values=table, classes=len(card.classes)
        )


class ImageInstances(Pictured):
    """Pictures and instance images of the same names. ``classes``: label images with the class of each px, of tasks
    with several; ``values``: their px value -> class name ("": unknown)."""

    kind: Literal["image-instances"]
    images: str
    labels: str
    classes: str | None = None
    values: dict[int, str] | None = None

    def open(self, place: DataContext) -> DataSource:
        """The source."""
        card = self.card(place, "instances")
        if self.classes is not None and len(card.classes) < 2:
            raise ConfigError(f"data '{self.name}': task '{self.task}' has one class: leave out `classes`")
        table = None if self.values is None else _class_indices(self.name, self.values, card)
        return folders.image_instances(
            self.origin(place), self.images, self.labels,
            task=self.task, classes=self.classes, values=table, count=len(card.classes),
        )  # fmt: skip


class ImagePoints(Pictured):
    """Pictures and a file of points for each, of the same name: a table with the columns ``x``, ``y`` (px of the
    picture) and ``label``, or an annotation file. ``points``: their folder (none: beside the pictures). ``values``:
    class in the files -> class of the task ("": a cell of unknown class); none: those of equal name.

    ``complete``: every cell was marked. ``dot_um``: radius round a point within which its class is learnt;
    ``outline_um``: within which its outline may be. ``background``: the class of all else, for `segment`."""

    kind: Literal["image-points"]
    images: str
    points: str | None = None
    x: str = "x"
    y: str = "y"
    label: str = "class"
    values: dict[str, str] = Field(default_factory=dict)
    complete: bool = True
    dot_um: float = Field(default=DOT_UM, gt=0, allow_inf_nan=False)
    outline_um: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    background: str | None = None

    def open(self, place: DataContext) -> DataSource:
        """The source."""
        card = self.card(place, "instances", "segment", "detect")
        names = {name: name for name in card.classes} | self.values
        numbers = _class_indices(self.name, names, card)
        rest = -1
        if self.background is not None:
            if card.kind != "segment":
                raise ConfigError(f"data '{self.name}': background is for tasks of kind segment: leave it out")
            rest = _class_indices(self.name, {"": self.background}, card)[""]
        mpp = self.mpp or place.mpp
        meaning = points.PointMeaning(
            card.kind,
            len(card.classes),
            self.dot_um / mpp,
            max(self.dot_um, self.outline_um) / mpp,
            self.complete,
            rest,
        )
        return points.image_points(
            self.origin(place), self.images, self.points or self.images,
            task=self.task, meaning=meaning, columns=(self.x, self.y, self.label), numbers=numbers,
        )  # fmt: skip


class Coco(Pictured):
    """A COCO file. ``categories`` maps its categories to classes, or to "" to leave them out."""

    kind: Literal["coco"]
    images: str
    annotations: str
    categories: dict[str, str] = Field(default_factory=dict)

    def open(self, place: DataContext) -> DataSource:
        """The source."""
        card = self.card(place, "detect", "instances")
        return coco(
            self.origin(place), self.images, self.annotations,
            task=self.task, kind=card.kind, classes=card.classes, categories=self.categories,
        )  # fmt: skip


class Nifti(OfOneTask):
    """Slices of NIfTI volumes, and label volumes of the same names. ``window``: values shown black and white."""

    kind: Literal["nifti"]
    images: str
    labels: str | None = None
    axis: int = Field(default=2, ge=0, le=2)
    values: dict[int, str] | None = None
    window: tuple[float, float] | None = None

    def open(self, place: DataContext) -> DataSource:
        """The source."""
        card = place.tasks[self.task]
        return volumes.nifti_slices(
            self.name, self.images, self.labels, task=self.task, axis=self.axis,
            values=None if self.values is None else _class_indices(self.name, self.values, card),
            window=self.window,
        )  # fmt: skip


class PatientTable(TaskColumns):
    """A table with one row per patient, named in column ``patient``. Otherwise as a table of slides."""

    table: str
    patient: str = "patient"

    def targets(self, card: TaskCard) -> dict[str, Target]:
        """Patient -> the target of the task. ManifestError names a wrong row."""
        found = slide_table(read_table(self.table), [self.task(card)], slide=self.patient)
        return dict(zip(found.slides, found.targets[card.name], strict=True))


class Dicom(OfOneTask):
    """DICOM files below ``images``, a slice each, grouped by the patient that they name. ``patients``: what is known of
    these (none: a task without target). ``window``: values shown black and white (none: as the file says)."""

    kind: Literal["dicom"]
    images: str
    patients: PatientTable | None = None
    window: tuple[float, float] | None = None

    def open(self, place: DataContext) -> DataSource:
        """The source."""
        known = None if self.patients is None else self.patients.targets(place.tasks[self.task])
        label = None if known is None else known.get
        return volumes.dicom_slices(self.name, self.images, task=self.task, label=label, window=self.window)


def _class_indices(name: str, values: Mapping[PixelOrName, str], card: TaskCard) -> dict[PixelOrName, int]:
    """Class names -> class indices, "" -> -1."""
    for label in values.values():
        if label and label not in card.classes:
            raise ConfigError(f"data '{name}': values name '{label}'; classes are {', '.join(card.classes)}")
    return {value: card.classes.index(label) if label else -1 for value, label in values.items()}


DataEntry = Annotated[
    ClassFolders
    | ImageMasks
    | ImageInstances
    | ImagePoints
    | Coco
    | Nifti
    | Dicom
    | SlidesEntry
    | SlideLabels
    | TileBags
    | FeatureBags,
    Field(discriminator="kind"),
]
