"""DICOM files that belong together: a slide is a series, one file per level; OpenSlide opens it by any of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_HEAD = 1 << 16  # bytes; the attributes of the series stand before the pixels
_SERIES = re.compile(rb"\x20\x00\x0e\x00UI..([0-9.]{1,64})", re.DOTALL)  # (0020,000E), explicit VR, little endian

_CLASS = re.compile(rb"\x02\x00\x02\x00UI..([0-9.]{1,64})", re.DOTALL)  # (0002,0002), the kind of object
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"


def series_of(path: str | Path) -> str | None:
    """SeriesInstanceUID of a DICOM file; None when it has none, is no DICOM file or cannot be read."""
    return _find_uid(path, _SERIES)


def is_other_dicom(path: str | Path) -> bool:
    """Return True for a DICOM file that says to be no slide: an index (DICOMDIR), annotations, another image."""
    found = _find_uid(path, _CLASS)
    return found is not None and found != _WHOLE_SLIDE


def _find_uid(path: str | Path, pattern: re.Pattern[bytes]) -> str | None:
    try:
        with Path(path).open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return None  # whoever opens it as a slide says why
    found = pattern.search(head) if head[128:132] == b"DICM" else None
    return found.group(1).decode() if found else None


def is_dicom(path: str) -> bool:
    """Return True for a local file with the mark of DICOM at byte 128, whatever its name."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def one_per_series(paths: Iterable[str]) -> list[str]:
    """The paths without the DICOM files whose folder and series an earlier one has; the order is kept."""
    kept, seen = [], set()
    for path in paths:
        named = path.lower().endswith(".dcm") or "." not in path.rsplit("/", 1)[-1].strip("0123456789.")
        series = series_of(path) if named else None
        key = (str(Path(path).parent), series)
        if series is None or key not in seen:
            kept.append(path)
        seen.add(key)
    return kept
