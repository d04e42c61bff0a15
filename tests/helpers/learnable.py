"""A seeded set of small slides of which everything is known, and one training configuration per kind of task.

A slide is pink noise ("plain") with round patches of two other textures, "striped" and "dotted", of one colour on the
whole, and small dark objects, "round" ones and "long" ones, some of which touch. A strip at its right was not looked
at: what lies there is in no annotation. A table says of each slide how much of it is striped, and what follows: a
label, a value, and the time of an event.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsi_mmm.slides.fake import pyramid
from wsi_mmm.slides.tiff.writer import TiffForm, write_tiff
from wsi_mmm.types import F64, I32

SIDE, STRIP, TILE = 512, 64, 64
MARKED = SIDE - STRIP  # px from the left that annotators looked at
_CORNERS = 40
_COLOURS = {"round": (70, 60, 140), "long": (120, 70, 60)}
_SIZES = {"round": ((6.0, 9.0), (0.9, 1.0)), "long": ((9.0, 13.0), (0.38, 0.5))}

Rng = np.random.Generator


@dataclass(frozen=True)
class Oval:
    """``kind``, centre (x, y), half axes (long, short) in px, turn in radians; ``number``: what is measured of it."""

    kind: str
    x: float
    y: float
    long: float
    short: float
    turn: float
    number: float = 0.0

    def inside(self, x: F64, y: F64) -> F64:
        """Below 1 inside."""
        u, v = x - self.x, y - self.y
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        found: F64 = ((u * cos + v * sin) / self.long) ** 2 + ((v * cos - u * sin) / self.short) ** 2
        return found

    def ring(self) -> list[list[float]]:
        """Closed."""
        t = np.linspace(0, 2 * np.pi, _CORNERS + 1)
        u, v = self.long * np.cos(t), self.short * np.sin(t)
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        ring: list[list[float]] = np.stack([self.x + u * cos - v * sin, self.y + u * sin + v * cos], 1).tolist()
        return ring


@dataclass(frozen=True)
class Known:
    """A slide and all that is in it. ``striped``: bool[SIDE, SIDE] as int32; ``labels`` int32[SIDE, SIDE]: number of
    the object + 1 at each px."""

    name: str
    path: Path
    regions: Sequence[Oval]
    objects: Sequence[Oval]
    striped: I32
    labels: I32
    amount: float


def learnable_slides(folder: Path, count: int, seed: int = 0, *, side: int = SIDE, objects: int = 36) -> list[Known]:
    """Write ``count`` slides, their GeoJSON and ``slides.csv``; the same arguments, the same files."""
    known = [_slide(folder, number, np.random.default_rng([seed, number]), side, objects) for number in range(count)]
    with (folder / "slides.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["slide", "file", "label", "value", "time", "event"])
        for number, one in enumerate(known):
            rows.writerow([one.name, one.path.name, *_outcome(one, np.random.default_rng([seed, number, 1]))])
    return known


def _outcome(one: Known, rng: Rng) -> list[object]:
    """The more is striped the earlier comes the event; one slide in six is not followed so long."""
    time = 10.0 * float(np.exp(-4.0 * one.amount + 0.05 * rng.normal()))
    seen = bool(rng.random() > 1 / 6)
    label = "high" if one.amount > 0 else "low"
    return [label, f"{one.amount:.4f}", f"{time if seen else time * rng.uniform(0.5, 1.0):.4f}", int(seen)]


def _slide(folder: Path, number: int, rng: Rng, side: int, objects: int) -> Known:
    name = f"s{number:03}"
    regions = _regions(rng, side, striped=int(rng.integers(1, 4)) if number % 3 else 0)
    things = _objects(rng, side, objects)
    image, classes = _paint_regions(rng, side, regions)
    labels = _paint_objects(rng, image, things)
    striped = (classes == 1).astype(np.int32)
    path = folder / f"{name}.tiff"
    write_tiff(path, list(pyramid(np.clip(image, 0, 255).astype(np.uint8), 2)), TiffForm("zstd", mpp=1.0))
    path.with_suffix(".geojson").write_text(json.dumps(_geojson(regions, things, side)))
    return Known(name, path, regions, things, striped, labels, float(striped.mean()))


def _regions(rng: Rng, side: int, striped: int) -> list[Oval]:
    """Patches that keep apart. ``number`` of striped ones: px from stripe to stripe."""
    found: list[Oval] = []
    for kind in ["striped"] * striped + ["dotted"] * int(rng.integers(1, 3)) + ["unclear"]:
        for _ in range(60):
            long = float(rng.uniform(30, 40) if kind == "unclear" else rng.uniform(60, 105))
            x, y = rng.uniform(long * 0.7, side - long * 0.7, 2).tolist()
            new = Oval(kind, x, y, long, long * float(rng.uniform(0.7, 1)), float(rng.uniform(0, np.pi)),
                       float(rng.uniform(6, 14)))  # fmt: skip
            if all(np.hypot(x - o.x, y - o.y) > long + o.long for o in found):
                found.append(new)
                break
    return found


def _objects(rng: Rng, side: int, count: int) -> list[Oval]:
    """A third of the objects are put beside an earlier one, just touching it."""
    found: list[Oval] = []
    while len(found) < count:
        kind = "round" if rng.random() < 0.5 else "long"
        (low, high), shape = _SIZES[kind]
        long = float(rng.uniform(low, high))
        x, y = rng.uniform(14, side - 14, 2).tolist()
        if found and rng.random() < 0.33:
            other, way = found[int(rng.integers(len(found)))], rng.uniform(0, 2 * np.pi)
            x, y = other.x + np.cos(way) * (long + other.long), other.y + np.sin(way) * (long + other.long)
        turn = float(rng.uniform(0, np.pi))
        new = Oval(kind, float(x), float(y), long, long * float(rng.uniform(*shape)), turn)
        apart = all(np.hypot(x - o.x, y - o.y) >= long + o.long - 0.5 for o in found)
        if apart and 13 < x < side - 13 and 13 < y < side - 13:
            found.append(new)
    return found


def _paint_regions(rng: Rng, side: int, regions: Sequence[Oval]) -> tuple[F64, I32]:
    """Px float64[side, side, 3], and 0 plain, 1 striped, 2 dotted, -1 unclear."""
    y, x = np.mgrid[:side, :side] + 0.5
    classes = np.zeros((side, side), np.int32)
    wave = np.zeros((side, side))
    for one in regions:
        mask = one.inside(x, y) < 1
        classes[mask] = {"striped": 1, "dotted": 2, "unclear": -1}[one.kind]
        along = 2 * np.pi * (x * np.cos(one.turn) + y * np.sin(one.turn)) / one.number
        across = 2 * np.pi * (y * np.cos(one.turn) - x * np.sin(one.turn)) / one.number
        dots = np.where(np.cos(along) * np.cos(across) > 0.5, -2.4, 0.45)
        wave[mask] = {"striped": np.cos(along), "dotted": dots, "unclear": rng.normal(size=x.shape)}[one.kind][mask]
    colour = np.array([222.0, 168.0, 198.0]) + rng.uniform(-10, 10, 3)
    noise = rng.normal(0, 6, (side, side, 1)) + rng.normal(0, 3, (side, side, 3))
    return colour + noise + wave[..., None] * np.array([16.0, 26.0, 18.0]), classes


def _paint_objects(rng: Rng, image: F64, objects: Sequence[Oval]) -> I32:
    """Draw them, and return whose each px is."""
    labels = np.zeros(image.shape[:2], np.int32)
    for number, one in enumerate(objects):
        reach = int(one.long) + 3
        x0, y0 = max(int(one.x) - reach, 0), max(int(one.y) - reach, 0)
        window = np.s_[y0 : int(one.y) + reach, x0 : int(one.x) + reach]
        y, x = np.mgrid[window] + 0.5
        mask = (one.inside(x, y) < 1) & (labels[window] == 0)
        labels[window][mask] = number + 1
        shade = rng.normal(0, 8, (int(mask.sum()), 1)) + rng.uniform(-15, 15)
        image[window][mask] = np.array(_COLOURS[one.kind]) + shade
    return labels


def _geojson(regions: Sequence[Oval], objects: Sequence[Oval], side: int) -> dict[str, Any]:
    """What an annotator draws: the area looked at, patches (also beyond it), and the objects whose middle is in it."""
    looked = side - STRIP
    area = [[0, 0], [looked, 0], [looked, side], [0, side], [0, 0]]
    features = [_feature("annotation", "looked at", area)]
    features += [_feature("annotation", one.kind, one.ring(), {"period": one.number}) for one in regions]
    features += [_feature("detection", one.kind, one.ring()) for one in objects if one.x < looked + one.long]
    return {"type": "FeatureCollection", "features": features}


def _feature(what: str, name: str, ring: Sequence[Sequence[float]], numbers: Mapping[str, float] = {}) -> Any:
    properties = {"objectType": what, "classification": {"name": name}, "measurements": dict(numbers)}
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}
