"""From the class names that annotators use to the labels of a task: an ordered table of rules, and a dry run of it.

The first rule that fits a name decides. Beside the task's labels there are three buckets: ``IGNORE`` (nothing is known
there), ``DROP`` (as if the object were not in the file) and ``USE`` (the annotator looked at everything in there).
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from wsi_mmm.annotations import Shapes, clip_to_slide
from wsi_mmm.errors import ConfigError

IGNORE, DROP, USE = "ignore", "drop", "use"
CODES: Mapping[str, int] = {IGNORE: -1, DROP: -2, USE: -3}
"""What stands for a bucket among class indices."""

DOT_UM = 4.0
"""Micrometres: radius of the disc that a point stands for, about a nucleus."""

How = Literal["exact", "prefix", "regex", "unnamed"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Names that are (``exact``), begin with (``prefix``) or match in full (``regex``) ``pattern`` get ``label``;
    ``unnamed`` fits objects without a class."""

    label: str
    pattern: str = ""
    how: How = "exact"
    any_case: bool = False

    def fits(self, name: str | None) -> bool:
        """Return whether this rule decides about ``name`` (None: an object without a class)."""
        if name is None or self.how == "unnamed":
            return name is None and self.how == "unnamed"
        if self.how == "regex":
            return re.fullmatch(self.pattern, name, re.IGNORECASE if self.any_case else 0) is not None
        wanted, name = (self.pattern.casefold(), name.casefold()) if self.any_case else (self.pattern, name)
        return name.startswith(wanted) if self.how == "prefix" else name == wanted

    @property
    def words(self) -> str:
        """For reports."""
        letters = " (any case)" if self.any_case else ""
        return "unnamed" if self.how == "unnamed" else f"{self.how} {self.pattern!r}{letters}"


@dataclass(frozen=True, slots=True)
class Buckets:
    """``labels``: the task's classes in the order of their indices; ``rules`` in the order in which they are tried,
    which is also the order of overlaps: what an earlier rule took lies on top. ``unmatched``, ``unnamed``: the bucket
    or label of named objects that no rule fits, and of those without a class; they lie below all others.

    Raises ConfigError for a label that the task does not have, a label named like a bucket, or a broken pattern.
    """

    labels: tuple[str, ...]
    rules: tuple[Rule, ...]
    unmatched: str = IGNORE
    unnamed: str = IGNORE

    def __post_init__(self) -> None:
        for label in self.labels:
            if label in CODES:
                raise ConfigError(f"a class cannot be called {label!r}, that is a bucket: rename it")
        for label in (*(rule.label for rule in self.rules), self.unmatched, self.unnamed):
            if label not in self.labels and label not in CODES:
                known = ", ".join((*self.labels, *CODES))
                raise ConfigError(f"the bucket table gives the label {label!r}: give one of {known}")
        for rule in self.rules:
            _check_pattern(rule)

    def place(self, name: str | None) -> tuple[int, int]:
        """(class index, or the code of a bucket; number of the rule, ``len(rules)`` when none fits)."""
        for number, rule in enumerate(self.rules):
            if rule.fits(name):
                return self.code(rule.label), number
        return self.code(self.unnamed if name is None else self.unmatched), len(self.rules)

    def code(self, label: str) -> int:
        """The class index of a label, or the code of a bucket."""
        return CODES[label] if label in CODES else self.labels.index(label)


def _check_pattern(rule: Rule) -> None:
    if rule.how not in ("exact", "prefix", "regex", "unnamed"):
        raise ConfigError(f"a rule for {rule.label!r} says how={rule.how!r}: give exact, prefix, regex or unnamed")
    if rule.how != "unnamed" and not rule.pattern:
        raise ConfigError(f"a rule for {rule.label!r} has no pattern: give the class name it is for")
    try:
        re.compile(rule.pattern if rule.how == "regex" else "")
    except re.error as error:
        raise ConfigError(
            f"the pattern {rule.pattern!r} of {rule.label!r} is no regular expression ({error})"
        ) from error


def same_names(labels: Sequence[str]) -> Buckets:
    """The table that takes every class by its own name, in any case, and nothing else."""
    return Buckets(tuple(labels), tuple(Rule(label, label, any_case=True) for label in labels))


# ---------------------------------------------------------------- dry run


@dataclass(frozen=True, slots=True)
class Line:
    """The outcome for the objects of one class of one slide. ``area`` level-0 px²; ``area_mm2`` None where the
    slide's resolution is not known. ``points``: how many of the objects are points, without area. ``rule``: "" when
    none fits."""

    slide: str
    class_name: str | None
    label: str
    rule: str
    objects: int
    area: float
    area_mm2: float | None
    points: int = 0


@dataclass(frozen=True, slots=True)
class SlideObjects:
    """The annotations of a slide of ``size`` (width, height) level-0 px; ``mpp`` None where it is not known."""

    slide: str
    shapes: Shapes
    size: tuple[float, float]
    mpp: float | None = None


@dataclass(frozen=True, slots=True)
class BucketReport:
    """Every class of every slide, and what a table does with it. ``skipped``: objects that are no polygon (points
    included), ``repaired``: invalid polygons, ``off_slide``: objects that lie wholly off the slide and count nowhere
    else, by slide. ``dot_um``: radius of the discs that points become (0: they are left out)."""

    lines: tuple[Line, ...]
    skipped: Mapping[str, int]
    repaired: Mapping[str, int]
    dot_um: float = 0.0
    off_slide: Mapping[str, int] = field(default_factory=dict)

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Named classes that no rule fits, sorted."""
        return tuple(sorted({line.class_name for line in self.lines if line.class_name is not None and not line.rule}))

    @property
    def unnamed(self) -> int:
        """Objects without a class."""
        return sum(line.objects for line in self.lines if line.class_name is None)

    def as_json(self) -> str:
        """Everything, as JSON."""
        facts: dict[str, object] = {"unmatched": self.unmatched, "unnamed": self.unnamed, "skipped": self.skipped}
        lines = [asdict(line) for line in self.lines]
        facts |= {"repaired": self.repaired, "off_slide": self.off_slide, "dot_um": self.dot_um}
        return json.dumps({"lines": lines, **facts}, ensure_ascii=False, indent=1)

    def table(self) -> str:
        """The lines in columns, the sums by label, and the classes without a rule."""
        rows = [("slide", "class", "label", "rule", "objects", "area")]
        sums: Counter[str] = Counter()
        for one in self.lines:
            area = f"{one.area:.4g} px²" if one.area_mm2 is None else f"{one.area_mm2:.4g} mm²"
            name = "(no class)" if one.class_name is None else one.class_name
            rows.append((one.slide, name, one.label, one.rule or "none fits", str(one.objects), area))
            sums[one.label] += one.objects
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        end = [f"{label}: {count} objects" for label, count in sorted(sums.items())]
        if self.unmatched:
            end.append(f"no rule fits: {', '.join(self.unmatched)}")
        if self.unnamed:
            end.append(f"without a class: {self.unnamed} objects")
        if points := sum(one.points for one in self.lines):
            what = f"learnt as discs of {self.dot_um:g} µm radius" if self.dot_um else "left out"
            end.append(f"points among them: {points}, {what} (dot_um)")
        if lost := sum(self.skipped.values()):
            end.append(f"no polygons: {lost} objects (points, lines, outlines without area)")
        if off := sum(self.off_slide.values()):
            end.append(f"off the slide: {off} objects, not counted; areas are those on the slide")
        lines = ["  ".join(f"{cell:<{n}}" for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, "", *end])


def dry_run(buckets: Buckets, slides: Iterable[SlideObjects], *, dot_um: float = DOT_UM) -> BucketReport:
    """Report how ``buckets`` would sort the objects of slides. ``dot_um``: radius of the disc that a point becomes (0:
    points are left out). Nothing is read or written."""
    lines: list[Line] = []
    skipped, repaired, off = {}, {}, {}
    for one in slides:
        slide, mpp = one.slide, one.mpp
        there = clip_to_slide(one.shapes, *one.size)
        shapes, off[slide] = there.shapes, there.off
        found: dict[str | None, list[float]] = defaultdict(list)
        for item, area in zip(shapes, there.areas.tolist(), strict=True):
            found[item.class_name].append(area)
        dots = Counter(dot.class_name for dot in shapes.dots)
        for name in sorted({*found, *dots}, key=lambda name: (name is None, name or "")):
            row = _class_row(buckets, slide, name, areas=found[name], mpp=mpp)
            learnt = bool(dot_um) and row.label != USE
            if learnt:
                row = replace(row, objects=row.objects + dots[name], points=dots[name])
            if row.objects:
                lines.append(row)
            if dots[name] and not learnt:  # a row of their own: they are not what the others are
                lines.append(replace(row, label=DROP, objects=dots[name], points=dots[name], area=0.0, area_mm2=None))
        skipped[slide], repaired[slide] = shapes.skipped, shapes.repaired
    return BucketReport(tuple(lines), skipped, repaired, dot_um, off)


def _class_row(buckets: Buckets, slide: str, name: str | None, *, areas: list[float], mpp: float | None) -> Line:
    code, number = buckets.place(name)
    label = buckets.labels[code] if code >= 0 else next(key for key, value in CODES.items() if value == code)
    rule = buckets.rules[number].words if number < len(buckets.rules) else ""
    area = sum(areas)
    return Line(slide, name, label, rule, len(areas), area, None if mpp is None else area * mpp * mpp / 1e6)
