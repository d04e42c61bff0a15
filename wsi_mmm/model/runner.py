"""Running a model the same way every time: fixed padded micro-batches, one intra-op thread, quantised answers.

Measured: the number of intra-op threads changes the bits of a convolution, the position in a batch and its companions
do not as long as the batch has one shape. So a batch is cut into micro-batches of one fixed size (the last padded with
zeros), each runs on one thread, and parallelism comes from several Python threads (torch releases the GIL).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsi_mmm.errors import ModelError
from wsi_mmm.host_tuning import cpu_count
from wsi_mmm.model.fold import fold
from wsi_mmm.model.identity import RUNTIMES
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.model.packing import Answers, Call, Packet, Waiting
from wsi_mmm.model.runtime import forward_pass, versions
from wsi_mmm.model.staging import Stager, staged_ahead
from wsi_mmm.model.tune import Tuner, case_key
from wsi_mmm.types import F32, U8

Quantise = Callable[[Tensor], Tensor]
_PIXELS_CPU = 8 * 256 * 256
_PIXELS_CUDA = 64 * 256 * 256


@dataclass(frozen=True, slots=True)
class RunOutput:
    """``features`` float32[n, D]; ``maps`` of pixel tasks uint8[n, C, h, w]; ``tables`` of tile tasks uint8[n, K]."""

    features: F32
    maps: dict[str, U8]
    tables: dict[str, U8]


@dataclass(slots=True)
class _Desk:
    """What belongs to one tile size and choice of tasks: the calls that wait, and the choice of the micro-batch."""

    tasks: tuple[str, ...]
    tuner: Tuner
    waiting: Waiting = field(default_factory=Waiting)


class Runner:
    """A model on a device, callable from several threads at once; answers depend on nothing but the pixels.

    ``quantise``: task name -> logits to uint8 (the task's own `quantise`). ``threads``: micro-batches run side by side
    on a CPU (None: one per core this process may use). ``device`` "auto": CUDA when there is one. ``runtime``: one of
    `identity.RUNTIMES`. ``tune``: look for the micro-batch that costs least (see `tune`); the answers stay the same.
    ``cache``: the user's cache folder, where such choices and ONNX files are kept (None: nowhere).
    """

    def __init__(
        self,
        model: MultiTaskModel,
        device: str = "auto",
        threads: int | None = None,
        *,
        quantise: Mapping[str, Quantise] | None = None,
        runtime: str = "eager",
        tune: bool = False,
        cache: Path | None = None,
    ) -> None:
        self.device = pick_device(device)
        lean, self._norms = fold(model.eval())  # before it is moved: a GPU rounds too much to compare
        self.model = lean.to(self.device)
        self.runtime = runtime
        self.threads = max(1, threads or cpu_count()) if self.device.type == "cpu" else 1
        self.quantise = dict(quantise or {})
        self._pass = forward_pass(self.model, runtime, self.device, folder=cache)
        self._cache = cache
        self._tune = tune and self.device.type == "cpu" and runtime != "compile"  # a new size is compiled anew
        self._desks: dict[tuple[int, tuple[str, ...]], _Desk] = {}
        self._pool = ThreadPoolExecutor(self.threads, "model", initializer=_one_thread)
        self._stagers = threading.local()
        self._lock = threading.Lock()
        self._running = 0
        self._since = 0.0
        self._busy: list[tuple[float, float]] = []

    def micro_batch(self, size: int) -> int:
        """Tiles of ``size`` px that run together unless measuring says otherwise."""
        budget = _PIXELS_CPU if self.device.type == "cpu" else _PIXELS_CUDA
        return max(1, budget // (size * size))

    def run(self, pixels: U8 | Tensor, tasks: Sequence[str] = ()) -> RunOutput:
        """Tiles uint8[n, s, s, 3], in memory or on the device -> features and the quantised answers of ``tasks``.

        Bit-identical for any n, any grouping of tiles into calls and any number of threads on one kind of device.
        """
        if pixels.ndim != 4 or pixels.shape[3] != 3 or str(pixels.dtype) not in ("uint8", "torch.uint8"):
            raise ModelError(f"tiles must be uint8[n, s, s, 3], not {pixels.dtype}{list(pixels.shape)}")
        self._check(tasks)
        desk = self._desk(pixels.shape[1], tuple(tasks))
        with _Busy(self):
            if len(pixels):
                desk.tuner.saw(len(pixels), lambda sizes: self._agreeing(pixels, desk, sizes))
                answers = self._call(pixels, desk)
            else:
                answers = self._alone(pixels, desk, desk.tuner.size)
        return _sorted(answers, frozenset(self.model.tile_heads))

    def warm_up(self, side: int, tasks: Sequence[str] = ()) -> None:
        """Let each thread build its kernels for tiles of ``side`` px: a quarter of a second that nobody waits for."""
        desk, together = self._desk(side, tuple(tasks)), threading.Barrier(self.threads)
        blank = np.zeros((1, side, side, 3), np.uint8)

        def one(_: int) -> None:
            together.wait()  # one on each thread
            stager = self._stager()
            self._micro(stager.ready(stager.stage([blank], desk.tuner.size)), 1, desk)

        list(self._pool.map(one, range(self.threads)))

    def _check(self, tasks: Sequence[str]) -> None:
        for name in tasks:
            if name not in self.model.heads:
                raise ModelError(f"the model has no task '{name}'; it has: {', '.join(self.model.tasks) or 'none'}")
            if name not in self.quantise:
                raise ModelError(f"Runner was given no quantise for task '{name}'; pass Task.quantise of every task")

    def _desk(self, side: int, tasks: tuple[str, ...]) -> _Desk:
        with self._lock:
            if (side, tasks) not in self._desks:
                card = self.model.card.model_dump(mode="json", include={"encoder", "decoder", "tasks"})
                facts = {"encoder": self.model.card.encoder.name, "tile": side, "threads": self.threads}
                facts |= {**versions(self.runtime), "runtime": self.runtime}
                key = case_key(**facts, card=card, tasks=tasks) if self._tune else ""
                self._desks[side, tasks] = _Desk(tasks, Tuner(self.micro_batch(side), key, facts, self._cache))
            return self._desks[side, tasks]

    def _call(self, pixels: U8 | Tensor, desk: _Desk) -> Answers:
        """Leave the tiles to the lanes, which are threads that work until nothing waits, and wait for the answers."""
        call = Call(pixels)
        desk.waiting.add(call)
        for _ in range(min(self.threads, -(-len(pixels) // desk.tuner.size))):
            self._pool.submit(self._lane, desk)
        return call.wait()

    def _lane(self, desk: _Desk) -> None:
        def taken() -> Iterator[Packet]:
            while (packet := desk.waiting.take(desk.tuner.pick)).count:
                yield packet

        stager = self._stager()
        staged = staged_ahead(taken(), lambda p: self._staged(p, desk), stager, ahead=self.device.type == "cuda")
        for packet, tiles in staged:
            if len(tiles) == 0:
                continue  # failed as it was staged
            try:
                desk.waiting.give(packet.pieces, self._micro(tiles, packet.count, desk))
            except BaseException as error:  # noqa: BLE001  (whoever waits for these tiles raises it)
                desk.waiting.fail(packet.pieces, error)

    def _staged(self, packet: Packet, desk: _Desk) -> Tensor:
        """The tiles of a packet on the device; no tile when that failed, which its calls raise."""
        try:
            return self._stager().stage([piece.pixels for piece in packet.pieces], packet.size)
        except BaseException as error:  # noqa: BLE001  (whoever waits for these tiles raises it)
            desk.waiting.fail(packet.pieces, error)
            return torch.empty(0, device=self.device)

    def _micro(self, tiles: Tensor, count: int, desk: _Desk) -> Answers:
        """One padded micro-batch; the padding's answers are cut off again. "" holds the features."""
        began = time.thread_time()
        with torch.inference_mode():
            vector, logits = self._pass(tiles, desk.tasks)
            answers = {"": vector.float()} | {name: self.quantise[name](x.float()) for name, x in logits.items()}
            found = {name: x[:count].contiguous().cpu().numpy() for name, x in answers.items()}
        if count == len(tiles):
            desk.tuner.took(count, time.thread_time() - began)
        return found

    def _alone(self, pixels: U8 | Tensor, desk: _Desk, size: int) -> Answers:
        """These tiles in micro-batches of their own, of ``size`` tiles."""

        def one(first: int) -> Answers:
            part = pixels[first : first + size]
            return self._micro(self._stager().ready(self._stager().stage([part], size)), len(part), desk)

        parts = list(self._pool.map(one, range(0, max(1, len(pixels)), size)))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _stager(self) -> Stager:
        if not hasattr(self._stagers, "one"):
            self._stagers.one = Stager(self.device)
        stager: Stager = self._stagers.one
        return stager

    def _agreeing(self, pixels: U8 | Tensor, desk: _Desk, sizes: Sequence[int]) -> list[int]:
        """Those of ``sizes`` that give the very bits of the standard size on some of these tiles."""
        few = pixels[: 2 * desk.tuner.standard]
        wanted = self._alone(few, desk, desk.tuner.standard)

        def same(size: int) -> bool:
            found = self._alone(few, desk, size)
            return all(np.array_equal(found[name], wanted[name]) for name in wanted)

        return [size for size in sizes if same(size)]

    def facts(self) -> dict[str, Any]:
        """What was chosen, for reports: runtime and tolerance, norms, micro-batch per tile size, threads, memory."""
        with self._lock:
            sizes = {
                f"{side} px": f"{desk.tuner.size} tiles ({desk.tuner.chosen})"
                for (side, _), desk in sorted(self._desks.items())
            }
        return {
            "device": str(self.device), "runtime": self.runtime, "tolerance": RUNTIMES[self.runtime],
            "norms": self._norms, "micro_batch": sizes, "threads": self.threads, "memory": "channels_last",
        }  # fmt: skip

    def busy(self) -> list[tuple[float, float]]:
        """Intervals (start, end; time.perf_counter) in which the model was running, merged, oldest first."""
        with self._lock:
            running = [(self._since, time.perf_counter())] if self._running else []
            return [*self._busy, *running]

    def busy_seconds(self, since: float = 0.0) -> float:
        """Seconds after ``since`` (time.perf_counter) in which the model was running, overlaps counted once."""
        return sum(max(0.0, end - max(start, since)) for start, end in self.busy())

    def close(self) -> None:
        """Let the threads go; the runner cannot be used afterwards."""
        self._pool.shutdown()


class _Busy:
    """While any of these is entered the runner counts as busy."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def __enter__(self) -> None:
        r = self.runner
        with r._lock:
            if r._running == 0:
                r._since = time.perf_counter()
            r._running += 1

    def __exit__(self, *_: object) -> None:
        r = self.runner
        with r._lock:
            r._running -= 1
            if r._running == 0:
                r._busy.append((r._since, time.perf_counter()))


def pick_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda", "cuda:1", "mps" -> device. ModelError if this machine has no such thing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"the device '{name}' cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _one_thread() -> None:
    """Intra-op threads are a setting of the calling thread (OpenMP): one each."""
    torch.set_num_threads(1)


def _sorted(answers: Answers, tile: frozenset[str]) -> RunOutput:
    rest = {name: values for name, values in answers.items() if name}
    maps = {name: values for name, values in rest.items() if name not in tile}
    return RunOutput(answers[""], maps, {name: values for name, values in rest.items() if name in tile})
