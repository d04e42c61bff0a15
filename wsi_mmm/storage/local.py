"""The local file system: files read in ranges, whole files, and files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from wsi_mmm.errors import NotFound, OutputError, SlideChanged, StorageError
from wsi_mmm.storage.base import local_path
from wsi_mmm.storage.ranges import Buffer, Counter, MergeRule, Range, Ranges, fetch_merged

# A gap costs its copy, a further pread about as much as copying 16 KB. Reads are not concurrent: no cuts.
_DISK = MergeRule(gap=16 << 10, waste=1.0, part=64 << 20, longest=256 << 20)
_NETWORK = MergeRule(gap=128 << 10, waste=0.12, part=64 << 20, longest=256 << 20)
_NETWORK_SYSTEMS = ("fuse", "nfs", "cifs", "smb", "ceph", "lustre", "beegfs", "gpfs", "gluster", "9p", "afs")


# ---------------------------------------------------------------- reading in ranges


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
        parts: list[Buffer] = []
        for start, length in spans:
            part = os.pread(self._descriptor, length, start)
            # A network file system may give less, and Linux gives 2 GB at most.
            while len(part) < length and (more := os.pread(self._descriptor, length - len(part), start + len(part))):
                part += more
            parts.append(part)
        self.counter.add(sum(len(part) for part in parts), len(parts))
        return parts

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


# ---------------------------------------------------------------- whole files


def open_file(uri: str) -> LocalStore:
    """Open a file. Raises NotFound, StorageError."""
    path = local_path(uri)
    with local_errors(uri):
        if path.is_dir():
            raise NotFound(f"{uri} is a folder; give the file of one slide")
        if path.exists() and not path.is_file():
            raise NotFound(f"{uri} is a pipe, socket or device; give the file of one slide")
        return LocalStore(uri, os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)))


def read(uri: str) -> bytes:
    """Return the whole file."""
    with local_errors(uri):
        return local_path(uri).read_bytes()


def exists(uri: str) -> bool:
    """Tell whether there is a file or a folder."""
    return local_path(uri).exists()


def list_uris(prefix: str) -> list[str]:
    """Return every file below a folder, sorted; the prefix itself when it is a file."""
    root = local_path(prefix)
    if root.is_file():
        return [prefix]
    with local_errors(prefix):
        names = sorted(str(p.relative_to(root).as_posix()) for p in root.rglob("*") if p.is_file())
    return [f"{prefix.rstrip('/')}/{name}" for name in names]


def list_folders(prefix: str) -> list[str]:
    """Return the names of the folders directly in a folder, sorted; links are left out."""
    with local_errors(prefix):
        try:
            with os.scandir(local_path(prefix)) as found:
                return sorted(one.name for one in found if one.is_dir(follow_symlinks=False))
        except FileNotFoundError:
            return []


def write(uri: str, data: bytes) -> None:
    """Write the whole file: readers see the old one or the new one. Raises OutputError."""
    with atomic_file(local_path(uri)) as temporary:
        temporary.write_bytes(data)


def delete(uri: str) -> None:
    """Delete a file if it is there."""
    with local_errors(uri, writing=True):
        local_path(uri).unlink(missing_ok=True)


# ---------------------------------------------------------------- files and folders that appear whole


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write a file at; it becomes ``path`` when the block ends well, else it is removed.

    An OSError of the block is an OutputError that names ``path``.
    """
    with local_errors(str(path), writing=True):
        temporary = temporary_beside(path)
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A temporary folder beside ``path``, which becomes ``path`` when the block ends well, else it is removed.

    An older folder is replaced, or kept where ``replace`` is False. An OSError of the block is an OutputError that
    names ``path``.
    """
    with local_errors(str(path), writing=True):
        temporary = temporary_beside(path)
        temporary.mkdir()
        try:
            yield temporary
            if replace:
                shutil.rmtree(path, ignore_errors=True)
            try:
                os.replace(temporary, path)
            except OSError:
                if replace or not path.is_dir():  # else another process was first
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def temporary_beside(path: Path) -> Path:
    """Return a hidden name of its own in the folder of ``path``, which is made if need be.

    It lacks the suffix of ``path``: what a killed process leaves behind is taken for no part and no slide.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


# ---------------------------------------------------------------- errors


@contextlib.contextmanager
def local_errors(uri: str, *, writing: bool = False) -> Iterator[None]:
    """Turn errors of the local file system at ``uri`` into ours: OutputError when ``writing``."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not writing:
            raise NotFound(f"{uri}: no such file; check the path") from error
        raise (OutputError if writing else StorageError)(f"{uri}: {_os_reason(error, writing=writing)}") from error


def _os_reason(error: OSError, *, writing: bool) -> str:
    denied = "no permission to write; choose another output folder" if writing else "no permission to read it"
    known = {
        errno.EACCES: denied,
        errno.EPERM: denied,
        errno.ENOSPC: "the disk is full; free space or choose another output folder",
        errno.EDQUOT: "the disk quota is used up; free space or choose another output folder",
        errno.EROFS: "the file system is read-only; choose another output folder",
        errno.ENOTDIR: "a part of the path is a file, not a folder; check the path",
        errno.EISDIR: "this is a folder; give a file",
        errno.EEXIST: "file exists; choose another folder",
        errno.EMFILE: "too many files are open; raise 'ulimit -n'",
        errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    }
    return known.get(error.errno or 0, (error.strerror or "input/output error").lower())
