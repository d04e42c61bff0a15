"""XML of Aperio ImageScope and HALO: the files here are written from the formats' descriptions."""

from __future__ import annotations

import math

import pytest
import shapely

from wsi_mmm.annotations import parse_shapes, xml_files
from wsi_mmm.errors import AnnotationError

Points = list[tuple[float, float]]
SQUARE: Points = [(100, 100), (300, 100), (300, 300), (100, 300)]
HOLE: Points = [(150, 150), (250, 150), (250, 250), (150, 250)]
ISLAND: Points = [(180, 180), (220, 180), (220, 220), (180, 220)]


def imagescope(*layers: str) -> bytes:
    """A file as ImageScope saves it."""
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<Annotations MicronsPerPixel="0.499">' + "".join(layers)
        + "</Annotations>"
    ).encode()  # fmt: skip


def layer(*regions: str, name: str = "", colour: int = 65280, description: str = "") -> str:
    attributes = f'<Attributes><Attribute Name="Description" Id="0" Value="{description}"/></Attributes>'
    return (
        f'<Annotation Id="1" Name="{name}" ReadOnly="0" LineColorReadOnly="0" Incremental="0" Type="4" '
        f'LineColor="{colour}" Visible="1" Selected="1" MarkupImagePath="" MacroName="">{attributes}<Regions>'
        f'<RegionAttributeHeaders><AttributeHeader Id="9999" Name="Region" ColumnWidth="-1"/></RegionAttributeHeaders>'
        f"{''.join(regions)}</Regions><Plots/></Annotation>"
    )


def region(points: Points, kind: int = 0, negative: int = 0) -> str:
    vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in points)
    return (
        f'<Region Id="1" Type="{kind}" Zoom="0.04" Selected="0" ImageLocation="" ImageFocus="-1" Length="1.5" '
        f'Area="2.5" LengthMicrons="1.5" AreaMicrons="2.5" Text="" NegativeROA="{negative}" InputRegionId="0" '
        f'Analyze="1" DisplayId="1"><Attributes/><Vertices>{vertices}</Vertices></Region>'
    )


def halo(kind: str, points: Points, negative: int = 0) -> str:
    vertices = "".join(f'<V X="{x:g}" Y="{y:g}"/>' for x, y in points)
    return (
        f'<Region Type="{kind}" HasEndcaps="0" NegativeROA="{negative}"><Vertices>{vertices}</Vertices>'
        '<Comments><Comment Author="a" Body="b"/></Comments></Region>'
    )


def halo_file(*regions: str, name: str = "Tumor") -> bytes:
    """A file as HALO exports it: no declaration, the layer's name, vertices called V."""
    return (
        f'<Annotations>\n<Annotation LineColor="5634047" Name="{name}" Visible="True"><Regions>{"".join(regions)}'
        "</Regions></Annotation></Annotations>"
    ).encode()


def test_imagescope_regions_are_polygons_with_the_name_of_their_layer() -> None:
    """Coordinates are px of level 0, whatever MicronsPerPixel says; an outline need not be closed."""
    found = parse_shapes(imagescope(layer(region(SQUARE), name="Tumor"), layer(region(HOLE), name="Stroma")), "x")
    assert [(item.class_name, item.geometry.area) for item in found] == [("Tumor", 40_000), ("Stroma", 10_000)]


@pytest.mark.parametrize(
    ("name", "description", "colour", "expected"),
    [("a", "b", 255, "a"), (" ", "b", 255, "b"), ("", "", 255, "#ff0000"), ("", "", 16711680, "#0000ff")],
)
def test_a_layer_without_a_name_goes_by_its_description_or_colour(
    name: str, description: str, colour: int, expected: str
) -> None:
    """Colours are numbers of blue, green and red."""
    data = imagescope(layer(region(SQUARE), name=name, description=description, colour=colour))
    assert [item.class_name for item in parse_shapes(data, "x")] == [expected]


def test_negative_regions_are_holes_in_those_of_their_layer() -> None:
    """They cut what they touch, not what lies in them (an island), and nothing of another layer."""
    regions = region(SQUARE), region(HOLE, negative=1), region(ISLAND)
    found = parse_shapes(imagescope(layer(*regions, name="a"), layer(region(SQUARE), name="b")), "x")
    assert [(item.class_name, item.geometry.area) for item in found] == [("a", 30_000), ("a", 1600), ("b", 40_000)]
    assert not found.items[0].geometry.contains(shapely.Point(155, 155))


def test_a_hole_over_the_rim_cuts_and_two_holes_may_overlap() -> None:
    """A hole that covers an outline in part; holes that cross each other."""
    over: Points = [(200, 0), (400, 0), (400, 400), (200, 400)]
    found = parse_shapes(imagescope(layer(region(over, negative=1), region(SQUARE), region(HOLE, negative=1))), "x")
    assert found.items[0].geometry.equals(shapely.box(100, 100, 200, 300) - shapely.box(150, 150, 250, 250))


def test_rectangles_and_ellipses_of_imagescope() -> None:
    """A rectangle has four corners, an ellipse the two of the box round it; arrows and rulers have no area."""
    box: Points = [(100, 50), (300, 150)]
    found = parse_shapes(imagescope(layer(region(SQUARE, 1), region(box, 2), region(box, 3), region(box, 4))), "x")
    assert (len(found), found.skipped) == (2, 2)
    assert found.items[0].geometry.area == 40_000
    assert found.items[1].geometry.bounds == (100, 50, 300, 150)
    assert found.items[1].geometry.area == pytest.approx(math.pi * 100 * 50, rel=1e-3)


def test_halo_shapes_holes_and_pins() -> None:
    """Polygon, Rectangle and Ellipse by two corners, Ruler, Pin; a negative one is a hole."""
    data = halo_file(
        halo("Polygon", [*SQUARE, SQUARE[0]]), halo("Polygon", HOLE, negative=1), halo("Rectangle", [(9, 9), (0, 0)]),
        halo("Ellipse", [(0, 0), (40, 20)]), halo("Ruler", [(0, 0), (5, 5)]), halo("Pin", [(7, 8)]),
    )  # fmt: skip
    found = parse_shapes(data, "x")
    assert [round(item.geometry.area) for item in found] == [30_000, 81, 628]
    assert {item.class_name for item in found} == {"Tumor"}
    assert [(dot.x, dot.y, dot.class_name) for dot in found.dots] == [(7, 8, "Tumor")]
    assert found.skipped == 2


def test_xml_in_utf_16_and_with_a_namespace_is_read() -> None:
    """As editors of another system save it."""
    text = imagescope(layer(region(SQUARE), name="Größe")).decode()
    wide = text.replace("UTF-8", "UTF-16").encode("utf-16")
    assert parse_shapes(wide, "x").items[0].class_name == "Größe"
    spaced = text.replace("<Annotations ", '<Annotations xmlns="urn:a" ').encode()
    assert len(parse_shapes(spaced, "x")) == 1


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"<annotations><ndpviewstate/></annotations>", "not of ASAP, ImageScope or HALO .<annotations>.*GeoJSON"),
        (imagescope(layer(region([(0, 0), (math.nan, 1), (2, 2)]))), "region 0 of layer 0 .*not a finite"),
        (imagescope(layer(region([(0, 0), (1e300, 1), (2, 2)]))), "object 0 lies beyond"),
        (imagescope(layer(region(SQUARE).replace('Y="100"', ""))), "region 0 of layer 0 .*without X or Y"),
    ],
)
def test_xml_that_cannot_be_used_is_one_line(data: bytes, named: str) -> None:
    """Which names the formats, or the region."""
    with pytest.raises(AnnotationError, match=f"^case.xml: .*{named}"):
        parse_shapes(data, "case.xml")


def test_elements_are_counted_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element takes seven bytes in a file and five hundred in memory."""
    monkeypatch.setattr(xml_files, "MAX_ELEMENTS", 20)
    assert len(parse_shapes(imagescope(layer(region(SQUARE))), "x")) == 1
    with pytest.raises(AnnotationError, match="more than 20 XML elements"):
        parse_shapes(imagescope(layer(region(SQUARE * 20))), "x")
