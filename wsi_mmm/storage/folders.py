"""Local places to write a file or a folder of any URI: its own when local, else a temporary one that is then uploaded.

The old objects of a folder are deleted first, and its zarr.json is uploaded last: half a folder is no Zarr.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsi_mmm.storage import store
from wsi_mmm.storage.atomic import atomic_folder
from wsi_mmm.storage.translate import local_errors

ROOT = Path("zarr.json")  # without it a folder is no Zarr


@contextmanager
def published_file(uri: str) -> Iterator[Path]:
    """A path to write ``uri`` at: its own when local, else a temporary one, uploaded when the block ends well."""
    if store.is_local(uri):
        yield store.local_path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="wsi-mmm-") as folder:
        path = Path(folder) / uri.rsplit("/", 1)[-1]
        yield path
        store.write_bytes(uri, path.read_bytes())


@contextmanager
def published_folder(uri: str) -> Iterator[str]:
    """A folder to write in, which becomes ``uri`` when the block ends well. Raises OutputError."""
    if store.is_local(uri):
        with atomic_folder(store.local_path(uri)) as place:
            yield str(place)
        return
    with local_errors(tempfile.gettempdir(), writing=True), tempfile.TemporaryDirectory(prefix="wsi-mmm-") as folder:
        yield folder
        _put_folder(Path(folder), uri)


def _put_folder(folder: Path, uri: str) -> None:
    for old in store.list_uris(uri):
        store.delete(old)
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for path in sorted(found, key=lambda path: (path == ROOT, path)):
        store.write_bytes(store.join(uri, path.as_posix()), (folder / path).read_bytes())
