"""What EMPAIA's validator would refuse after a job is refused before it is sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from wsi_mmm.empaia import posting
from wsi_mmm.empaia.bodies import Annotation, ClassOf, Collection, Point, Polygon, Primitive, Record, Reference, Wsi
from wsi_mmm.empaia.check_outputs import CheckedOutputs
from wsi_mmm.empaia.client import Mode
from wsi_mmm.empaia.ead import ead
from wsi_mmm.empaia.geometry import area_of
from wsi_mmm.empaia.job_inputs import JobInputs, Region
from wsi_mmm.empaia.pixelmaps import MapLevel, Pixelmap
from wsi_mmm.errors import OutputError
from wsi_mmm.model.card import read_card

from .conftest import Start, run

WSI = Wsi("b10648a7-340d-43fc-a2d9-4d91cc86f33f", 1000, 1000, 499.0)
OTHER = replace(WSI, id="c10648a7-340d-43fc-a2d9-4d91cc86f33f")
ROI = "11111111-1111-4111-8111-111111111111"
SLIDE = Reference("wsi", WSI.id)
NUCLEUS = "org.empaia.wsi_mmm.default.v3.0.classes.nuclei.nucleus"
SQUARE = Polygon(((0, 0), (9, 0), (9, 9)))
MAP = Pixelmap("m", "continuous", "float32", WSI.id, (MapLevel(0),), limits=(0, 1))


class _Api:
    """Notes what is sent. Ids are counted."""

    def __init__(self) -> None:
        self.sent: list[Record] = []

    async def post_output(self, key: str, record: Record) -> str:
        self.sent.append(record)
        return f"output-{len(self.sent)}"

    async def post_items(self, collection: str, records: Iterable[Record]) -> AsyncIterator[list[str]]:
        for record in records:
            self.sent.append(record)
            yield [f"{len(self.sent):08x}-1111-4111-8111-111111111111"]


def nucleus(wsi: Wsi = WSI) -> Annotation:
    return Annotation("nucleus", SQUARE, wsi, 499.0)


def nuclei(about: Reference | None = SLIDE, kind: Any = "polygon") -> Collection:
    return Collection(kind, reference=about)


async def filled(to: CheckedOutputs, key: str, collection: Collection, *records: Record) -> list[str]:
    posted = await to.post_output(key, collection)
    return [one async for ids in to.post_items(posted, records) for one in ids]


def attempt(*steps: tuple[str, Collection | Record, tuple[Any, ...]], mode: Mode = Mode.standalone) -> _Api:
    """Post outputs one after the other, ("key", record, items); an item may be made of the ids of the output before."""
    api = _Api()
    area = area_of(np.array([(0.0, 0), (9, 0), (9, 9)]), WSI)
    assert area is not None
    asked = JobInputs(mode, WSI, (Region(ROI, area),) if mode is Mode.standalone else ())

    async def work() -> None:
        to, ids = CheckedOutputs(api, ead(read_card("default")), asked), [""]  # type: ignore[arg-type]
        for key, record, items in steps:
            made = [one(ids[0]) if callable(one) else one for one in items]
            if isinstance(record, Collection):
                ids = await filled(to, key, record, *made) or ids
            else:
                await to.post_output(key, record)

    asyncio.run(work())
    return api


def test_what_is_promised_is_sent() -> None:
    """Objects, their classes and confidences, a map, numbers of regions: all of it, in order."""
    api = attempt(
        ("nuclei_objects", nuclei(), (nucleus(),)),
        ("nuclei_classes", Collection("class"), (lambda one: ClassOf(NUCLEUS, one),)),
        ("nuclei_map", MAP, ()),
        ("nuclei_counts", Collection("integer"), (Primitive("n", "integer", 7, Reference("annotation", ROI)),)),
    )
    assert len(api.sent) == 7


Steps = tuple[tuple[str, Collection | Record, tuple[Any, ...]], ...]
OBJECTS = ("nuclei_objects", nuclei(), (nucleus(),))
REFUSED: dict[str, tuple[Steps, str]] = {
    "an output of nothing": ((("cells", nuclei(), ()),), "none of the EAD's"),
    "an output of the other mode": ((("nuclei_slide_count", Primitive("n", "integer", 7, SLIDE), ()),), "none of the"),
    "an output twice": ((OBJECTS, OBJECTS), "posted already"),
    "another type": ((("nuclei_map", nuclei(), ()),), "of type continuous_pixelmap"),
    "items of another type": ((("nuclei_objects", nuclei(kind="point"), ()),), "items of type polygon"),
    "an item of another type": (
        (("nuclei_objects", nuclei(), (Annotation("n", Point(1, 1), WSI, 499.0),)),), "of type polygon, not point",
    ),
    "another slide": ((("nuclei_map", replace(MAP, wsi_id=OTHER.id), ()),), "must refer to io.slide"),
    "an object on another slide": ((("nuclei_objects", nuclei(), (nucleus(OTHER),)),), "must refer to io.slide"),
    "a collection about nothing": ((("nuclei_objects", nuclei(None), ()),), "must refer to io.slide"),
    "a number about nothing": ((("nuclei_counts", Collection("integer"), (Primitive("n", "integer", 7),)),), "regions"),
    "a number about another region": (
        (("nuclei_counts", Collection("integer"), (Primitive("n", "integer", 7, Reference("annotation", WSI.id)),)),),
        "must refer to io.regions.items",
    ),
    "a class of nothing": (
        (OBJECTS, ("nuclei_classes", Collection("class"), (ClassOf(NUCLEUS, ROI),))), "io.nuclei_objects.items",
    ),
    "a confidence of tissue": (
        (("tissue", nuclei(), (nucleus(),)), ("nuclei_confidences", Collection("float"),
          (lambda one: Primitive("c", "float", 0.5, Reference("annotation", one)),))),
        "refer to io.nuclei_objects.items",
    ),
    "a class that is in no EAD": (
        (OBJECTS, ("nuclei_classes", Collection("class"), (lambda one: ClassOf(NUCLEUS + "x", one),))), "does not know",
    ),
    "a class with classes below": (
        (OBJECTS, ("nuclei_classes", Collection("class"), (lambda one: ClassOf(NUCLEUS.rsplit(".", 1)[0], one),))),
        "does not know",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_promised_is_not_sent(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """OutputError, in a line that names the output; nothing of the last step gets out but its empty collection."""
    steps, words = REFUSED[what]
    sent: list[Record] = []
    monkeypatch.setattr(_Api, "__init__", lambda self: setattr(self, "sent", sent))
    with pytest.raises(OutputError, match=words) as caught:
        attempt(*steps)
    key, _, items = steps[-1]
    assert f"'{key}'" in str(caught.value)
    assert len(sent) <= sum(1 + len(before) for *_, before in steps[:-1]) + bool(items)


def test_an_output_that_is_missing_is_a_failure(start: Start, half_done: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that has not posted all that the EAD promises is not finalized."""

    async def forgets(*_: object) -> None:
        pass

    monkeypatch.setattr(posting, "_post_classes", forgets)
    platform = start()
    ended = run(folder=half_done)
    assert ended.how == "failed" and "'stain_classes'" in ended.error and platform.ends == ["failure"]
    assert "PUT /finalize" not in platform.log and "nuclei_map" in platform.outputs


@pytest.mark.parametrize("broken", ["class", "NaN"])
def test_the_app_sends_nothing_that_would_be_refused(
    start: Start, half_done: str, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """A class of no EAD and a number that is none end the job as a failure; the platform never sees them."""
    if broken == "class":
        monkeypatch.setattr(
            posting, "class_values", lambda card, task, vendor: [f"{NUCLEUS}.{c}" for c in task.classes]
        )
    else:
        monkeypatch.setattr(posting, "min", lambda *_: float("nan"), raising=False)
    platform = start()
    ended = run(folder=half_done)
    assert ended.how == "failed" and ended.error and platform.ends == ["failure"] and platform.refused == []
    posted = json.dumps([platform.outputs, platform.items])
    assert f"{NUCLEUS}." not in posted and "NaN" not in posted and "nuclei_map" not in platform.outputs
