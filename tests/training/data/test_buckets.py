"""Class names to labels: the first rule decides, and a dry run says what would happen before anything is read."""

from __future__ import annotations

import json

import pytest
from shapely.geometry import box

from conftest import RealData
from wsi_mmm.annotations import Dot, Shape, Shapes, parse_shapes
from wsi_mmm.errors import ConfigError
from wsi_mmm.training.data.buckets import CODES, DROP, IGNORE, USE, Buckets, Rule, SlideObjects, dry_run, same_names

TABLE = Buckets(
    ("tumour", "stroma"),
    (
        Rule(DROP, "Tumor: draft"),
        Rule("tumour", "tumor", "prefix", any_case=True),
        Rule("stroma", r"Stroma|.*fibro.*", "regex"),
        Rule(IGNORE, "fold"),
        Rule(USE, "ROI"),
        Rule("stroma", "Tumor: late"),
    ),
    unnamed=DROP,
)


@pytest.mark.parametrize(
    ("name", "code", "rule"),
    [
        ("Tumor: draft", CODES[DROP], 0),
        ("Tumor", 0, 1),
        ("TUMOR: late", 0, 1),
        ("Stroma", 1, 2),
        ("stroma", CODES[IGNORE], 6),
        ("Stroma 2", CODES[IGNORE], 6),
        ("desmofibrotic", 1, 2),
        ("fold", CODES[IGNORE], 3),
        ("ROI", CODES[USE], 4),
        (None, CODES[DROP], 6),
    ],
)
def test_the_first_rule_that_fits_decides(name: str | None, code: int, rule: int) -> None:
    """Exact, prefix, regex; case matters unless told; what nothing fits is unknown."""
    assert TABLE.place(name) == (code, rule)


def test_unnamed_objects_have_a_rule_of_their_own() -> None:
    """A pattern that fits every name does not fit objects without one."""
    table = Buckets(("a",), (Rule("a", ".*", "regex"),))
    assert table.place(None)[0] == CODES[IGNORE]
    assert Buckets(("a",), (Rule("a", how="unnamed"),)).place(None) == (0, 0)


@pytest.mark.parametrize(
    ("labels", "rules", "match"),
    [
        (("a",), (Rule("b", "x"),), "give one of a, ignore, drop, use"),
        (("use",), (), "rename it"),
        (("a",), (Rule("a", "(", "regex"),), "no regular expression"),
        (("a",), (Rule("a", ""),), "no pattern"),
        (("a",), (Rule("a", "x", "glob"),), "exact, prefix, regex"),  # type: ignore[arg-type]
    ],
)
def test_a_table_that_cannot_work_is_refused(labels: tuple[str, ...], rules: tuple[Rule, ...], match: str) -> None:
    """With the words that mend it."""
    with pytest.raises(ConfigError, match=match):
        Buckets(labels, rules)


def test_a_dry_run_counts_everything_and_names_what_is_left_over() -> None:
    """Per slide and class: label, rule, objects, area; then unmatched and unnamed; as text and as JSON."""
    shapes = Shapes(
        (Shape(box(0, 0, 100, 100), "Tumor"), Shape(box(0, 0, 10, 10), "Tumor"), Shape(box(0, 0, 5, 5), "Necrosis"),
         Shape(box(0, 0, 1, 1))), 3, 1, (Dot(1, 1, "Tumor"),),
    )  # fmt: skip
    other = Shapes((Shape(box(0, 0, 2, 2), "ROI"),))
    run = dry_run(TABLE, [SlideObjects("s1", shapes, (200, 200), 0.5), SlideObjects("s2", other, (200, 200))])
    lines = {(line.slide, line.class_name): line for line in run.lines}
    assert (lines["s1", "Tumor"].objects, lines["s1", "Tumor"].label) == (3, "tumour")
    assert lines["s1", "Tumor"].area_mm2 == pytest.approx(10100 * 0.25 / 1e6)
    assert (lines["s1", "Necrosis"].rule, lines["s1", "Necrosis"].label) == ("", IGNORE)
    assert lines["s2", "ROI"].area_mm2 is None
    assert (run.unmatched, run.unnamed) == (("Necrosis",), 1)
    assert (run.skipped["s1"], run.repaired["s1"]) == (3, 1)
    text = run.table()
    assert "no rule fits: Necrosis" in text and "without a class: 1 objects" in text and "4 px²" in text
    assert json.loads(run.as_json())["lines"][0]["slide"] == "s1"


def test_what_lies_off_the_slide_has_no_area_and_is_said() -> None:
    """A square half on the slide counts with its half; what lies beyond, and a point there, with nothing."""
    shapes = Shapes(
        (Shape(box(-50, 0, 50, 100), "Tumor"), Shape(box(300, 0, 400, 100), "Tumor"), Shape(box(0, 200, 9, 250))),
        dots=(Dot(250, 5, "Tumor"),),
    )
    run = dry_run(TABLE, [SlideObjects("s", shapes, (200, 200), 2.0)])
    (line,) = run.lines
    assert (line.class_name, line.objects, line.area) == ("Tumor", 1, 5000)
    assert line.area_mm2 == pytest.approx(0.02)
    assert run.off_slide == {"s": 3} and json.loads(run.as_json())["off_slide"] == {"s": 3}
    assert "off the slide: 3 objects" in run.table()


def test_real_files_are_sorted_by_their_groups(real_data: RealData) -> None:
    """CAMELYON's regions in ASAP XML, QuPath's own export."""
    camelyon = parse_shapes(real_data.file("annotations/camelyon16_tumor_009.xml").read_bytes(), "real")
    qupath = parse_shapes(real_data.file("annotations/qupath05_example.geojson").read_bytes(), "real")
    far = (1e6, 1e6)
    slides = [SlideObjects("tumor_009", camelyon, far, 0.243), SlideObjects("q", qupath, far)]
    run = dry_run(same_names(["metastasis"]), slides)
    assert sum(line.objects for line in run.lines if line.slide == "tumor_009") == len(camelyon)
    assert any(line.label == "metastasis" and line.objects for line in run.lines)
    assert "metastasis" not in run.unmatched
