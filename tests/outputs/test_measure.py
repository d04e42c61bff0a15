"""Shape measurements against scikit-image on fine pictures of the same shapes, and against formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from skimage.draw import polygon2mask
from skimage.measure import regionprops

from helpers.shapes import ellipses, polygons, regions
from wsi_mmm.outputs.measure import (
    AREA,
    CIRCULARITY,
    ECCENTRICITY,
    MAJOR_AXIS,
    MINOR_AXIS,
    PERIMETER,
    centroids_um,
    measure_shapes,
)
from wsi_mmm.outputs.polygons import concat, part

Points = npt.NDArray[np.float64]


def ellipse(a: float, b: float, turn: float, corners: int = 400) -> Points:
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    x, y = a * np.cos(angle), b * np.sin(angle)
    return np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], axis=1) + 300


SHAPES: dict[str, Points] = {
    "disc": ellipse(150, 150, 0),
    "ellipse": ellipse(200, 80, 0.5),
    "long": ellipse(250, 40, 2.0),
    "square": np.array([(100, 100), (400, 100), (400, 400), (100, 400)], float),
    "rectangle": np.array([(50, 200), (550, 200), (550, 320), (50, 320)], float),
    "L": np.array([(100, 100), (250, 100), (250, 400), (500, 400), (500, 520), (100, 520)], float),
    "bean": np.array([(100, 300), (200, 120), (420, 150), (500, 330), (350, 270), (220, 420)], float),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_as_regionprops_measures_them(name: str) -> None:
    """Area, axes and eccentricity within 1 % at 0.1 µm per px, wherever the shape lies."""
    outline = SHAPES[name]
    [props] = regionprops(polygon2mask((600, 600), outline[:, ::-1] - 0.5).astype(int))
    found = measure_shapes(polygons(outline + 123_456), 0.1, 0.1)
    assert found[AREA] == pytest.approx(props.area * 0.01, rel=0.01)
    assert found[MAJOR_AXIS] == pytest.approx(props.axis_major_length * 0.1, rel=0.01)
    assert found[MINOR_AXIS] == pytest.approx(props.axis_minor_length * 0.1, rel=0.01)
    assert found[ECCENTRICITY] == pytest.approx(props.eccentricity, rel=0.01, abs=0.07)
    assert centroids_um(polygons(outline + 123_456), 0.1, 0.1)[0] == pytest.approx(
        (np.array(props.centroid[::-1]) + 123_456.5) * 0.1, abs=0.05
    )


@pytest.mark.parametrize(("name", "a", "b"), [("disc", 150, 150), ("ellipse", 200, 80), ("long", 250, 40)])
def test_perimeters_and_circularities(name: str, a: float, b: float) -> None:
    """Those of ellipses (Ramanujan's second formula), within 1 %, and nearer to them than the perimeter that
    scikit-image counts from pixels; circularity as HistomicsTK defines it, 4 pi area / perimeter squared."""
    outline = SHAPES[name]
    [props] = regionprops(polygon2mask((600, 600), outline[:, ::-1] - 0.5).astype(int))
    ratio = ((a - b) / (a + b)) ** 2
    length = 0.1 * np.pi * (a + b) * (1 + 3 * ratio / (10 + np.sqrt(4 - 3 * ratio)))
    found = measure_shapes(polygons(outline), 0.1, 0.1)
    assert found[PERIMETER] == pytest.approx(length, rel=0.01)
    assert abs(found[PERIMETER][0] - length) < abs(props.perimeter * 0.1 - length)
    assert found[CIRCULARITY] == pytest.approx(4 * np.pi * props.area * 0.01 / length**2, rel=0.01)


def test_formulas_of_plain_shapes() -> None:
    """A rectangle of 12 x 3 µm whose px are not square; a square with a square hole; a disc."""
    box = np.array([(10, 10), (34, 10), (34, 40), (10, 40)])
    found = {name: float(values[0]) for name, values in measure_shapes(polygons(box), 0.5, 0.1).items()}
    axes = 4 * np.sqrt(np.array([144, 9]) / 12)
    assert found == {
        AREA: 36.0, PERIMETER: 30.0, CIRCULARITY: round(4 * np.pi * 36 / 900, 4),
        ECCENTRICITY: round(np.sqrt(1 - 1 / 16), 4), MAJOR_AXIS: round(axes[0], 4), MINOR_AXIS: round(axes[1], 4),
    }  # fmt: skip
    labels = np.ones((20, 20), np.int32)
    labels[5:15, 5:15] = 0
    frame = measure_shapes(regions(labels), 1.0, 1.0)
    assert (frame[AREA][0], frame[PERIMETER][0], frame[ECCENTRICITY][0]) == (300, 120, 0)
    assert frame[MAJOR_AXIS][0] == pytest.approx(4 * np.sqrt((20**4 - 10**4) / 12 / 300), abs=1e-4)
    disc = measure_shapes(polygons(ellipse(10, 10, 0)), 0.5, 0.5)
    assert disc[CIRCULARITY][0] == pytest.approx(1, abs=1e-3) and disc[MAJOR_AXIS][0] == pytest.approx(10, abs=0.01)


def test_neighbours_in_the_array_change_nothing() -> None:
    """Objects measured alone, in any portions and in another sequence: the same bytes."""
    some = ellipses(200)
    whole = measure_shapes(some, 0.25, 0.26)
    cut = [measure_shapes(part(some, a, b), 0.25, 0.26) for a, b in ((0, 1), (1, 150), (150, 200))]
    for name, values in whole.items():
        assert np.concatenate([one[name] for one in cut]).tobytes() == values.tobytes()
    both = concat([part(some, 100, 200), part(some, 0, 100)])
    assert (np.roll(measure_shapes(both, 0.25, 0.26)[AREA], 100) == whole[AREA]).all()


def test_slivers_have_no_number_that_is_not_finite_in_a_file() -> None:
    """What is not defined is NaN, which the file leaves out; nothing is a warning."""
    flat = replace(polygons([(0, 0), (5, 0), (10, 0)]), task="nuclei")
    found = measure_shapes(flat, 0.5, 0.5)
    assert found[AREA][0] == 0 and np.isnan(found[MAJOR_AXIS][0]) and len(measure_shapes(part(flat, 0, 0), 1, 1)) == 6
