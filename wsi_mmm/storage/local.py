"""The local file system."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from wsi_mmm.errors import NotFound, SlideChanged
from wsi_mmm.storage.atomic import write_atomic
from wsi_mmm.storage.ranges import Buffer, Counter, MergeRule, Range, Ranges, fetch_merged
from wsi_mmm.storage.translate import local_errors
from wsi_mmm.storage.uris import local_path

# A gap costs its copy, a further pread about as much as copying 16 KB. Reads are not concurrent: no cuts.
_DISK = MergeRule(gap=16 << 10, waste=1.0, part=64 << 20, longest=256 << 20)
_NETWORK = MergeRule(gap=128 << 10, waste=0.12, part=64 << 20, longest=256 << 20)
_NETWORK_SYSTEMS = ("fuse", "nfs", "cifs", "smb", "ceph", "lustre", "beegfs", "gpfs", "gluster", "9p", "afs")


class LocalStore:
    """A file, read in ranges by several threads at once.

    ``remote``: it is on a network mount (NFS, JuiceFS and the like), where every read waits.
    """

    def __init__(self, uri: str, descriptor: int) -> None:
        self.uri = uri
        self.remote = _network_mount(os.fstat(descriptor).st_dev)
        self._merging = _NETWORK if self.remote else _DISK
        self.counter = Counter()
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self.etag: str | None = self._file_version()

    def _file_version(self) -> str:
        stat = os.fstat(self._descriptor)
        return f"{stat.st_mtime_ns:x}-{stat.st_size:x}"

    def get_ranges(self, ranges: Ranges) -> list[Buffer]:
        """Return the bytes of each (start, length); short where the file ends."""
        with local_errors(self.uri):
            found = fetch_merged(ranges, self.size, rule=self._merging, get=self._read_spans)
            if self._file_version() != self.etag:
                raise SlideChanged(f"{self.uri} was changed while it was read; run again")
        return found

    def _read_spans(self, spans: Sequence[Range]) -> list[Buffer]:
        parts: list[Buffer] = [self._read_span(start, length) for start, length in spans]
        self.counter.add(sum(len(part) for part in parts), len(parts))
        return parts

    def _read_span(self, start: int, length: int) -> bytes:
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
                return kind.startswith(_NETWORK_SYSTEMS) and not kind.startswith("fuseblk")
    return False


def open_local(uri: str) -> LocalStore:
    """Open a file. Raises NotFound, StorageError."""
    path = local_path(uri)
    with local_errors(uri):
        if path.is_dir():
            raise NotFound(f"{uri} is a folder; give the file of one slide")
        return LocalStore(uri, os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)))


def read_bytes(uri: str) -> bytes:
    """Return the whole file."""
    with local_errors(uri):
        return local_path(uri).read_bytes()


def write_bytes(uri: str, data: bytes) -> None:
    """Write the whole file: readers see the old one or the new one. Raises OutputError."""
    write_atomic(local_path(uri), data)


def list_uris(prefix: str) -> list[str]:
    """Return every file below a folder, sorted; the prefix itself when it is a file."""
    root = local_path(prefix)
    if root.is_file():
        return [prefix]
    with local_errors(prefix):
        names = sorted(str(p.relative_to(root).as_posix()) for p in root.rglob("*") if p.is_file())
    return [f"{prefix.rstrip('/')}/{name}" for name in names]


def delete(uri: str) -> None:
    """Delete a file if it is there."""
    with local_errors(uri, writing=True), contextlib.suppress(FileNotFoundError):
        local_path(uri).unlink()
