"""Folders that appear whole: written beside their place, then renamed; on object stores what was there goes first."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from wsi_mmm.slides import store
from wsi_mmm.slides.store_local import writing


@contextmanager
def published_folder(uri: str) -> Iterator[str]:
    """A URI to write a folder at. Local: a temporary folder that becomes ``uri`` when the block ends well."""
    if not store.is_local(uri):
        for old in store.list_uris(uri):
            store.delete(old)
        with store.translated(uri, writing=True):
            yield uri
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
