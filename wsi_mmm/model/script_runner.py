"""Running a TorchScript model: in a process that runs nothing else, which is sent tiles and sends probabilities.

TorchScript is code, so it is never opened here, and nothing that its process sends is trusted: lengths, shapes and
numbers are checked. Answers depend on nothing but the pixels: batches have one size, threads one core each.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_mmm.errors import ModelError
from wsi_mmm.host_tuning import cpu_count
from wsi_mmm.model.answers import RunOutput
from wsi_mmm.model.convert_weights import KEPT_VARIABLES
from wsi_mmm.model.script_process import ANSWER, ASK, FAULT, MAX_WORDS, PROBABILITIES, READY
from wsi_mmm.model.wsinfer import ScriptModel
from wsi_mmm.types import F32, U8

BATCH = 8
LOSSES = 3  # processes that may end or hang before no other is started
_PACKAGE = Path(__file__).parents[2]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ScriptLimits:
    """Seconds that loading and one batch may take; bytes of memory beside the script's own and of each thread."""

    load_seconds: float = 300.0
    batch_seconds: float = 300.0
    memory: int = 4 << 30
    thread_memory: int = 1 << 30


@dataclass(slots=True, weakref_slot=True, eq=False)
class ScriptProcess:
    """A process with the model open in it. Thread-safe: ``ask`` waits for a free channel, of which there are
    ``channels``."""

    model: ScriptModel
    channels: int
    limits: ScriptLimits
    lost: bool = False
    prevented: tuple[str, ...] = ()
    _process: subprocess.Popen[bytes] = field(init=False)
    _free: SimpleQueue[tuple[int, int]] = field(init=False, default_factory=SimpleQueue)

    def __post_init__(self) -> None:
        theirs, ours = [], []
        for _ in range(self.channels):
            (ask, put), (take, answer) = os.pipe(), os.pipe()
            theirs.append((ask, answer))
            ours.append((put, take))
        lifeline, held = os.pipe()
        passed, kept = (
            [lifeline, *(fd for pair in theirs for fd in pair)],
            [held, *(fd for pair in ours for fd in pair)],
        )
        size = self.model.script.stat().st_size
        facts = {
            "script": str(self.model.script.resolve()), "sha256": self.model.sha256,
            "outputs": self.model.card.tasks[0].outputs, "transform": self.model.transform.to_json(), "batch": BATCH,
            "memory": self.limits.memory + self.channels * self.limits.thread_memory + 4 * size,
            "channels": theirs, "lifeline": lifeline,
        }  # fmt: skip
        try:
            # -P: modules that lie beside the script, or wherever the user stands, are not imported.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "wsi_mmm.model.script_process", json.dumps(facts)],
                pass_fds=passed, env=_plain_environment(), cwd="/",
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the one that started it
            )  # fmt: skip
        except BaseException:
            for fd in kept:
                os.close(fd)
            raise
        finally:
            for fd in passed:
                os.close(fd)
        weakref.finalize(self, _end_process, self._process, kept)
        for pair in ours:
            for fd in pair:
                os.set_blocking(fd, False)
        self._await_ready(ours[0])
        for pair in ours:
            self._free.put(pair)

    def _await_ready(self, channel: tuple[int, int]) -> None:
        words = self._exchange(channel, b"", time.monotonic() + self.limits.load_seconds, READY, MAX_WORDS)
        try:
            self.prevented = tuple(str(one)[:100] for one in json.loads(words))
        except (ValueError, TypeError) as error:
            raise self._lose("sends what is no answer") from error

    def ask(self, tiles: U8) -> F32:
        """Tiles uint8[n, s, s, 3], n up to `BATCH` -> probabilities float32[n, K]. ModelError naming the model: it
        raised, its process ended, took too long or sent something else (``lost``: it is of no use any more)."""
        count, outputs = len(tiles), self.model.card.tasks[0].outputs
        channel = self._free.get()
        try:
            data = ASK.pack(count, tiles.shape[1]) + np.ascontiguousarray(tiles).tobytes()
            until = time.monotonic() + self.limits.batch_seconds
            answer = self._exchange(channel, data, until, PROBABILITIES, 4 * count * outputs)
        finally:
            self._free.put(channel)
        if len(answer) != 4 * count * outputs:
            raise self._lose(f"sends {len(answer)} bytes for {count} tiles of {outputs} classes")
        found = np.frombuffer(answer, np.float32).reshape(count, outputs).copy()
        if not np.isfinite(found).all():
            raise ModelError(f"model '{self.model.card.name}' answers NaN or infinity: its weights are damaged")
        if found.min() < 0 or found.max() > 1.001 or (outputs > 1 and abs(found.sum(axis=1) - 1).max() > 0.01):
            raise self._lose("sends numbers that are no probabilities")
        return found

    def _exchange(self, channel: tuple[int, int], data: bytes, until: float, wanted: int, most: int) -> bytes:
        """Send ``data``, wait for the answer; ModelError with the words of a fault, or where none comes in time."""
        put, take = channel
        if self.lost:
            raise self._lose("has ended")
        self._write(put, data, until)
        status, length = ANSWER.unpack(self._read(take, ANSWER.size, until))
        if status not in (wanted, FAULT) or length > (MAX_WORDS if status == FAULT else most):
            raise self._lose("sends what is no answer")
        answer = self._read(take, length, until)
        if status == FAULT:
            words = "".join(c for c in answer.decode(errors="replace") if c.isprintable())
            raise ModelError(f"model '{self.model.card.name}' {words[:300]}")
        return answer

    def _write(self, fd: int, data: bytes, until: float) -> None:
        left = memoryview(data)
        while left:
            self._await_pipe(fd, select.POLLOUT, until)
            try:
                left = left[os.write(fd, left) :]
            except BlockingIOError:
                continue
            except OSError as error:  # nobody reads any more
                raise self._lose(self._describe_end()) from error

    def _read(self, fd: int, count: int, until: float) -> bytes:
        found = bytearray()
        while len(found) < count:
            self._await_pipe(fd, select.POLLIN, until)
            more = os.read(fd, min(count - len(found), 1 << 20))
            if not more:
                raise self._lose(self._describe_end())
            found += more
        return bytes(found)

    def _await_pipe(self, fd: int, event: int, until: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        left = until - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise self._lose("did not answer in time: it hangs, or this machine is too slow for it")

    def _describe_end(self) -> str:
        if self.lost:
            return "has ended"
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "has closed its pipes"
        if code == -signal.SIGKILL:
            return "was killed (out of memory?)"
        return f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"

    def _lose(self, what: str) -> ModelError:
        """The error of a process that is of no use any more; it is killed."""
        self.lost = True
        self._process.kill()
        return ModelError(f"the process of the model '{self.model.card.name}' {what}")

    def has_ended(self) -> bool:
        """Return whether the process is gone."""
        return self._process.poll() is not None

    def close(self) -> None:
        """End the process."""
        self.lost = True
        self._process.kill()
        self._process.wait()


PendingAnswers = tuple[tuple[str, ...], list[Future[F32]]]
"""Tasks, and the probabilities of their tiles as they come."""


class ScriptRunner:
    """A TorchScript model, callable from several threads at once, as `Runner` is. ``threads``: batches that are
    computed side by side (None: one per core this process may use)."""

    def __init__(self, model: ScriptModel, threads: int | None = None, *, limits: ScriptLimits | None = None) -> None:
        self.device = "cpu"
        self.threads = max(1, threads or cpu_count())
        self._model, self._limits = model, limits or ScriptLimits()
        self._lock = threading.Lock()
        self._process: ScriptProcess | None = None
        self._losses, self._last = 0, ""
        self._pool = ThreadPoolExecutor(self.threads, "script")

    def run(self, pixels: U8, tasks: Sequence[str] = ()) -> RunOutput:
        """Compute tiles uint8[n, s, s, 3]: the probabilities of ``tasks``; no features. ModelError."""
        return self.finish(self.begin(pixels, tasks), len(pixels))

    def begin(self, pixels: U8, tasks: Sequence[str] = ()) -> PendingAnswers:
        """Begin to compute tiles and return at once; `finish` waits for them."""
        parts = [pixels[first : first + BATCH] for first in range(0, len(pixels), BATCH)]
        return tuple(tasks), [self._pool.submit(self._answer, part) for part in parts]

    def finish(self, pending: PendingAnswers, count: int) -> RunOutput:
        """Wait for the ``count`` tiles that `begin` was given. ModelError of the first batch that has one."""
        tasks, batches = pending
        found = [np.zeros((0, self._model.card.tasks[0].outputs), np.float32)]
        table = np.concatenate([*found, *(batch.result() for batch in batches)])
        return RunOutput(np.zeros((count, 0), np.float32), {}, dict.fromkeys(tasks, table))

    def answer_bag(self, vectors: F32, tasks: Sequence[str]) -> tuple[dict[str, npt.NDArray[Any]], dict[str, F32]]:
        """ModelError: there is no such task."""
        raise ModelError(f"model '{self._model.card.name}' answers per tile alone")

    def warm_up(self, side: int) -> None:
        """Start the process and let it answer a blank tile. ModelError when it cannot."""
        self._answer(np.zeros((1, side, side, 3), np.uint8))

    def describe(self) -> dict[str, Any]:
        """Return the facts of the process, for reports."""
        prevented = self._process.prevented if self._process else ()
        return {
            "device": self.device, "runtime": "torchscript", "micro_batch": f"{BATCH} tiles", "threads": self.threads,
            "process": f"of its own; prevented: {', '.join(prevented) or 'nothing'}",
        }  # fmt: skip

    def close(self) -> None:
        """End the process and the threads; the runner cannot be used afterwards."""
        self._pool.shutdown()
        if self._process is not None:
            self._process.close()

    def _answer(self, tiles: U8) -> F32:
        process = self._open_process()
        try:
            return process.ask(tiles)
        except ModelError as error:
            if process.lost:
                self._count_loss(process, error)
            raise

    def _open_process(self) -> ScriptProcess:
        with self._lock:
            if self._process is not None and self._process.has_ended():  # while nobody asked it
                self._process = None
            if self._process is None:
                if self._losses >= LOSSES:
                    raise ModelError(f"{self._last}; it is not started again after {LOSSES} times")
                try:
                    self._process = ScriptProcess(self._model, self.threads, self._limits)
                except ModelError as error:
                    self._losses, self._last = self._losses + 1, str(error)
                    raise
                if not self._process.prevented:
                    _log.warning("%s: this system cannot keep its process from anything", self._model.card.name)
            return self._process

    def _count_loss(self, process: ScriptProcess, error: ModelError) -> None:
        with self._lock:
            if self._process is process:
                self._process = None
                self._losses, self._last = self._losses + 1, str(error)


def _plain_environment() -> dict[str, str]:
    """The environment of the process: no credentials, no settings of others; one core for each thread."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    places = dict.fromkeys(os.path.abspath(place) for place in (str(_PACKAGE), *sys.path) if place)
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**kept, **single, "PYTHONPATH": os.pathsep.join(places), "PYTHONDONTWRITEBYTECODE": "1",
            "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip


def _end_process(process: subprocess.Popen[bytes], pipes: Sequence[int]) -> None:
    process.kill()
    process.wait()
    for fd in pipes:
        os.close(fd)
