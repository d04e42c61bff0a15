"""Ranks: several processes that do one training together and give the result of a single one.

Each rank computes its share of the micro-batches of a step (maybe none); the results are summed, so nothing depends on
which rank did what. Small numbers that all ranks need go over gloo, which notices at once when a process has ended (its
sockets close); a process that hangs is given up after ``wait`` seconds. Tensors on a GPU go over NCCL.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # defaults of its functions keep the group of its first import: none yet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wsi_mmm.errors import ClusterError, ModelError

T = TypeVar("T")
_CPU = torch.device("cpu")
_BUCKET = 25 << 20  # bytes that travel together
_TEXT = 400  # bytes of a message that one rank tells all


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among ``world`` ranks: its number, its device, and the seconds after which a silent one is given
    up."""

    rank: int = 0
    world: int = 1
    device: torch.device = _CPU
    wait: float = 120.0

    @property
    def first(self) -> bool:
        """True for the rank that writes files and logs."""
        return self.rank == 0


ALONE = Ranks()


@dataclass(frozen=True, slots=True)
class Meeting:
    """The meeting point of ranks that torchrun did not start: rank 0's host and port, this one's number, how many there
    are."""

    host: str
    port: int
    rank: int
    world: int


@contextlib.contextmanager
def joined(device: str = "auto", *, wait: float = 120.0, meeting: Meeting | None = None) -> Iterator[Ranks]:
    """The ranks that torchrun started (env://) or that meet at ``meeting``; without either, this process alone.

    Leaving, also by an error, closes the connections: that is how the other ranks learn of it. It ends the threads that
    serve them, too, if nobody else keeps the group: one that works while Python ends aborts the process. ClusterError.
    """
    if meeting is None and not dist.is_torchelastic_launched():
        yield Ranks(device=_rank_device(device, 0), wait=wait)
        return
    where = _rank_device(device, -1)
    found: dict[str, Any] = {}  # torchrun's ranks find each other by the environment
    if meeting is not None:
        address = f"tcp://{meeting.host}:{meeting.port}"
        found = {"init_method": address, "rank": meeting.rank, "world_size": meeting.world}
    with _translate_errors("ranks cannot meet; check that all were started and reach rank 0's host"):
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=wait), **found)
    try:
        local = dist.get_node_local_rank(fallback_rank=0) if meeting is None else 0
        yield Ranks(dist.get_rank(), dist.get_world_size(), _rank_device(device, local), wait)
    finally:
        # Not a barrier: a rank that fails must not wait for those that wait for it.
        dist.destroy_process_group()


def _rank_device(name: str, local: int) -> torch.device:
    """``local`` -1 asks for the kind only; a GPU is chosen by the rank's number on its machine."""
    if name != "auto":
        return torch.device(name)
    if not torch.cuda.is_available():
        return _CPU
    if local < 0:
        return torch.device("cuda")
    device = torch.device("cuda", local % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def _translate_errors(what: str) -> Iterator[None]:
    """Errors of torch.distributed (all of them RuntimeErrors) in one line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise ClusterError(what) from error


def _rank_lost(ranks: Ranks) -> contextlib.AbstractContextManager[None]:
    return _translate_errors(
        f"rank {ranks.rank} of {ranks.world}: another rank has ended or was silent for {ranks.wait:g} s; its own "
        "message says why; start all ranks again to go on from the latest checkpoint"
    )


# ------------------------------------------------------------------------------------------- what all must know
def total(ranks: Ranks, values: Sequence[float]) -> list[float]:
    """The sums of ``values`` (as many on every rank) over the ranks, in float64; every rank gets the same bits."""
    if ranks.world == 1:
        return [float(v) for v in values]
    sums = torch.tensor(values, dtype=torch.float64)
    with _rank_lost(ranks):
        dist.all_reduce(sums)
    found: list[float] = sums.tolist()
    return found


def wait_for_first(ranks: Ranks) -> None:
    """Let the other ranks wait until rank 0 calls this, too: it may take long, but must call ``total(ranks, [1.0])``
    from time to time, which says that it is alive."""
    while total(ranks, [0.0])[0] and not ranks.first:
        pass


def first_message(ranks: Ranks, text: str) -> str:
    """The message of the lowest rank that has one ("": none); at most 400 bytes. Every rank must call it."""
    if ranks.world == 1:
        return text
    line = text.encode()[:_TEXT].ljust(_TEXT, b"\0")
    mine = torch.frombuffer(bytearray(line), dtype=torch.uint8)
    found = [torch.empty_like(mine) for _ in range(ranks.world)]
    with _rank_lost(ranks):
        dist.all_gather(found, mine)
    said = (bytes(one.tolist()).rstrip(b"\0").decode(errors="ignore") for one in found)
    return next((one for one in said if one), "")


# ------------------------------------------------------------------------------------------- large tensors
def add(ranks: Ranks, tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks, in place, in flat buckets. Same list of shapes on every rank."""
    if ranks.world == 1:
        return
    for bucket in _iter_buckets(tensors):
        with _rank_lost(ranks):
            _run_collective(bucket, dist.all_reduce)


def add_gradients(ranks: Ranks, parameters: Sequence[Tensor]) -> None:
    """Sum the gradients over the ranks. A parameter that no rank has a gradient for keeps None, so that an optimiser
    leaves it alone as it would in one process; one that some rank has a gradient for gets one everywhere."""
    if ranks.world == 1:
        return
    there = total(ranks, [float(p.grad is not None) for p in parameters])
    for p, count in zip(parameters, there, strict=True):
        if count and p.grad is None:
            p.grad = torch.zeros_like(p)
    add(ranks, [p.grad for p in parameters if p.grad is not None])


def spread(ranks: Ranks, tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
    """Give every rank the owners' values of ``tensors``, in place."""
    if ranks.world == 1:
        return
    for owner in range(ranks.world):
        own = [t for t, o in zip(tensors, owners, strict=True) if o == owner]
        for bucket in _iter_buckets(own):
            with _rank_lost(ranks):
                _run_collective(bucket, partial(dist.broadcast, src=owner))


def _run_collective(bucket: Sequence[Tensor], collective: Callable[[Tensor], Any]) -> None:
    flat = torch.cat([t.detach().reshape(-1) for t in bucket])
    collective(flat)
    with torch.no_grad():
        for tensor, part in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _iter_buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, up to `_BUCKET` bytes together (a larger tensor alone)."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        more = tensor.numel() * tensor.element_size()
        if bucket and (size + more > _BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += more
    if bucket:
        yield bucket


def owners(sizes: Sequence[int], world: int) -> list[int]:
    """Assign the optimiser's state of each parameter to a rank: the largest first, each to the rank that has least."""
    load, found = [0] * world, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        found[index] = min(range(world), key=lambda r: (load[r], r))
        load[found[index]] += sizes[index]
    return found


# ------------------------------------------------------------------------------------------- batch norms
@dataclass(frozen=True, slots=True)
class _Seen:
    """One pass of a layer: the number of its micro-batch, and m times the statistics found in it."""

    place: int
    mean: Tensor
    var: Tensor


class Norms:
    """A model's batch norms during a step: `begin`, forward passes with ``place`` set, then `settle` or `drop`. Their
    running statistics become the same whichever rank does which micro-batch.

    A batch norm that sees micro-batches 1 .. B in turn ends with r' = (1 - m)^B r + sum of m (1 - m)^(B - i) s_i:
    linear in the statistics s_i of each. So every rank finds the terms of its own micro-batches, the terms are added
    over the ranks, and the result is that of one process up to rounding. Layers that only some micro-batches pass
    (decoders, heads) count only those. In a single process the layers do it themselves; only the way back is kept.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.place = 0
        self.ranks = ranks
        self._layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self._seen: list[list[_Seen]] = [[] for _ in self._layers]
        self._before: list[tuple[Tensor, ...]] = []
        self._hooks: list[Any] = []
        for index, layer in enumerate(self._layers if ranks.world > 1 else ()):
            if layer.momentum is None:
                raise ModelError("batch norms without momentum cannot be trained on several ranks; give them one")
            self._hooks.append(layer.register_forward_pre_hook(_reset_statistics))
            self._hooks.append(layer.register_forward_hook(self._record_pass(index)))

    def _record_pass(self, index: int) -> Any:
        def record(layer: _BatchNorm, *_: object) -> None:
            if layer.training:
                mean, var, _tracked = _layer_statistics(layer)
                self._seen[index].append(_Seen(self.place, mean.clone(), var.clone()))

        return record

    def close(self) -> None:
        """Leave the model as it was found."""
        for hook in self._hooks:
            hook.remove()

    def begin(self) -> None:
        """A step begins."""
        self._before = [tuple(t.clone() for t in _layer_statistics(layer)) for layer in self._layers]
        for seen in self._seen:
            seen.clear()

    @torch.no_grad()
    def drop(self) -> None:
        """The step does not count: back to what was."""
        for layer, before in zip(self._layers, self._before, strict=True):
            for tensor, old in zip(_layer_statistics(layer), before, strict=True):
                tensor.copy_(old)

    @torch.no_grad()
    def settle(self, places: int) -> None:
        """The step counts; it had ``places`` micro-batches on all ranks together."""
        if self.ranks.world == 1:
            return
        counts = self._pass_counts(places)
        sums: list[Tensor] = []
        for layer, seen, passes in zip(self._layers, self._seen, counts, strict=True):
            sums += _local_sums(seen, passes, 1.0 - float(layer.momentum or 0.0), _layer_statistics(layer)[0])
        add(self.ranks, sums)
        for index, (layer, before) in enumerate(zip(self._layers, self._before, strict=True)):
            number = sum(counts[index])
            fade = (1.0 - float(layer.momentum or 0.0)) ** number
            mean, var, tracked = _layer_statistics(layer)
            mean.copy_(before[0] * fade + sums[2 * index])
            var.copy_(before[1] * fade + sums[2 * index + 1])
            tracked.copy_(before[2] + number)

    def _pass_counts(self, places: int) -> list[list[int]]:
        """[layer][place]: how often the layer was passed in that micro-batch, whoever did it."""
        flat = [float(sum(s.place == place for s in seen)) for seen in self._seen for place in range(places)]
        found = total(self.ranks, flat)
        return [[int(v) for v in found[i * places : (i + 1) * places]] for i in range(len(self._layers))]


def _local_sums(seen: list[_Seen], passes: list[int], keep: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of the sums of mean and variance."""
    mean, var = torch.zeros_like(like), torch.zeros_like(like)
    for number, one in enumerate(seen):
        later = sum(passes[one.place + 1 :]) + sum(s.place == one.place for s in seen[number + 1 :])
        mean.add_(one.mean, alpha=keep**later)
        var.add_(one.var, alpha=keep**later)
    return mean, var


def _reset_statistics(layer: nn.Module, _: object) -> None:
    """From zero, a pass leaves m times what it found."""
    if layer.training and isinstance(layer, _BatchNorm):
        mean, var, _tracked = _layer_statistics(layer)
        # By ``data``: the graphs of earlier batches hold these buffers, though their backward does not read them.
        mean.data.zero_()
        var.data.zero_()


def _layer_statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    mean, var, tracked = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if mean is None or var is None or tracked is None:
        raise ModelError("a batch norm without running statistics cannot be trained on several ranks")
    return mean, var, tracked


# ------------------------------------------------------------------------------------------- ranks on a Dask cluster
def launch_on_dask(client: Any, train: Callable[[Ranks], T], *, device: str = "auto", wait: float = 120.0) -> list[T]:
    """Run ``train(ranks)`` once on every worker of a Dask ``client``, as ranks that know each other; results by rank.

    ``client`` is a client of distributed, ``train`` something that it can pickle. Workers must be processes of their
    own and able to reach the first one's host. When a rank fails, the others are told to stop and its error is raised;
    a worker that dies fails the others within ``wait`` seconds.
    """
    workers = list(client.nthreads())
    if not workers:
        raise ClusterError("the Dask cluster has no workers; start some, one for each rank")
    host = urlsplit(workers[0]).hostname or "127.0.0.1"
    port = client.submit(_free_port, workers=[workers[0]], pure=False).result()
    futures = []
    for rank, worker in enumerate(workers):
        meeting = Meeting(host, port, rank, len(workers))
        options = {"workers": [worker], "allow_other_workers": False, "pure": False, "retries": 0}
        futures.append(client.submit(_rank_of_dask, train, meeting, device, wait, **options))
    _until_done(client, futures, wait)
    return [future.result() for future in futures]


def _rank_of_dask(train: Callable[[Ranks], T], meeting: Meeting, device: str, wait: float) -> T:
    with joined(device, wait=wait, meeting=meeting) as ranks:
        return train(ranks)


def _free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def _until_done(client: Any, futures: Sequence[Any], wait: float) -> None:
    """Until all ranks are done, or one fails: then the others have ``wait`` seconds to say why they fail, too."""
    while not all(future.done() for future in futures):
        if any(future.status in ("error", "cancelled", "lost") for future in futures):
            break
        time.sleep(0.1)
    errors = [future.exception() for future in futures if future.done() and future.status == "error"]
    if not errors:
        return
    end = time.monotonic() + wait
    while not all(future.done() for future in futures) and time.monotonic() < end:
        time.sleep(0.1)
    client.cancel(list(futures))
    # What a rank says of the others tells less than what went wrong itself.
    raise min(errors, key=lambda error: isinstance(error, ClusterError))
