"""Files and folders that appear whole or not at all: written beside their place, then renamed. Local paths only."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from wsi_mmm.storage.translate import local_errors


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` to write to; it becomes ``path`` when the block ends well, else it is removed.

    An OSError of the block is an OutputError that names ``path``.
    """
    with local_errors(str(path), writing=True):
        temporary = create_beside(path)
        try:
            yield temporary
            move_into_place(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def create_beside(path: Path) -> Path:
    """Create an empty temporary file, hidden, in the folder of ``path``, which is made if need be. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    return Path(name)


def move_into_place(temporary: Path, path: Path) -> None:
    """Give ``temporary`` the usual permissions and the name ``path``. Raises OSError."""
    os.chmod(temporary, 0o666 & ~_read_umask())
    os.replace(temporary, path)


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``: readers see the old file or the whole new one. Raises OutputError."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def atomic_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A temporary folder beside ``path``, which becomes ``path`` when the block ends well, else it is removed.

    An older folder is replaced, or kept where ``replace`` is False. An OSError of the block is an OutputError that
    names ``path``.
    """
    with local_errors(str(path), writing=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            os.chmod(temporary, 0o777 & ~_read_umask())
            yield Path(temporary)
            if replace:
                shutil.rmtree(path, ignore_errors=True)
            try:
                os.replace(temporary, path)
            except OSError:
                if replace or not path.is_dir():  # else another process was first
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _read_umask() -> int:
    """Return the process's umask as /proc tells it; asking os.umask would change it for other threads."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022
