"""The local file system, with errors said in words."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from wsi_mmm.errors import NotFound, OutputError, SlideChanged, StorageError
from wsi_mmm.storage.ranges import Buffer, Counter, Merging, Range, Ranges, fetch_merged
from wsi_mmm.storage.uris import local_path

# A gap costs its copy, a further pread about as much as copying 16 KB. Nothing travels side by side: no cuts.
_MERGING = Merging(gap=16 << 10, waste=1.0, part=64 << 20, longest=256 << 20)
_FAR = Merging(gap=128 << 10, waste=0.12, part=64 << 20, longest=256 << 20)
_NETWORKS = ("fuse", "nfs", "cifs", "smb", "ceph", "lustre", "beegfs", "gpfs", "gluster", "9p", "afs")


class LocalStore:
    """A file, read in ranges by several threads at once.

    ``remote``: it lies on a mount of a network (NFS, JuiceFS and the like), where every read waits.
    """

    def __init__(self, uri: str, descriptor: int) -> None:
        self.uri = uri
        self.remote = _network_mount(os.fstat(descriptor).st_dev)
        self._merging = _FAR if self.remote else _MERGING
        self.counter = Counter()
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self.etag: str | None = self._version()

    def _version(self) -> str:
        stat = os.fstat(self._descriptor)
        return f"{stat.st_mtime_ns:x}-{stat.st_size:x}"

    def get_ranges(self, ranges: Ranges) -> list[Buffer]:
        """Return the bytes of each (start, length); short where the file ends."""
        with _reading(self.uri):
            found = fetch_merged(ranges, self.size, rule=self._merging, get=self._get)
            if self._version() != self.etag:
                raise SlideChanged(f"{self.uri} was changed while it was read; run again")
        return found

    def _get(self, spans: Sequence[Range]) -> list[Buffer]:
        parts: list[Buffer] = [self._read(start, length) for start, length in spans]
        self.counter.add(sum(len(part) for part in parts), len(parts))
        return parts

    def _read(self, start: int, length: int) -> bytes:
        part = os.pread(self._descriptor, length, start)
        while 0 < len(part) < length:  # a network file system may give less, and Linux gives 2 GB at most
            more = os.pread(self._descriptor, length - len(part), start + len(part))
            if not more:
                break
            part += more
        return part

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _network_mount(device: int) -> bool:
    """Tell whether a device is a network file system, as Linux lists it; unknown ones are taken for disks."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            mount, _, kind = line.partition(" - ")
            if mount.split()[2:3] == [number]:
                return kind.startswith(_NETWORKS) and not kind.startswith("fuseblk")
    return False


def open_local(uri: str) -> LocalStore:
    """Open a file. Raises NotFound, StorageError."""
    path = local_path(uri)
    with _reading(uri):
        if path.is_dir():
            raise NotFound(f"{uri} is a folder; give the file of one slide")
        return LocalStore(uri, os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)))


def read_bytes(uri: str) -> bytes:
    """Return the whole file."""
    with _reading(uri):
        return local_path(uri).read_bytes()


def write_bytes(uri: str, data: bytes) -> None:
    """Write beside the target, then rename: readers see the old file or the whole new one."""
    path = local_path(uri)
    with writing(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def list_uris(prefix: str) -> list[str]:
    """Return every file below a folder, sorted; the prefix itself when it is a file."""
    root = local_path(prefix)
    if root.is_file():
        return [prefix]
    with _reading(prefix):
        names = sorted(str(p.relative_to(root).as_posix()) for p in root.rglob("*") if p.is_file())
    return [f"{prefix.rstrip('/')}/{name}" for name in names]


def delete(uri: str) -> None:
    """Delete a file if it is there."""
    with writing(uri), contextlib.suppress(FileNotFoundError):
        local_path(uri).unlink()


@contextlib.contextmanager
def writing(uri: str) -> Iterator[None]:
    """Turn errors of writing to ``uri`` into OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{uri}: {_why(error, writing=True)}") from error


@contextlib.contextmanager
def _reading(uri: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"{uri}: no such file; check the path") from error
    except OSError as error:
        raise StorageError(f"{uri}: {_why(error, writing=False)}") from error


def _why(error: OSError, *, writing: bool) -> str:
    known = {
        errno.ENOSPC: "the disk is full; free space or choose another output folder",
        errno.EDQUOT: "the disk quota is used up; free space or choose another output folder",
        errno.EROFS: "the file system is read-only; choose another output folder",
        errno.ENOTDIR: "a part of the path is a file, not a folder; check the path",
        errno.EISDIR: "this is a folder; give a file",
        errno.EMFILE: "too many files are open; raise 'ulimit -n'",
        errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    }
    denied = "no permission to write; choose another output folder" if writing else "no permission to read it"
    known |= {errno.EACCES: denied, errno.EPERM: denied}
    return known.get(error.errno or 0, (error.strerror or "input/output error").lower())


def _umask() -> int:
    """Return the process's umask as /proc tells it; asking os.umask would change it for other threads."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022
