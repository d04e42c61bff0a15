"""Outputs checked against the EAD before they are posted, so that the platform's validator has nothing to refuse."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator

from wsi_mmm.empaia.bodies import Annotation, ClassOf, Collection, Primitive, Record, type_of
from wsi_mmm.empaia.client import AppApi
from wsi_mmm.empaia.job_inputs import REGIONS, SLIDE, JobInputs
from wsi_mmm.empaia.lint import Ead, IoType, class_leaves
from wsi_mmm.empaia.pixelmaps import Pixelmap
from wsi_mmm.errors import OutputError


class CheckedOutputs:
    """Posts outputs to an App API, for one mode of an EAD. OutputError for an output that the EAD does not promise.

    An output must be one of the mode, of the type that is promised, about what is promised, and posted once; a class
    must be one of the EAD. What refers to items of a collection refers to those of the latest `post_items` to it, so
    that memory is that of a block.
    """

    def __init__(self, api: AppApi, ead: Ead, inputs: JobInputs) -> None:
        self._api, self._io = api, ead["io"]
        self._wanted: list[str] = ead["modes"][inputs.mode.lower()]["outputs"]
        self._classes = set(class_leaves(ead["classes"], f"{ead['namespace']}.classes"))
        regions = {region.id for region in inputs.regions}
        self._known: dict[str, set[str]] = {f"io.{SLIDE}": {inputs.wsi.id}, f"io.{REGIONS}.items": regions}
        self._keys: dict[str, str] = {}  # id -> output

    async def post_output(self, key: str, record: Record) -> str:
        """Post ``record`` as the output ``key``: its id."""
        if key not in self._wanted or key in self._keys.values():
            raise OutputError(f"output '{key}' is none of the EAD's in this mode, or is posted already")
        self._check_record(key, self._io[key], record)
        if isinstance(record, Collection):
            for item in record.items:
                self._check_record(key, self._io[key]["items"], item)
        posted = await self._api.post_output(key, record)
        self._keys[posted] = key
        self._known[f"io.{key}"] = {posted}
        return posted

    async def post_items(self, collection_id: str, records: Iterable[Record]) -> AsyncIterator[list[str]]:
        """Add ``records`` to an output that is a collection: the ids of each batch, in order."""
        key = self._keys[collection_id]
        found = self._known[f"io.{key}.items"] = set()
        async for ids in self._api.post_items(collection_id, self._check_each(key, records)):
            found.update(ids)
            yield ids

    async def put_tile(self, pixelmap: Pixelmap, pixelmap_id: str, place: tuple[int, int, int], *, data: bytes) -> None:
        """Write a tile of an output that is a pixelmap."""
        await self._api.put_tile(pixelmap, pixelmap_id, place, data=data)

    def check_all_posted(self) -> None:
        """OutputError when an output of the mode has not been posted."""
        missing = [key for key in self._wanted if key not in self._keys.values()]
        if missing:
            raise OutputError(f"output '{missing[0]}' of the EAD was not posted; please report it")

    def _check_each(self, key: str, records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            self._check_record(key, self._io[key]["items"], record)
            yield record

    def _check_record(self, key: str, promised: IoType, record: Record) -> None:
        if type_of(record) != promised["type"]:
            raise OutputError(f"output '{key}' is promised to be of type {promised['type']}, not {type_of(record)}")
        if isinstance(record, Collection) and record.item_type != promised["items"]["type"]:
            raise OutputError(f"output '{key}' holds items of type {promised['items']['type']}, not {record.item_type}")
        target = promised.get("reference")
        if target is not None and _referenced_id(record) not in self._known.get(target, ()):
            raise OutputError(f"output '{key}' must refer to {target}, and refers to something else")
        if isinstance(record, ClassOf) and record.value not in self._classes:
            raise OutputError(f"output '{key}' has the class {record.value[:60]!r}, which the EAD does not know")


def _referenced_id(record: Record) -> str | None:
    """The id that ``record`` refers to."""
    if isinstance(record, Annotation):
        return record.wsi.id
    if isinstance(record, Pixelmap):
        return record.wsi_id
    if isinstance(record, ClassOf):
        return record.annotation_id
    assert isinstance(record, Primitive | Collection)
    return None if record.reference is None else record.reference.id
