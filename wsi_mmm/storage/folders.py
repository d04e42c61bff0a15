"""Folders that appear whole: written beside their place, then renamed. For object stores they are written to a disk and
put from there, what was there going first and the file that says what the folder is coming last."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsi_mmm.storage import store
from wsi_mmm.storage.local import writing

ROOT = Path("zarr.json")  # of a Zarr: without it there is none


@contextmanager
def published_folder(uri: str) -> Iterator[str]:
    """A folder to write in, which becomes ``uri`` when the block ends well. OutputError."""
    if not store.is_local(uri):
        with writing(tempfile.gettempdir()), tempfile.TemporaryDirectory(prefix="wsi-mmm-") as folder:
            yield folder
            _put(Path(folder), uri)
        return
    target = store.local_path(uri)
    with writing(uri):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            os.chmod(temporary, 0o755)
            yield temporary
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _put(folder: Path, uri: str) -> None:
    for old in store.list_uris(uri):
        store.delete(old)
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for path in sorted(found, key=lambda path: (path == ROOT, path)):
        store.write_bytes(store.join(uri, path.as_posix()), (folder / path).read_bytes())
