"""The images that OME-XML describes (OME-TIFF specification 2016-06): sizes, resolution, and their first directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from xml.etree import ElementTree as ET

from wsi_mmm.errors import NotASlide

_MAX_ELEMENTS = 100_000  # five for every plane of a stack; of a slide there are fewer than a hundred
_MAX_NAME = 80  # characters


@dataclass(frozen=True, slots=True)
class OmeImage:
    """One image of ``planes`` directories. ``ifd``: the first in this file, None when its pixels lie in another."""

    name: str
    ifd: int | None
    planes: int
    pixels: Mapping[str, str] = field(default_factory=dict)
    channels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OmeDocument:
    """The contents of OME-XML. ``elsewhere``: the file that describes this one, when it is one part of several."""

    images: tuple[OmeImage, ...]
    objective: str | None = None
    elsewhere: str | None = None


@lru_cache(maxsize=1)  # opening a slide asks several times
def parse_ome(text: str) -> OmeDocument | None:
    """Return what the XML says; None when it is broken, in an unknown encoding, could expand, or is too large."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text or too_large(text):
        return None
    body = text[text.index("?>") + 2 :] if text.lstrip().startswith("<?xml") and "?>" in text else text
    try:
        root = ET.fromstring(body)  # text is decoded already: what the declaration says of its encoding is past
    except (ET.ParseError, ValueError):
        return None
    objective = next((e.get("NominalMagnification") for e in root.iter() if e.tag.endswith("Objective")), None)
    binary = _first(root, "BinaryOnly")
    return OmeDocument(
        tuple(_read_images(root)), objective, None if binary is None else binary.get("MetadataFile", "another file")
    )


def too_large(text: str) -> bool:
    """Tell whether it has more elements or attributes than are read."""
    return text.count("<") > 2 * _MAX_ELEMENTS or text.count("=") > 5 * _MAX_ELEMENTS


def ome_images(text: str, name: str) -> tuple[OmeImage, ...]:
    """Return the images in the order of the XML; empty when it cannot be parsed. Raises NotASlide."""
    if too_large(text):
        raise NotASlide(
            f"{name}: its OME-XML has more than {_MAX_ELEMENTS} elements or {5 * _MAX_ELEMENTS} attributes, the most "
            "that is read: a stack of planes, not a slide"
        )
    document = parse_ome(text)
    if document is None:
        return ()
    if document.elsewhere is not None:
        raise NotASlide(
            f"{name} is one part of an OME-TIFF that {document.elsewhere} describes: channels or planes, not an RGB "
            "slide"
        )
    return document.images


def _read_images(root: ET.Element) -> Iterator[OmeImage]:
    following = 0
    for image in _all(root, "Image"):
        pixels = _first(image, "Pixels")
        if pixels is None:
            continue
        channels = _all(pixels, "Channel")
        samples = max(_integer(channels[0].get("SamplesPerPixel"), 1) if channels else 1, 1)
        planes = 1
        for axis in "CZT":
            planes *= max(_integer(pixels.get(f"Size{axis}"), 1), 1)
        planes = max(planes // samples, 1)
        ifd = _first_directory(pixels, following, root.get("UUID"))
        following += planes
        names = tuple((channel.get("Name") or "")[:_MAX_NAME] for channel in channels[:8])
        yield OmeImage((image.get("Name") or "")[:_MAX_NAME], ifd, planes, dict(pixels.attrib), names)


def _first_directory(pixels: ET.Element, following: int, own_uuid: str | None) -> int | None:
    """The least IFD of its TiffData elements; ``following`` when they say nothing; None when they name other files."""
    data = _all(pixels, "TiffData")
    uuids = [(one, _first(one, "UUID")) for one in data]
    own = [one for one, uuid in uuids if uuid is None or own_uuid is None or (uuid.text or "").strip() == own_uuid]
    if data and not own:
        return None
    numbers = [_integer(one.get("IFD"), -1) for one in own]
    known = [number for number in numbers if number >= 0]
    return min(known) if known else following


def _all(element: ET.Element, name: str) -> list[ET.Element]:
    """The children of that name; deeper ones are another element's, and looking for them takes for ever in deep XML."""
    return [child for child in element if child.tag.rpartition("}")[2].rpartition(":")[2] == name]


def _first(element: ET.Element, name: str) -> ET.Element | None:
    return next(iter(_all(element, name)), None)


def _integer(text: str | None, otherwise: int) -> int:
    return int(text) if text and text.isdecimal() and len(text) < 10 else otherwise
