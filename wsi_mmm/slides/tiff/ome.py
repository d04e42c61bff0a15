"""The images that OME-XML describes (OME-TIFF specification 2016-06): sizes, resolution, and their first directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from xml.etree import ElementTree as ET

from wsi_mmm.errors import NotASlide

_MAX_XML = 16 << 20  # bytes; the directories are loaded up to there


@dataclass(frozen=True, slots=True)
class OmeImage:
    """One image of ``planes`` directories. ``ifd``: the first in this file, None when its pixels lie in another."""

    name: str
    ifd: int | None
    planes: int
    pixels: Mapping[str, str] = field(default_factory=dict)
    channels: tuple[str, ...] = ()


def parse_ome(text: str) -> ET.Element | None:
    """Return the root; None when the XML is broken, in an unknown encoding, or could expand without bound."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text or len(text) > _MAX_XML:
        return None
    body = text[text.index("?>") + 2 :] if text.lstrip().startswith("<?xml") and "?>" in text else text
    try:
        return ET.fromstring(body)  # text is decoded already: what the declaration says of its encoding is past
    except (ET.ParseError, ValueError):
        return None


def ome_images(text: str, name: str) -> list[OmeImage]:
    """Return the images in the order of the XML; empty when it cannot be parsed. Raises NotASlide."""
    root = parse_ome(text)
    if root is None:
        return []
    if (elsewhere := _first(root, "BinaryOnly")) is not None:
        file = elsewhere.get("MetadataFile", "another file")
        raise NotASlide(
            f"{name} is one part of an OME-TIFF that {file} describes: channels or planes, not an RGB slide"
        )
    found, following = [], 0
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
        names = tuple(channel.get("Name") or "" for channel in channels)
        found.append(OmeImage(image.get("Name") or "", ifd, planes, dict(pixels.attrib), names))
    return found


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
    return [e for e in element.iter() if e.tag.rpartition("}")[2].rpartition(":")[2] == name]


def _first(element: ET.Element, name: str) -> ET.Element | None:
    return next(iter(_all(element, name)), None)


def _integer(text: str | None, otherwise: int) -> int:
    return int(text) if text and text.isdecimal() and len(text) < 10 else otherwise
