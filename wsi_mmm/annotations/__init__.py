"""Annotation files -> polygons and points in level-0 px -> masks.

Read: GeoJSON as QuPath writes and accepts it (FeatureCollection, array of Features, one Feature, a bare geometry,
collections in collections) and the XML of ASAP, Aperio ImageScope and HALO, plain, gzipped or zipped, in UTF-8 or
UTF-16. What a file is, is decided by its bytes, not by its name.
"""

from __future__ import annotations

import codecs
import gc
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

from wsi_mmm.annotations.fill import draw_shape, rasterise
from wsi_mmm.annotations.geojson_file import read_geojson
from wsi_mmm.annotations.repair import check_crossings
from wsi_mmm.annotations.shapes import (
    MAX_COORDINATE,
    Dot,
    Shape,
    Shapes,
    SlideShapes,
    box_index,
    clip_to_slide,
    collect_shapes,
    ring_arrays,
    shape_at,
)
from wsi_mmm.annotations.xml_files import read_xml
from wsi_mmm.errors import AnnotationError, NotFound, PluginError, StorageError
from wsi_mmm.plugins import load_plugin, plugin_names
from wsi_mmm.storage import limits, store

__all__ = [
    "MAX_AREA_BYTES", "MAX_COORDINATE", "AnnotationFormat", "Dot", "Shape", "Shapes", "SlideShapes",
    "annotation_format", "box_index", "check_crossings", "clip_to_slide", "draw_shape", "find_format",
    "is_annotation_file", "parse_shapes", "rasterise", "read_annotation_file", "ring_arrays", "shape_at",
]  # fmt: skip

MAX_AREA_BYTES = 512 << 20
"""Bytes of a file that says where to work on a slide (tissue, regions): some 20 million vertices."""

_ENDINGS = (".geojson", ".json", ".annotations", ".xml")
_MARKS = (b"{", b"[", b"<", b"\x1f\x8b", b"PK\x03\x04", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True, slots=True)
class AnnotationFormat:
    """A file format that an installed package offers under the entry points ``wsi_mmm.annotations``.

    ``recognises(name, data)`` says whether the unpacked bytes of a file are of this format; ``parse(data, name,
    values)`` gives its shapes, with the numbers named ``values``, and raises AnnotationError. Coordinates are level-0
    px."""

    recognises: Callable[[str, bytes], bool]
    parse: Callable[[bytes, str, Sequence[str]], Shapes]


def annotation_format(name: str) -> AnnotationFormat:
    """Return the format that an installed package offers as ``name``. PluginError when it is none."""
    plugin = load_plugin("annotations", name)
    if not isinstance(plugin, AnnotationFormat):
        raise PluginError(f"the annotation format {name!r} of a plug-in is no wsi_mmm.annotations.AnnotationFormat")
    return plugin


def find_format(name: str, data: bytes) -> AnnotationFormat | None:
    """Return the format of a plug-in that recognises the bytes of a file, or None."""
    formats = map(annotation_format, plugin_names("annotations"))
    return next((known for known in formats if known.recognises(name, data)), None)


def read_annotation_file(uri: str, most: int = limits.MAX_BYTES) -> bytes:
    """Return the bytes of a file of annotations, or of a mask, of at most so many. Its size is asked for first.

    Raises AnnotationError, StorageError, NotFound.
    """
    data = None
    try:
        with closing(store.open_store(uri)) as opened:
            size = opened.size
    except NotFound:
        raise
    except StorageError:
        if store.scheme_of(uri) not in ("http", "https"):
            raise
        data = store.read_bytes(uri)  # from a web server that gives no ranges, and so does not say the size
        size = len(data)
    if size > most:
        raise AnnotationError(
            f"{store.redact(uri)}: {size / 2**20:,.0f} MiB, more than {most >> 20:,} MiB: simplify or split it, or "
            "give the area as a mask picture"
        )
    return store.read_bytes(uri) if data is None else data


def is_annotation_file(name: str, data: bytes) -> bool:
    """Return True for bytes that begin as JSON, XML or an archive do, or that a plug-in recognises."""
    return data[:64].lstrip().startswith(_MARKS) or find_format(name, data) is not None


def parse_shapes(data: bytes, name: str, values: Sequence[str] = ()) -> Shapes:
    """The polygons in the bytes of an annotation file; ``name`` is what errors call it, ``values`` names numbers of
    the objects (GeoJSON properties or QuPath measurements) to be kept.

    Invalid polygons are repaired (``shapely.make_valid``, polygon parts only); points, lines and polygons without
    area are skipped and counted. Raises AnnotationError.
    """
    data = _as_utf8(limits.unpack_file(data, name, _ENDINGS, AnnotationError), name).lstrip()
    if not data:
        raise AnnotationError(f"{name}: the file is empty: export the annotations again")
    if plugin := find_format(name, data):
        return plugin.parse(data, name, values)
    with _pause_collection():
        found = read_xml(data, name) if data.startswith(b"<") else read_geojson(data, name, values)
        return collect_shapes(found, name)


def _as_utf8(data: bytes, name: str) -> bytes:
    """The text without its mark; UTF-16 becomes UTF-8, without the XML declaration that says otherwise."""
    if not data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.removeprefix(codecs.BOM_UTF8)
    try:
        return re.sub(rb"^\s*<\?xml[^>]{0,200}\?>", b"", data.decode("utf-16").encode())
    except UnicodeError as error:
        raise AnnotationError(f"{name}: neither GeoJSON nor XML ({error}): export it again") from error


@contextmanager
def _pause_collection() -> Iterator[None]:
    """Pause garbage collection, then leave it as it was: searching millions of lists in use is half of parsing.

    200,000 polygons of 12 corners: 8.1 s of CPU, 19.2 s with collection.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
