"""How fast an encoder is when its pixels are there already: one resident batch, again and again, in this process.

    python encoder_limit.py ENCODER CASE [--seconds 4] [--size 256]

Cases (float32 all): ``plain`` batch 64 as torch runs it; ``kept`` the same with freed memory kept; ``channels_last``
that with channels last; ``folded`` norms folded, several micro-batches, a thread per core of one intra-op thread;
``compile`` that through torch.compile with frozen weights;
``onnx`` that through ONNX Runtime. Prints one JSON line: the best rate and what gave it.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from wsi_mmm.host_tuning import keep_memory
from wsi_mmm.model.checkpoint import load_encoder
from wsi_mmm.model.fold import fold_norms
from wsi_mmm.model.runner import forward_pass

CORES = len(os.sched_getaffinity(0))


def rate(work: Callable[[Any], Any], make: Callable[[], Any], *, tiles: int, threads: int, seconds: float) -> float:
    """Tiles/s of ``threads`` threads that do nothing but ``work``, each on a batch of its own."""
    done = [0] * threads
    ready, stop = threading.Barrier(threads + 1), threading.Event()

    def lane(number: int) -> None:
        torch.set_num_threads(max(1, CORES // threads))
        batch = make()
        with torch.inference_mode():
            for _ in range(2):
                work(batch)
            ready.wait()
            while not stop.is_set():
                work(batch)
                done[number] += tiles

    workers = [threading.Thread(target=lane, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    ready.wait()
    begin = time.perf_counter()
    time.sleep(seconds)
    stop.set()
    for worker in workers:
        worker.join()
    return sum(done) / (time.perf_counter() - begin)


def cases(case: str, encoder: str, size: int) -> list[tuple[str, Callable[[Any], Any], Callable[[], Any], int, int]]:
    """(words, work, make, tiles per batch, threads) of a case."""
    model = load_encoder(encoder, "random")

    def pixels(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)

    if case in ("plain", "kept", "channels_last"):
        layout = torch.channels_last if case == "channels_last" else torch.contiguous_format
        model.to(memory_format=layout)
        batch = model.prepare(pixels(64)).contiguous(memory_format=layout)
        return [(f"batch 64, {CORES} intra-op threads", model.features, lambda: batch, 64, 1)]
    lean, _ = fold_norms(model)
    run = forward_pass(lean, case if case in ("compile", "onnx") else "eager", torch.device("cpu"))
    found = []
    for count in (8,) if case == "compile" else (4, 8, 16, 32):
        words = f"batch {count}, {CORES} threads"
        found.append((words, lambda x: run(x, ()), lambda count=count: pixels(count), count, CORES))
        if case == "folded":
            found.append(
                (
                    words + ", floats",
                    lean.features,
                    lambda count=count: lean.prepare(pixels(count)),
                    count,
                    CORES,
                )
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder")
    parser.add_argument("case", choices=["plain", "kept", "channels_last", "folded", "compile", "onnx"])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--size", type=int, default=256)
    given = parser.parse_args()
    if given.case != "plain":
        keep_memory()
    torch.set_num_threads(CORES)
    todo = cases(given.case, given.encoder, given.size)

    def timed(number: int, seconds: float) -> float:
        _, work, make, tiles, threads = todo[number]
        return rate(work, make, tiles=tiles, threads=threads, seconds=seconds)

    quick = {number: timed(number, 0.6) for number in range(len(todo))} if len(todo) > 1 else {0: 0.0}
    best = max(quick, key=lambda number: quick[number])
    print(json.dumps({"case": given.case, "tiles_per_s": timed(best, given.seconds), "how": todo[best][0]}))


if __name__ == "__main__":
    main()
