"""`FileSink`: bytes to a file that appears whole or not at all, compressed beside the thread that writes."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import zlib
from pathlib import Path

from wsi_mmm.storage.local import local_errors, temporary_beside

BLOCK = 1 << 20  # bytes handed on at a time: fixed, so the compressed bytes do not depend on the caller's batches
LEVEL = 1  # gzip: 6 takes four times as long for a fifth less; measured in tests/benchmarks/bench_geojson.py


class FileSink:
    """Writes to a temporary file beside ``path``; `close` renames it, `abort` removes it. OutputError on trouble.

    With ``gzip`` the stream is one gzip member without name or time, so equal content gives equal bytes.
    """

    def __init__(self, path: str | Path, *, gzip: bool = False) -> None:
        self.path = Path(path)
        self._buffer = bytearray()
        self._blocks: queue.Queue[bytes | None] = queue.Queue(maxsize=8)
        self._error: OSError | None = None
        self._compressor = zlib.compressobj(LEVEL, zlib.DEFLATED, 31) if gzip else None
        with local_errors(str(self.path), writing=True):
            self._temporary = temporary_beside(self.path)
            self._file = self._temporary.open("wb")
        self._thread = threading.Thread(target=self._write_blocks, name="file-sink", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Append ``data``. An error of an earlier block is raised here or in `close`."""
        self._buffer += data
        if len(self._buffer) < BLOCK:
            return
        whole = len(self._buffer) // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            self._blocks.put(bytes(self._buffer[start : start + BLOCK]))
        del self._buffer[:whole]
        self._raise_error()

    def close(self) -> None:
        """Finish the file and put it in place."""
        try:
            self._blocks.put(bytes(self._buffer))
            self._stop_thread()
            self._raise_error()
            with local_errors(str(self.path), writing=True):
                self._file.close()
                os.replace(self._temporary, self.path)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Leave nothing behind."""
        self._stop_thread()
        with contextlib.suppress(OSError):  # a full disk fails once more when the file is closed
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _stop_thread(self) -> None:
        if self._thread.is_alive():
            self._blocks.put(None)
            self._thread.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            with local_errors(str(self.path), writing=True):
                raise self._error

    def _write_blocks(self) -> None:
        """The thread: goes on taking blocks after an error, so that the writer never waits for it in vain."""
        while (block := self._blocks.get()) is not None:
            self._write_data(self._compressor.compress(block) if self._compressor else block)
        if self._compressor:
            self._write_data(self._compressor.flush())

    def _write_data(self, data: bytes) -> None:
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
