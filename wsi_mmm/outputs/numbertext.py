"""Coordinates as JSON text, many at a time.

A coordinate is at most seven digits and two decimals: three table look-ups of four bytes each (thousands, the rest,
the decimals). Bytes that a number does not need are zero and are deleted from the whole text at once.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from wsi_mmm.types import I64, Objects

TextWords = npt.NDArray[np.uint32]

_LIMIT = 10_000_000 * 100  # hundredths


def coordinate_texts(objects: Objects) -> list[bytes]:
    """Per object the JSON of its polygon, rings closed: ``[[[x,y],...],[hole...]]``, at most two decimals."""
    if not len(objects):
        return []
    closed = np.insert(np.arange(len(objects.coords)), objects.ring_offsets[1:], objects.ring_offsets[:-1])
    ring_ends = objects.ring_offsets[1:] + np.arange(len(objects.ring_offsets) - 1)
    values = np.rint(objects.coords * 100).astype(np.int64)[closed]
    text = _texts_by_table if values.min() >= 0 and values.max() < _LIMIT else _texts_one_by_one
    return text(values, ring_ends, ring_ends[objects.object_offsets[1:] - 1])


def _texts_by_table(values: I64, ring_ends: I64, object_ends: I64) -> list[bytes]:
    tables = _text_tables()
    words = np.empty((len(values), 7), np.uint32)
    for axis, column in ((0, 0), (1, 3)):
        whole, cents = np.divmod(values[:, axis].astype(np.uint32), np.uint32(100))
        high, low = np.divmod(whole, np.uint32(10_000))
        words[:, column] = tables[f"high{axis}"][high]
        words[:, column + 1] = tables["low"][low + np.uint32(10_000) * (high > 0)]
        words[:, column + 2] = tables[f"cents{axis}"][cents]
    comma, ring, end = tables["separators"]
    words[:, 6] = comma
    words[ring_ends, 6] = ring
    words[object_ends, 6] = end
    lines = words.tobytes().translate(None, b"\0").split(b"\n")
    return [b"[[%b]]" % line for line in lines[:-1]]


@cache
def _text_tables() -> dict[str, TextWords]:
    high = [str(n) if n else "" for n in range(1000)]
    low = [str(n) for n in range(10_000)] + [f"{n:04d}" for n in range(10_000)]
    cents = [f".{n:02d}".rstrip("0").rstrip(".") for n in range(100)]
    return {
        "high0": _pack_words(["[" + text for text in high]),
        "high1": _pack_words(high),
        "low": _pack_words(low),
        "cents0": _pack_words([text + "," for text in cents]),
        "cents1": _pack_words([text + "]" for text in cents]),
        "separators": _pack_words([",", "],[", "\n"]),
    }


def _pack_words(texts: list[str]) -> TextWords:
    return np.frombuffer(b"".join(text.encode().ljust(4, b"\0") for text in texts), np.uint32)


def _texts_one_by_one(values: I64, ring_ends: I64, object_ends: I64) -> list[bytes]:
    """The same for coordinates that are negative or very large: slower, rarely needed."""
    ends, last = set(ring_ends.tolist()), set(object_ends.tolist())
    out: list[bytes] = []
    parts: list[str] = []
    for i, (x, y) in enumerate(values.tolist()):
        parts.append(f"[{_hundredths_text(x)},{_hundredths_text(y)}]")
        if i in last:
            out.append(f"[[{''.join(parts)}]]".encode())
            parts = []
        else:
            parts.append("],[" if i in ends else ",")
    return out


def _hundredths_text(hundredths: int) -> str:
    whole, cents = divmod(abs(hundredths), 100)
    text = f"{whole}.{cents:02d}".rstrip("0").rstrip(".")
    return f"-{text}" if hundredths < 0 else text
