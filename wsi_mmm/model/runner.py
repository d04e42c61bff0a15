"""Running a model the same way every time: padded batches of one size, one intra-op thread each, quantised answers.

Measured: the number of intra-op threads changes the bits of a convolution; a tile's place in a batch and its companions
do not, as long as the batch has one shape. So tiles are computed in batches of one fixed size, the last padded with
zeros, each on one thread, and several Python threads run side by side (torch releases the GIL).

Tiles of several callers share a batch. Measured on blocks of 64 tiles, many of which hold few at a slide's edge:
padding the last batch of each block costs a tenth of the model's time.

On CUDA the next batch is copied to the device, from pinned memory on a stream of its own, while this one is computed.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wsi_mmm.errors import ModelError, first_line
from wsi_mmm.host_tuning import cpu_count
from wsi_mmm.model.answers import RunOutput as RunOutput
from wsi_mmm.model.checkpoint import pick_device
from wsi_mmm.model.encoder import check_tile
from wsi_mmm.model.fold import fold_norms
from wsi_mmm.model.identity import RUNTIMES, check_runtime, precision_text
from wsi_mmm.model.multitask import ModelPass, MultiTaskModel
from wsi_mmm.model.onnx import onnx_pass
from wsi_mmm.model.tile_queue import Answers, PendingTiles, TileQueue, TileSpan
from wsi_mmm.types import F32, U8

Quantise = Callable[[Tensor], Tensor]

COMPARED = 8  # tiles that are computed in float32 as well, to state how far less precision is from it
_REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PIXELS_CPU = 8 * 256 * 256
_PIXELS_CUDA = 64 * 256 * 256


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
        folded, self._norms = fold_norms(model.eval())  # before it is moved: a GPU rounds too much to compare
        self.model = folded.to(self.device)
        self.runtime = runtime
        self.threads = max(1, threads or cpu_count()) if self.device.type == "cpu" else 1
        self.quantise = dict(quantise or {})
        self._pass = forward_pass(self.model, runtime, self.device, folder=cache)
        self._difference: dict[str, float] | None = None if runtime in _REDUCED else {}
        self._queues: dict[tuple[int, tuple[str, ...]], TileQueue] = {}
        self._lock = threading.Lock()
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pool = start_one_core_threads(self.threads, "model")

    def batch_size(self, side: int) -> int:
        """Tiles of ``side`` px that are computed together."""
        budget = _PIXELS_CPU if self.device.type == "cpu" else _PIXELS_CUDA
        return max(1, budget // (side * side))

    def run(self, pixels: U8, tasks: Sequence[str] = ()) -> RunOutput:
        """Compute tiles uint8[n, s, s, 3]: their features and the quantised answers of ``tasks``.

        Bit-identical for any n, any grouping of tiles and any number of threads on one kind of device.
        """
        return self.finish(self.begin(pixels, tasks), len(pixels))

    def begin(self, pixels: U8, tasks: Sequence[str] = ()) -> PendingTiles:
        """Begin to compute tiles uint8[n, s, s, 3] and return at once; `finish` waits for them.

        So several models that see the same tiles have tiles of many callers waiting, and full batches, all the time.
        """
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
            raise ModelError(f"tiles must be uint8[n, s, s, 3], not {pixels.dtype}{list(pixels.shape)}")
        queue = self._find_queue(pixels.shape[1], tuple(tasks))
        blank = np.zeros((1, *pixels.shape[1:]), np.uint8)  # for the shapes
        pending = queue.add(pixels if len(pixels) else blank)
        for _ in range(min(self.threads, -(-len(pending.pixels) // queue.size))):
            self._pool.submit(self._run_batches, queue)
        return pending

    def finish(self, pending: PendingTiles, count: int) -> RunOutput:
        """Wait for the first ``count`` tiles that `begin` was given; raises what computing them raised."""
        answers = {name: values[:count] for name, values in pending.wait().items()}
        tables = self.model.tile_heads
        return RunOutput(
            answers.pop(""),
            {name: values for name, values in answers.items() if name not in tables},
            {name: values for name, values in answers.items() if name in tables},
        )

    def answer_bag(self, vectors: F32, tasks: Sequence[str]) -> tuple[dict[str, npt.NDArray[Any]], dict[str, F32]]:
        """``vectors`` float32[m, D] of one bag (m > 0) -> quantised answers [K] and attention float32[m], by task.

        ModelError when the bag is too large for the memory or a task is not answered per bag. Always on the CPU, on one
        intra-op thread, in one order of tiles: equal features give equal bits, whatever computes beside (on a GPU sums
        over tiles have no fixed order). Small beside the encoder's pass, and done once: measured on a core, 100,000
        vectors of 1,024 channels through gated attention take 1.7 s and 0.5 GB beside themselves; 8,000 through a
        transformer 2.1 s, and four times as long for twice as many.
        """
        with start_one_core_threads(1, "bag") as pool:
            try:
                return pool.submit(self._answer_bag, vectors, tasks).result()
            except (MemoryError, RuntimeError) as error:
                text = f"the slide's {len(vectors):,} tiles cannot be answered as one bag ({first_line(error)})"
                raise ModelError(f"{text}; use a coarser mpp") from error

    @torch.inference_mode()
    def _answer_bag(self, vectors: F32, tasks: Sequence[str]) -> tuple[dict[str, npt.NDArray[Any]], dict[str, F32]]:
        model = self.model if self.device.type == "cpu" else bag_part(self.model).to("cpu")
        x = torch.from_numpy(np.ascontiguousarray(vectors, np.float32))
        logits, attention = model.bag_logits(x, torch.zeros(len(x), dtype=torch.int64), tuple(tasks))
        check_finite(model.card.name, x, {**logits, **{f"{name} (attention)": attention[name] for name in tasks}})
        answers = {name: self.quantise[name](logits[name].float())[0].numpy() for name in tasks}
        return answers, {name: attention[name].float().numpy() for name in tasks}

    def warm_up(self, side: int, tasks: Sequence[str] = ()) -> None:
        """Let each thread build its kernels for tiles of ``side`` px: a quarter of a second that nobody waits for.

        ModelError when the model does not take such tiles.
        """
        check_tile(self.model.encoder, self.model.card, side)
        queue, together = self._find_queue(side, tuple(tasks)), threading.Barrier(self.threads)
        blank = np.zeros((1, side, side, 3), np.uint8)

        def compute_blank(_: int) -> None:
            together.wait()  # one on each thread
            self._forward_batch(self._await_copy(self._stage_batch([blank], queue.size)), 0, queue.tasks)

        try:
            list(self._pool.map(compute_blank, range(self.threads)))
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError, ValueError) as error:  # what networks say of a size that they do not take
            raise ModelError(
                f"the model {self.model.card.name} cannot take tiles of {side} px ({first_line(error)}): "
                "give another tile_size, or resize them with embed --input-size"
            ) from error

    def describe(self) -> dict[str, Any]:
        """Return the runtime, its tolerance and its difference from float32 (see `compare_vectors`), norms, batch
        size per tile size and threads, for reports."""
        with self._lock:
            sizes = {f"{side} px": f"{queue.size} tiles" for (side, _), queue in sorted(self._queues.items())}
        return {
            "device": str(self.device), "runtime": self.runtime, "tolerance": RUNTIMES[self.runtime],
            "precision": precision_text(self.runtime), "norms": self._norms, "micro_batch": sizes,
            "threads": self.threads, "memory": "channels_last",
            **({"difference": self._difference} if self._difference else {}),
        }  # fmt: skip

    def close(self) -> None:
        """End the threads; the runner cannot be used afterwards."""
        self._pool.shutdown()

    def _find_queue(self, side: int, tasks: tuple[str, ...]) -> TileQueue:
        with self._lock:
            if (side, tasks) not in self._queues:
                for name in self.model.check_tasks(tasks):
                    if name not in self.quantise:
                        raise ModelError(
                            f"Runner was given no quantise for task '{name}'; pass Task.quantise of every task"
                        )
                self._queues[side, tasks] = TileQueue(tasks, self.batch_size(side))
            return self._queues[side, tasks]

    def _run_batches(self, queue: TileQueue) -> None:
        """Compute batches until none waits. On CUDA the next one is copied to the device while this one is computed."""
        coming = self._stage_next(queue)
        while coming is not None:
            spans, staged = coming
            tiles = self._await_copy(staged)
            coming = self._stage_next(queue) if self.device.type == "cuda" else None
            try:
                count = sum(some.stop - some.start for _, some in spans)
                queue.finish(spans, self._forward_batch(tiles, count, queue.tasks))
            except BaseException as error:  # noqa: BLE001  (the callers who wait for these tiles raise it)
                queue.fail(spans, error)
            coming = coming or self._stage_next(queue)

    def _stage_next(self, queue: TileQueue) -> tuple[list[TileSpan], Tensor] | None:
        """Take the next batch and begin to copy it to the device; None when no tile waits."""
        while spans := queue.take_batch():
            try:
                return spans, self._stage_batch([pending.pixels[some] for pending, some in spans], queue.size)
            except BaseException as error:  # noqa: BLE001  (the callers who wait for these tiles raise it)
                queue.fail(spans, error)
        return None

    def _stage_batch(self, parts: Sequence[U8], size: int) -> Tensor:
        """The tiles of ``parts`` one after another and zeros, ``size`` in all, on the way to the device.

        On CUDA the copy may be under way (see `_await_copy`): torch keeps the pinned memory until it is done.
        """
        if self._copies is None and len(parts) == 1 and len(parts[0]) == size:
            only = parts[0]
            if only.flags.c_contiguous and only.flags.writeable:  # torch can read the array where it is
                return torch.from_numpy(only)
        host = torch.empty((size, *parts[0].shape[1:]), dtype=torch.uint8, pin_memory=self._copies is not None)
        count = sum(map(len, parts))
        np.concatenate(parts, out=host.numpy()[:count])
        host[count:] = 0
        if self._copies is None:
            return host
        with torch.cuda.stream(self._copies):
            return host.to(self.device, non_blocking=True)

    def _await_copy(self, staged: Tensor) -> Tensor:
        """Let the current stream wait for the copy of ``staged``, and return it."""
        if self._copies is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._copies)
            staged.record_stream(current)
        return staged

    def _forward_batch(self, tiles: Tensor, count: int, tasks: tuple[str, ...]) -> Answers:
        """Run one padded batch; return the answers of its first ``count`` tiles. ModelError: they are not finite."""
        with torch.inference_mode():
            vector, logits = self._pass(tiles, tasks)
            answers = {"": vector.float()} | {name: self.quantise[name](x.float()) for name, x in logits.items()}
            found = {name: x[:count].contiguous().cpu().numpy() for name, x in answers.items()}
            if count:
                check_finite(self.model.card.name, vector[:count], {name: x[:count] for name, x in logits.items()})
                self._state_difference(tiles[: min(count, COMPARED)], found[""])
            return found

    def _state_difference(self, tiles: Tensor, vectors: F32) -> None:
        """Compute the first tiles of this runner in float32, too, where it computes in less."""
        with self._lock:
            if self._difference is not None:
                return
            self._difference = {}  # one thread does it
        vector, _ = forward_pass(self.model, "eager", self.device)(tiles, ())
        self._difference = compare_vectors(vectors[: len(tiles)], vector.float().cpu().numpy())


def forward_pass(model: MultiTaskModel, runtime: str, device: torch.device, *, folder: Path | None = None) -> ModelPass:
    """The pass of a model by ``runtime``: eager, compiled, in less precision, through ONNX. Numbers differ; the hash
    says so.

    ``folder``: where files that take long to make are kept (ONNX). ModelError if there is no such runtime,
    MissingPackage if it is not installed.
    """
    if runtime not in RUNTIMES:
        raise ModelError(f"there is no runtime '{runtime}'; choose one of: {', '.join(RUNTIMES)}")
    check_runtime(runtime)
    if runtime == "onnx":
        return onnx_pass(model, device, folder)
    network = model.forward_all
    if runtime == "compile":
        network = torch.compile(model.forward_all, dynamic=False, options={"freezing": True})

    def run(pixels: Tensor, tasks: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(device.type, _REDUCED[runtime]) if runtime in _REDUCED else nullcontext():
            return network(model.prepare(pixels), tuple(tasks))

    return run


def compare_vectors(vectors: F32, exact: F32) -> dict[str, float]:
    """How far float[n, D] are from the same in float32: ``tiles`` n, ``cosine`` of the vector that differs most,
    ``largest`` difference of a number as a share of the largest number."""
    one, two = vectors.astype(np.float64), exact.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    cosines = (one * two).sum(axis=1)[lengths > 0] / lengths[lengths > 0]
    largest = np.abs(two).max()
    return {
        "tiles": len(one), "cosine": round(float(cosines.min(initial=1.0)), 7),
        "largest": float(f"{np.abs(one - two).max() / largest if largest else 0.0:.2g}"),
    }  # fmt: skip


def check_finite(model: str, vector: Tensor, logits: Mapping[str, Tensor]) -> None:
    """ModelError naming the first of a batch's tensors that holds NaN or infinity. One reduction each, one wait."""
    parts = {"the feature vectors": vector, **{f"the answers of task '{name}'": x for name, x in logits.items()}}
    ends = torch.stack([end.float() for x in parts.values() for end in x.aminmax()])
    good = ends.isfinite().view(-1, 2).all(1).tolist()
    for name, fine in zip(parts, good, strict=True):
        if not fine:
            why = "its weights are damaged, its training diverged, or numbers overflow in a runtime of less precision"
            raise ModelError(
                f"model '{model}': {name} hold NaN or infinity: {why}; try --runtime eager, or another model"
            )


def bag_part(model: MultiTaskModel) -> MultiTaskModel:
    """A copy of what `bag_logits` needs: the large parts, which it does not run, are left out."""
    needed = ("grouper", "heads")
    left_out = {id(part): nn.Identity() for name, part in model.named_children() if name not in needed}
    return copy.deepcopy(model, memo=dict(left_out))


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
