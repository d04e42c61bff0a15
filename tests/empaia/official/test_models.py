"""EMPAIA's own models, not only their schemas, accept every body that we make."""

from __future__ import annotations

import pytest

from helpers.eats import Judge
from helpers.empaia_records import ANNOTATIONS, CLASS, JOB, NOTE, POSTS, PRIMITIVES, WSI
from wsi_mmm.empaia import bodies
from wsi_mmm.empaia.bodies import Annotation, ClassOf, Polygon

pytestmark = pytest.mark.empaia


def test_every_body_is_accepted(judge: Judge) -> None:
    """One object of each kind, alone and in a list of items where the platform takes lists."""
    items = [bodies.body(record, JOB) for record in (*ANNOTATIONS, *PRIMITIVES, ClassOf(CLASS, NOTE))]
    asked = [(model, bodies.body(record, JOB)) for model, record in POSTS]
    asked += [("PostItemListApps", {"items": [item] * 2}) for item in items]
    assert [said for said in judge(asked) if said is not None] == []


def test_the_models_are_strict(judge: Judge) -> None:
    """What our records refuse, the models refuse as well: a judge that accepts everything would prove nothing."""
    sound = bodies.body(Annotation("a", Polygon(((0, 0), (9, 0), (9, 9))), WSI, 499.0), JOB)
    broken = [
        {**sound, "coordinates": [[0, 0], [9.0, 0], [9, 9]]},
        {**sound, "coordinates": [[0, 0], [-9, 0], [9, 9]]},
        {**sound, "coordinates": [[0, 0], [9, 9]]},
        {**sound, "npp_created": 0},
        {**sound, "reference_type": "annotation"},
        {**sound, "name": ""},
        {**sound, "colour": "#FF0000"},
        {name: value for name, value in sound.items() if name != "creator_id"},
    ]
    verdicts = judge([("PostAnnotation", one) for one in [sound, *broken]])
    assert verdicts[0] is None and all(verdicts[1:])
