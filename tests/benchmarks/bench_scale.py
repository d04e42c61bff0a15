"""The street, the Dask executor and a real scheduler under many workers whose units only take time.

    make bench-scale ARGS="--slides 100,1000"                  growth in n
    make bench-scale ARGS="--slides 100 --workers 1,4,16,64"   throughput against workers
    make bench-scale ARGS="--slides 10000"                     a million units: bar 2

A slide comes to 100 units on average. The scheduler is a plain `dask scheduler`; the client is this process and does
what `wsi-mmm run --scheduler` does, the report included; the workers are real ones, many in one process, and what they
cost is not counted. Durations are those of measured units (`scale_record`) divided by ``--speed``. CPU is user and
system time of a process from its `/proc`, so it holds on a busy machine, too; wall time and units/s do not.

Bars: the scheduler stays below 2 GB; the client grows by no more than its report (``--row-kb`` a slide); client and
scheduler together take less than 1 ms of CPU a unit; and no more a unit at the largest n than 1.3 times the smallest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil

from benchmarks.scale_units import FILE, KINDS, Durations, durations, recipe, slides
from helpers.processes import running, wait_for
from wsi_mmm.engine.events import Event
from wsi_mmm.engine.executors.dask import DaskExecutor, client_of
from wsi_mmm.engine.run import RunRequest, run_slides
from wsi_mmm.options import RunOptions

HERE = Path(__file__).parent
EVERY = 0.5  # seconds between samples of memory
BAR_MB, BAR_MS, BAR_GROWTH = 2000.0, 1.0, 1.3


@dataclass
class Row:
    """A run. Memory in MB: ``*_first`` when a tenth of the slides were through, ``*_last`` at the end of the works."""

    slides: int
    units: int
    workers: int
    unit_s: float
    seconds: float = 0.0
    report_s: float = 0.0
    client_ms: float = 0.0  # CPU per unit
    scheduler_ms: float = 0.0
    workers_ms: float = 0.0
    scheduler_mb: float = 0.0
    scheduler_first: float = 0.0
    client_first: float = 0.0
    client_last: float = 0.0
    failed: int = 0

    @property
    def rate(self) -> float:
        """Units a second."""
        return self.units / self.seconds

    @property
    def ideal(self) -> float:
        """Units a second if workers never waited."""
        return self.workers / self.unit_s

    @property
    def overhead(self) -> float:
        """CPU of client and scheduler, ms a unit."""
        return self.client_ms + self.scheduler_ms


@dataclass
class Watch:
    """What processes cost while a run goes on. Call it with the run's events."""

    processes: dict[str, psutil.Process]
    tenth: int
    began: dict[str, float] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    slides_ended: float = 0.0
    ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watch:
        self.began = {name: cpu(process) for name, process in self.processes.items()}
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._thread.join()

    def hear(self, event: Event) -> None:
        """Note the memory when a tenth of the slides has ended, and when the last one has."""
        if event.kind == "slide" and event.done in (self.tenth, event.total):
            found = {name: mb(process) for name, process in self.processes.items()}
            self.first = self.first or found
            self.last, self.slides_ended = found, time.perf_counter()

    def spent(self) -> dict[str, float]:
        """CPU seconds since the beginning."""
        return {name: cpu(process) - self.began[name] for name, process in self.processes.items()}

    def _sample(self) -> None:
        while not self.ended.wait(EVERY):
            for name, process in self.processes.items():
                self.peak[name] = max(self.peak.get(name, 0.0), mb(process))


def cpu(process: psutil.Process) -> float:
    """User and system seconds."""
    times = process.cpu_times()
    return float(times.user + times.system)


def mb(process: psutil.Process) -> float:
    """Resident memory."""
    return float(process.memory_info().rss) / 1e6


@contextlib.contextmanager
def cluster(folder: Path, workers: int, speed: float, processes: int) -> Iterator[tuple[str, int, list[int]]]:
    """A scheduler and so many fake workers: its address, its process, theirs."""
    log, facts = folder / "cluster.log", folder / "scheduler.json"
    words = ["dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", facts]
    with contextlib.ExitStack() as stack:
        scheduler = stack.enter_context(running(words, log))
        wait_for(facts.exists, "the start of the scheduler", log)
        address = str(json.loads(facts.read_text())["address"])
        pids = []
        for number in range(min(processes, workers)):
            count = workers // processes + (number < workers % processes)
            program = [sys.executable, HERE / "scale_workers.py", address, str(count), "--speed", str(speed)]
            pids.append(stack.enter_context(running(program, log, env={"PYTHONPATH": str(HERE.parent)})).pid)
        wait_for(
            lambda: log.read_text(errors="replace").count("fake workers are there") >= len(pids),
            "the workers",
            log,
            seconds=300,
        )
        yield address, scheduler.pid, pids


def mean_of(taken: Durations, count: int, units: int) -> float:
    """Seconds of a unit on average: per slide a plan and a publish, the rest forwards and as many interprets."""
    mean = {kind: taken.mean(kind) for kind in KINDS}
    blocks = units / 2 - count
    return (blocks * (mean["forward"] + mean["interpret"]) + count * (mean["plan"] + mean["publish"])) / units


def measure(count: int, workers: int, *, speed: float, processes: int) -> Row:
    """One run in a new cluster."""
    taken = durations(speed)
    with tempfile.TemporaryDirectory() as name, cluster(Path(name), workers, speed, processes) as (address, sid, wids):
        output = f"{name}/out"
        Path(output).mkdir()
        wanted = slides(count, output)
        row = Row(count, wanted.units, workers, mean_of(taken, count, wanted.units))
        request = RunRequest(wanted.tasks, replace(recipe(), options=RunOptions(scheduler=address)), output)
        found = {"client": psutil.Process(), "scheduler": psutil.Process(sid)}
        found |= {f"workers-{number}": psutil.Process(pid) for number, pid in enumerate(wids)}
        with client_of(address) as client:
            client.wait_for_workers(workers)
            executor = DaskExecutor(client)
            with Watch(found, max(1, count // 10)) as watch:
                begun = time.perf_counter()
                report = run_slides(request, executor, watch.hear)
                ended, spent = time.perf_counter(), watch.spent()
        row.failed = sum(one.status != "done" for one in report.slides) + count - len(report.slides)
        row.seconds, row.report_s = watch.slides_ended - begun, ended - watch.slides_ended
        row.client_ms, row.scheduler_ms = (1e3 * spent[one] / row.units for one in ("client", "scheduler"))
        row.workers_ms = 1e3 * sum(s for one, s in spent.items() if one.startswith("workers")) / row.units
        row.scheduler_mb = max(watch.peak["scheduler"], watch.last["scheduler"])
        row.scheduler_first = watch.first["scheduler"]
        row.client_first, row.client_last = watch.first["client"], watch.last["client"]
    return row


def failures(rows: list[Row], row_kb: float) -> list[str]:
    """Which bars do not hold."""
    found = []
    for row in rows:
        if row.failed:
            found.append(f"{row.units:,} units: {row.failed} slides failed")
        if row.scheduler_mb > BAR_MB:
            found.append(f"{row.units:,} units: the scheduler took {row.scheduler_mb:,.0f} MB")
        if row.client_last - row.client_first > 20 + row_kb / 1e3 * row.slides:
            found.append(
                f"{row.units:,} units: the client grew from {row.client_first:,.0f} to {row.client_last:,.0f} MB"
            )
        if row.overhead > BAR_MS:
            found.append(f"{row.units:,} units, {row.workers} workers: {row.overhead:.2f} ms a unit")
    small, large = min(rows, key=lambda row: row.units), max(rows, key=lambda row: row.units)
    if large.units >= 5 * small.units and large.overhead > BAR_GROWTH * small.overhead:
        found.append(f"overhead grows with n: {small.overhead:.2f} ms a unit, then {large.overhead:.2f}")
    return found


HEAD = (
    "| slides | units | workers | mean unit, s | units/s | of ideal | client, ms | scheduler, ms | workers, ms | "
    "scheduler, MB (first tenth) | client, MB (first tenth) | report, s |\n|" + "--:|" * 12
)


def line(row: Row) -> str:
    """A row of the table."""
    return (
        f"| {row.slides:,} | {row.units:,} | {row.workers} | {row.unit_s:.3f} | {row.rate:,.0f} "
        f"| {row.rate / row.ideal:.2f} | {row.client_ms:.3f} | {row.scheduler_ms:.3f} | {row.workers_ms:.3f} "
        f"| {row.scheduler_mb:,.0f} ({row.scheduler_first:,.0f}) | {row.client_last:,.0f} ({row.client_first:,.0f}) "
        f"| {row.report_s:.1f} |"
    )


def numbers(text: str) -> list[int]:
    """Of "1,2,4"."""
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=numbers, default=[100, 1000], help="how many, with commas (100,1000)")
    parser.add_argument("--workers", type=numbers, default=[128], help="how many, with commas (128)")
    parser.add_argument("--speed", type=float, default=20.0, help="times as fast as measured units (20)")
    parser.add_argument("--processes", type=int, default=2, help="that hold the workers (2)")
    parser.add_argument("--row-kb", type=float, default=8.0, help="that the report may keep of a slide (8)")
    parser.add_argument("--json", type=Path, help="file to add the rows to, one a line")
    given = parser.parse_args()
    if not FILE.exists():
        sys.exit("error: no measured units; tests/benchmarks/scale_record.py makes them")
    print(HEAD, flush=True)
    rows = []
    for count in given.slides:
        for workers in given.workers:
            rows.append(measure(count, workers, speed=given.speed, processes=given.processes))
            print(line(rows[-1]), flush=True)
            if given.json:
                with given.json.open("a") as out:
                    out.write(json.dumps(asdict(rows[-1])) + "\n")
    if wrong := failures(rows, given.row_kb):
        sys.exit("\n".join(f"bar: {reason}" for reason in wrong))


if __name__ == "__main__":
    main()
