"""JPEG streams of TIFF tiles: made whole with the shared tables, and with markers that say their colours rightly.

What decides on the colours, strongest first: halved chroma, which only YCbCr has; what the stream says of itself (JFIF
is YCbCr; Adobe's marker; components named R, G, B); the photometric tag, as in libtiff.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from wsi_mmm.slides.tiff.planes import YCBCR, Plane
from wsi_mmm.slides.tiff.samples import UndecodableError
from wsi_mmm.storage.ranges import Buffer

EOI = b"\xff\xd9"
_SOI, _SOS = b"\xff\xd8", b"\xff\xda"
# APP14 'Adobe', version 100, no flags, then the colour transform: 0 = none (RGB), 1 = YCbCr.
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
_FRAMES = frozenset((0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))
_LOSSLESS = frozenset((0xC3, 0xC7, 0xCB, 0xCF))
_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
_MOST_SCANS = 32  # progressive JPEG has about ten; each decodes the whole tile once more


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """The markers before the coded data, ``length`` bytes; ``segments``: those that say nothing of colours.

    ``frame``, ``scan``: what the markers SOF (of the process ``process``) and SOS hold.
    """

    length: int
    segments: bytes
    process: int
    frame: bytes
    scan: bytes
    jfif: bool
    adobe: int | None

    @property
    def components(self) -> bytes:
        """The numbers of the components."""
        return self.frame[6 : 6 + 3 * self.frame[5] : 3]

    @property
    def samplings(self) -> bytes:
        """The sampling factors of the components, across times 16 and down."""
        return self.frame[7 : 6 + 3 * self.frame[5] : 3]

    @property
    def lossless(self) -> bool:
        """True for the lossless process."""
        return self.process in _LOSSLESS

    @property
    def several_scans(self) -> bool:
        """True when the decoder goes over the tile more than once: progressive, or a scan for each component."""
        return self.process in _PROGRESSIVE or self.scan[0] < self.frame[5]


def read_header(data: bytes) -> JpegHeader:
    """Parse the markers up to the first scan (ISO/IEC 10918-1 annex B). Raises UndecodableError."""
    if data[:2] != _SOI:
        raise UndecodableError("no JPEG")
    kept: list[bytes] = []
    frame = b""
    process, jfif, adobe, at, end = 0, False, None, 2, len(data) - 4
    while at <= end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        stop = at + 2 + (data[at + 2] << 8 | data[at + 3])
        if stop > len(data):
            break
        if marker == 0xE0:
            jfif = jfif or data[at + 4 : at + 9] == b"JFIF\0"
        elif marker == 0xEE:
            adobe = data[at + 15] if data[at + 4 : at + 9] == b"Adobe" and at + 15 < stop else adobe
        else:
            kept.append(data[at:stop])
        if marker in _FRAMES:
            process, frame = marker, data[at + 4 : stop]
        elif marker == 0xDA:
            scan = data[at + 4 : stop]
            if len(frame) < 6 or not frame[5] or len(frame) < 6 + 3 * frame[5] or not scan:
                break
            return JpegHeader(stop, b"".join(kept), process, frame, scan, jfif, adobe)
        at = stop
    raise UndecodableError("a JPEG without a frame or scan")


def holds_ycbcr(header: JpegHeader, photometric: int) -> bool:
    """Tell whether three components are YCbCr, not RGB."""
    if len(set(header.samplings)) > 1 or header.jfif:
        return True
    if header.adobe in (0, 1):
        return header.adobe == 1
    return photometric == YCBCR and header.components != b"RGB"


def stream_completer(plane: Plane) -> Callable[[Buffer], Buffer]:
    """Return what makes a tile a whole JPEG stream; the header of the last tile is remembered, most tiles share it."""
    tables = shared_tables(plane)
    known: tuple[bytes, bytes | None, bool] | None = None

    def complete(data: Buffer) -> Buffer:
        nonlocal known
        last = known
        if last is None or bytes(data[: len(last[0])]) != last[0]:
            header = read_header(whole := bytes(data))
            known = last = (whole[: header.length], _completed_start(plane, header, tables), header.several_scans)
        prefix, start, several = last
        if several:
            check_scans(bytes(data))
        return data if start is None else b"".join((start, memoryview(data)[len(prefix) :]))

    return complete


def check_scans(data: bytes) -> None:
    """Raise UndecodableError for a stream of more scans than any encoder makes."""
    scans = data.count(_SOS)
    if scans > _MOST_SCANS:
        raise UndecodableError(f"a JPEG of {scans} scans, {_MOST_SCANS} at most")


def _completed_start(plane: Plane, header: JpegHeader, tables: bytes) -> bytes | None:
    """What replaces the header of a tile; None where the tile is whole as it is."""
    if len(header.components) != 3:
        return joined_start(header, tables)
    ycbcr = holds_ycbcr(header, plane.photometric)
    if ycbcr and header.jfif and not tables:
        return None
    return joined_start(header, tables, 1 if ycbcr else 0)


def joined_start(header: JpegHeader, tables: bytes, transform: int | None = None) -> bytes:
    """Return the start of a stream with the shared tables, and Adobe's marker where a colour transform is given."""
    marker = b"" if transform is None else _ADOBE + bytes([transform])
    return _SOI + marker + tables + header.segments


def shared_tables(plane: Plane) -> bytes:
    """Return the quantisation and Huffman tables that all tiles share, without the markers round them."""
    tables = plane.directory.values.get(347, b"")
    stop = tables.rfind(EOI)
    return tables[2:stop] if tables[:2] == _SOI and stop >= 2 else b""
