"""Running a model the same way every time: padded batches of one size, one intra-op thread each, quantised answers.

Measured: the number of intra-op threads changes the bits of a convolution; a tile's place in a batch and its companions
do not, as long as the batch has one shape. So tiles are computed in batches of one fixed size, the last padded with
zeros, each on one thread, and several Python threads run side by side (torch releases the GIL).

Tiles of several callers share a batch. Measured on blocks of 64 tiles, many of which hold few at a slide's edge:
padding the last batch of each block costs a tenth of the model's time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wsi_mmm.errors import ModelError
from wsi_mmm.host_tuning import cpu_count
from wsi_mmm.model.fold import fold
from wsi_mmm.model.identity import RUNTIMES
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.model.runtime import forward_pass
from wsi_mmm.model.staging import BatchStager
from wsi_mmm.timing import count_waiting
from wsi_mmm.types import F32, U8

Quantise = Callable[[Tensor], Tensor]
Answers = dict[str, npt.NDArray[Any]]
"""By task; "" holds the pooled vectors."""

_PIXELS_CPU = 8 * 256 * 256
_PIXELS_CUDA = 64 * 256 * 256


@dataclass(frozen=True, slots=True)
class RunOutput:
    """``features`` float32[n, D]; ``maps`` of pixel tasks uint8[n, C, h, w]; ``tables`` of tile tasks uint8[n, K]."""

    features: F32
    maps: dict[str, U8]
    tables: dict[str, U8]


@dataclass(slots=True, eq=False)
class PendingTiles:
    """Tiles uint8[n, s, s, 3] of one caller, and their answers as they come.

    The first ``taken`` tiles are in batches; ``left`` tiles have no answer yet; times are of ``perf_counter``.
    """

    pixels: U8
    answers: Answers = field(default_factory=dict)
    taken: int = 0
    left: int = 0
    error: BaseException | None = None
    added: float = field(default_factory=time.perf_counter)
    begun: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.left = len(self.pixels)

    def wait(self) -> Answers:
        """Return all answers in the order of the tiles; raise the error of a batch that failed."""
        self.done.wait()
        count_waiting(self.begun - self.added)
        if self.error is not None:
            raise self.error
        return self.answers


@dataclass(frozen=True, slots=True)
class TileSpan:
    """Tiles ``start`` to ``stop`` of a caller's tiles."""

    pending: PendingTiles
    start: int
    stop: int

    @property
    def pixels(self) -> U8:
        """The tiles themselves."""
        return self.pending.pixels[self.start : self.stop]


@dataclass(slots=True)
class TileQueue:
    """Tiles of one size for one choice of tasks, oldest first, handed out in batches of ``size``. Thread-safe."""

    tasks: tuple[str, ...]
    size: int
    pending: deque[PendingTiles] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, pixels: U8) -> PendingTiles:
        """Put at least one tile at the end."""
        pending = PendingTiles(pixels)
        with self._lock:
            self.pending.append(pending)
        return pending

    def take_batch(self) -> list[TileSpan]:
        """Return the next ``size`` tiles, of one caller or of several; fewer when no more wait."""
        spans: list[TileSpan] = []
        with self._lock:
            room = self.size
            while room and self.pending:
                first = self.pending[0]
                first.begun = first.begun or time.perf_counter()
                stop = min(len(first.pixels), first.taken + room)
                spans.append(TileSpan(first, first.taken, stop))
                room -= stop - first.taken
                first.taken = stop
                if stop == len(first.pixels):
                    self.pending.popleft()
        return spans

    def finish(self, spans: Sequence[TileSpan], answers: Answers) -> None:
        """Hand the answers of a batch, in the order of its tiles, to the callers."""
        first = 0
        for span in spans:
            pending, count = span.pending, span.stop - span.start
            with self._lock:
                for name, values in answers.items():
                    if name not in pending.answers:
                        pending.answers[name] = np.empty((len(pending.pixels), *values.shape[1:]), values.dtype)
            for name, values in answers.items():
                pending.answers[name][span.start : span.stop] = values[first : first + count]
            first += count
            with self._lock:
                pending.left -= count
                if pending.left == 0:
                    pending.done.set()

    def fail(self, spans: Sequence[TileSpan], error: BaseException) -> None:
        """Let the callers of a batch raise ``error``; their other tiles are dropped."""
        with self._lock:
            for pending in {span.pending for span in spans}:
                pending.error = error
                if pending in self.pending:
                    self.pending.remove(pending)
                pending.done.set()


class Runner:
    """A model on a device, callable from several threads at once; answers depend on nothing but the pixels.

    ``quantise``: task name -> logits to uint8 (the task's own `quantise`). ``threads``: batches run side by side on a
    CPU (None: one per core this process may use). ``device`` "auto": CUDA when there is one. ``runtime``: one of
    `identity.RUNTIMES`. ``cache``: the user's cache folder, where ONNX files are kept (None: nowhere).
    """

    def __init__(
        self,
        model: MultiTaskModel,
        device: str = "auto",
        threads: int | None = None,
        *,
        quantise: Mapping[str, Quantise] | None = None,
        runtime: str = "eager",
        cache: Path | None = None,
    ) -> None:
        self.device = pick_device(device)
        folded, self._norms = fold(model.eval())  # before it is moved: a GPU rounds too much to compare
        self.model = folded.to(self.device)
        self.runtime = runtime
        self.threads = max(1, threads or cpu_count()) if self.device.type == "cpu" else 1
        self.quantise = dict(quantise or {})
        self._pass = forward_pass(self.model, runtime, self.device, folder=cache)
        self._queues: dict[tuple[int, tuple[str, ...]], TileQueue] = {}
        self._lock = threading.Lock()
        self._stagers = threading.local()
        self._pool = start_one_core_threads(self.threads, "model")

    def batch_size(self, side: int) -> int:
        """Tiles of ``side`` px that are computed together."""
        budget = _PIXELS_CPU if self.device.type == "cpu" else _PIXELS_CUDA
        return max(1, budget // (side * side))

    def run(self, pixels: U8, tasks: Sequence[str] = ()) -> RunOutput:
        """Compute tiles uint8[n, s, s, 3]: their features and the quantised answers of ``tasks``.

        Bit-identical for any n, any grouping of tiles and any number of threads on one kind of device.
        """
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
            raise ModelError(f"tiles must be uint8[n, s, s, 3], not {pixels.dtype}{list(pixels.shape)}")
        queue = self._find_queue(pixels.shape[1], tuple(tasks))
        if len(pixels):
            pending = queue.add(pixels)
            for _ in range(min(self.threads, -(-len(pixels) // queue.size))):
                self._pool.submit(self._run_batches, queue)
            answers = pending.wait()
        else:  # one blank batch tells the shapes
            blank = np.zeros((1, *pixels.shape[1:]), np.uint8)
            computed = self._pool.submit(self._compute_alone, blank, queue).result()
            answers = {name: values[:0] for name, values in computed.items()}
        tables = self.model.tile_heads
        return RunOutput(
            answers[""],
            {name: values for name, values in answers.items() if name and name not in tables},
            {name: values for name, values in answers.items() if name in tables},
        )

    def warm_up(self, side: int, tasks: Sequence[str] = ()) -> None:
        """Let each thread build its kernels for tiles of ``side`` px: a quarter of a second that nobody waits for."""
        queue, together = self._find_queue(side, tuple(tasks)), threading.Barrier(self.threads)
        blank = np.zeros((1, side, side, 3), np.uint8)

        def compute_blank(_: int) -> None:
            together.wait()  # one on each thread
            self._compute_alone(blank, queue)

        list(self._pool.map(compute_blank, range(self.threads)))

    def facts(self) -> dict[str, Any]:
        """Return the runtime and its tolerance, norms, batch size per tile size and threads, for reports."""
        with self._lock:
            sizes = {f"{side} px": f"{queue.size} tiles" for (side, _), queue in sorted(self._queues.items())}
        return {
            "device": str(self.device), "runtime": self.runtime, "tolerance": RUNTIMES[self.runtime],
            "norms": self._norms, "micro_batch": sizes, "threads": self.threads, "memory": "channels_last",
        }  # fmt: skip

    def close(self) -> None:
        """End the threads; the runner cannot be used afterwards."""
        self._pool.shutdown()

    def _find_queue(self, side: int, tasks: tuple[str, ...]) -> TileQueue:
        for name in tasks:
            if name not in self.model.heads:
                raise ModelError(f"the model has no task '{name}'; it has: {', '.join(self.model.tasks) or 'none'}")
            if name not in self.quantise:
                raise ModelError(f"Runner was given no quantise for task '{name}'; pass Task.quantise of every task")
        with self._lock:
            return self._queues.setdefault((side, tasks), TileQueue(tasks, self.batch_size(side)))

    def _run_batches(self, queue: TileQueue) -> None:
        """Compute batches until none waits. On CUDA the next one is copied to the device while this one is computed."""
        coming = self._stage_next(queue)
        while coming is not None:
            spans, staged = coming
            tiles = self._own_stager().await_copy(staged)
            coming = self._stage_next(queue) if self.device.type == "cuda" else None
            try:
                queue.finish(
                    spans, self._forward_batch(tiles, sum(span.stop - span.start for span in spans), queue.tasks)
                )
            except BaseException as error:  # noqa: BLE001  (the callers who wait for these tiles raise it)
                queue.fail(spans, error)
            coming = coming or self._stage_next(queue)

    def _stage_next(self, queue: TileQueue) -> tuple[list[TileSpan], Tensor] | None:
        """Take the next batch and begin to copy it to the device; None when no tile waits."""
        while spans := queue.take_batch():
            try:
                return spans, self._own_stager().stage([span.pixels for span in spans], queue.size)
            except BaseException as error:  # noqa: BLE001  (the callers who wait for these tiles raise it)
                queue.fail(spans, error)
        return None

    def _compute_alone(self, pixels: U8, queue: TileQueue) -> Answers:
        """Compute a few tiles in a batch of their own."""
        stager = self._own_stager()
        return self._forward_batch(stager.await_copy(stager.stage([pixels], queue.size)), len(pixels), queue.tasks)

    def _forward_batch(self, tiles: Tensor, count: int, tasks: tuple[str, ...]) -> Answers:
        """Run one padded batch; return the answers of its first ``count`` tiles."""
        with torch.inference_mode():
            vector, logits = self._pass(tiles, tasks)
            answers = {"": vector.float()} | {name: self.quantise[name](x.float()) for name, x in logits.items()}
            return {name: x[:count].contiguous().cpu().numpy() for name, x in answers.items()}

    def _own_stager(self) -> BatchStager:
        """The stager of the calling thread."""
        if not hasattr(self._stagers, "own"):
            self._stagers.own = BatchStager(self.device)
        stager: BatchStager = self._stagers.own
        return stager


def start_one_core_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Start threads that let torch compute on one core each; those of the host process stay as they were."""
    before, together = torch.get_num_threads(), threading.Barrier(count)
    pool = ThreadPoolExecutor(count, name, initializer=_use_one_core)
    list(pool.map(lambda _: together.wait(), range(count)))
    torch.set_num_threads(before)  # the setting is a thread's own, but also that of threads not used yet
    return pool


def _use_one_core() -> None:
    """Let the calling thread compute on one core, for good.

    A thread takes the setting of the process when torch first asks it for its own: so it is asked here.
    """
    torch.set_num_threads(1)
    torch.get_num_threads()


def pick_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu", "cuda", "cuda:1" or "mps". ModelError if this machine has no such thing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"the device '{name}' cannot be used here: {str(error).splitlines()[0]}") from error
    return device
