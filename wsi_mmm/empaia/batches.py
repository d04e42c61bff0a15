"""Objects to post in batches of a size that the platform takes, and their ids if its answer was lost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from wsi_mmm.empaia.bodies import Record, body, encoded
from wsi_mmm.errors import OutputError, PlatformError

MOST_ITEMS = 10_000  # what the platform takes in one post
MOST_PIXELS = 25_000_000  # and gives in one region
_OPEN, _CLOSE = b'{"items":[', b"]}"


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one request: objects, bytes of JSON, pixels of a region."""

    items: int = 1000
    body: int = 4_000_000
    pixels: int = 4096 * 4096

    def __post_init__(self) -> None:
        if not (1 <= self.items <= MOST_ITEMS and self.body >= 1000 and 1 <= self.pixels <= MOST_PIXELS):
            raise OutputError(f"the platform takes 1 to {MOST_ITEMS} objects and gives {MOST_PIXELS} pixels at most")


@dataclass(frozen=True, slots=True)
class PostBatch:
    """The JSON of some objects, one each."""

    items: tuple[bytes, ...]

    @property
    def data(self) -> bytes:
        """The body of their post."""
        return _OPEN + b",".join(self.items) + _CLOSE

    def halves(self) -> tuple[PostBatch, PostBatch]:
        """The first half and the rest, in order."""
        middle = len(self.items) // 2
        return PostBatch(self.items[:middle]), PostBatch(self.items[middle:])


def batches(records: Iterable[Record], job_id: str, limits: Limits) -> Iterator[PostBatch]:
    """``records`` in order, in batches within the limits; one batch at a time is in memory."""
    held: list[bytes] = []
    size = room = limits.body - len(_OPEN) - len(_CLOSE)
    for record in records:
        text = encoded(body(record, job_id))
        if len(text) > room:
            raise OutputError(f"one object has {len(text)} bytes; the platform takes {limits.body} in a request")
        if held and (len(held) == limits.items or len(text) + 1 > size):
            yield PostBatch(tuple(held))
            held, size = [], room
        held.append(text)
        size -= len(text) + 1
    if held:
        yield PostBatch(tuple(held))


def ids_of(answer: object, count: int) -> list[str]:
    """The ids of ``count`` objects in the answer to their post, in order. PlatformError when it has others."""
    items = answer.get("items") if isinstance(answer, dict) else answer
    if not isinstance(items, list) or len(items) != count:
        raise PlatformError(f"the EMPAIA platform did not answer with the {count} objects that were posted")
    return [id_of(item) for item in items]


def id_of(answer: object) -> str:
    """The id of a posted object. PlatformError when the answer has none."""
    found = answer.get("id") if isinstance(answer, dict) else None
    if not isinstance(found, str) or not found:
        raise PlatformError("the EMPAIA platform answered without the id of what was posted")
    return found


def match_ids(sent: Sequence[bytes], found: Sequence[Mapping[str, object]]) -> list[str]:
    """The ids of ``sent`` among the objects ``found`` on the platform, by all that was sent of each.

    Objects that are alike in everything may stand for each other. PlatformError unless every one is found.
    """
    waiting: dict[str, list[str]] = {}
    wanted: list[dict[str, object]] = [json.loads(text) for text in sent]
    fields = sorted({name for item in wanted for name in item})
    for item in found:
        waiting.setdefault(_comparison_key(item, fields), []).append(id_of(item))
    keys = [_comparison_key(item, fields) for item in wanted]
    if any(count > len(waiting.get(key, ())) for key, count in Counter(keys).items()):
        raise PlatformError("the connection broke while objects were posted, and the platform does not show them all")
    return [waiting[key].pop(0) for key in keys]


def _comparison_key(item: Mapping[str, object], fields: Sequence[str]) -> str:
    return json.dumps([item.get(name) for name in fields], sort_keys=True)
