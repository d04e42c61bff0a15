"""A cluster in which everything goes wrong gives the bytes of a quiet run, and does hardly anything twice.

    make bench-chaos ARGS="--slides a.svs b.svs --synthetic 28"

Slides, cache and results lie in a bucket. The quiet run is one process; the other runs on plain `dask worker` processes
with nannies: a worker is killed with -9 every ``--every`` seconds, a share of the S3 requests fails (503, connections
reset, bodies cut off, stalls), and the scheduler is killed once and the command given again. The S3 server is the one
that the AWS variables name (``deploy/services/with.sh make bench-chaos``), or a stand-in in this process.

Bars: every file of every slide is the same, none is missing, none is left over; units redone are at most 5 % more than
the kills and the restart explain.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.chaos_tally import Tally, doings, tally
from helpers.cluster import PlainCluster, kill, wait_until
from helpers.faulty import Faulty
from helpers.moto import moto_server

HERE = Path(__file__).parent
KINDS = ("503", "reset", "truncated", "stall")
METHODS = ("GET", "PUT", "HEAD", "DELETE", "POST")
STALL = 3.0  # seconds
TRIES = 4  # of the command, after the scheduler has been killed


@dataclass(frozen=True)
class Plan:
    """What is to go wrong."""

    workers: int = 3
    threads: int = 2
    every: float = 20.0  # seconds between kills
    kills: int = 1000  # at most
    share: float = 0.05
    restart: bool = True
    seed: int = 0
    block_tiles: int = 2
    size: tuple[int, int] = (1536, 1152)  # of made-up slides, px


@dataclass
class Outcome:
    """What came of it. ``runs``: exit codes of the command, the last one after which it was not given again."""

    slides: int
    files: int = 0
    quiet_s: float = 0.0
    seconds: float = 0.0
    kills: int = 0
    restarts: int = 0
    requests: int = 0
    faults: int = 0
    runs: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # files that differ, are missing or are left over
    units: Tally = field(default_factory=Tally)

    def failures(self) -> list[str]:
        """Which bars do not hold."""
        found = [f"{name}" for name in self.wrong[:20]]
        if self.runs[-1:] != [0]:
            found.append(f"the command ended with {self.runs}")
        if not self.units.holds:
            found.append(f"{self.units.redone} units redone, {self.units.explained} explained: {self.units.odd[:10]}")
        return found


@dataclass
class Storm:
    """Kills workers that have begun, every now and then, until ``over``. ``killed``: when, by process id."""

    log: Path
    plan: Plan
    killed: dict[int, float] = field(default_factory=dict)
    over: threading.Event = field(default_factory=threading.Event)
    count: int = 0

    def blow(self) -> None:
        """Until over."""
        chosen = random.Random(self.plan.seed)
        while self.count < self.plan.kills and not self.over.wait(self.plan.every):
            if alive := self.alive():
                self.kill(chosen.choice(alive))
                self.count += 1

    def alive(self) -> list[int]:
        """Workers that have said that they are there, and were not killed."""
        started = {line["pid"] for line in lines_of(self.log) if line["what"] == "start"}
        return sorted(pid for pid in started - self.killed.keys() if psutil.pid_exists(pid))

    def kill(self, pid: int) -> None:
        """With -9, and remember when."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
            self.killed[pid] = time.time()


def lines_of(log: Path) -> list[dict[str, object]]:
    """What workers said so far."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


# ---------------------------------------------------------------- the bucket


@contextlib.contextmanager
def bucket() -> Iterator[tuple[str, str]]:
    """A new bucket: its server's address and its URI; the environment of this process knows how to reach it."""
    import boto3

    with contextlib.ExitStack() as stack:
        upstream = os.environ.get("AWS_ENDPOINT_URL") or stack.enter_context(moto_server())
        names = {"ACCESS_KEY_ID": "testing", "SECRET_ACCESS_KEY": "testing", "REGION": "us-east-1"}
        os.environ.update({f"AWS_{k}": os.environ.get(f"AWS_{k}", value) for k, value in names.items()})
        os.environ["AWS_ENDPOINT_URL"] = upstream
        name = f"wsi-mmm-{uuid.uuid4().hex[:12]}"
        boto3.client("s3", region_name=os.environ["AWS_REGION"]).create_bucket(Bucket=name)
        yield upstream, f"s3://{name}"


def put(slides: Sequence[Path], synthetic: int, size: tuple[int, int], folder: Path, place: str) -> int:
    """Slides into the bucket, made-up ones of so many px among them; how many there are."""
    from wsi_mmm.slides.fake import synthetic_slide
    from wsi_mmm.storage import store

    for number in range(synthetic):
        path = folder / f"made-up-{number:02d}.tiff"
        synthetic_slide(path, seed=number, width=size[0], height=size[1], nuclei=size[0] * size[1] // 15_000)
        store.write_bytes(f"{place}/{path.name}", path.read_bytes())
    for path in slides:
        store.write_bytes(f"{place}/{path.name}", path.read_bytes())
    return synthetic + len(slides)


def digests(place: str) -> dict[str, str]:
    """Hashes of all objects of slides below ``place``, by name, but for reports, which say what it cost."""
    from wsi_mmm.storage import store

    names = [uri.removeprefix(f"{place}/") for uri in store.list_uris(place)]
    kept = [name for name in names if "/" in name and not name.endswith("/report.json")]
    return {name: hashlib.sha256(store.read_bytes(f"{place}/{name}")).hexdigest() for name in kept}


def differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Objects that are not the same, in words."""
    return [
        *(f"{name} is missing" for name in sorted(wanted.keys() - found.keys())),
        *(f"{name} is left over" for name in sorted(found.keys() - wanted.keys())),
        *(f"{name} differs" for name in sorted(wanted.keys() & found.keys()) if wanted[name] != found[name]),
    ]


# ---------------------------------------------------------------- the runs


RUN = """
import sys, wsi_mmm
from wsi_mmm.errors import WsiError
source, target, blocks, scheduler = sys.argv[1:]
try:
    report = wsi_mmm.run(source, output=target, block_tiles=int(blocks), scheduler=scheduler or None)
except WsiError as error:
    sys.exit(f"error: {error}")
print(*(f"{row.id}: {row.error}" for row in report.slides if row.error), sep="\\n")
sys.exit(report.exit_code)
"""


def command(source: str, target: str, plan: Plan, scheduler: str = "") -> list[str]:
    """What `wsi-mmm run` does, with blocks of a size of which small slides have several."""
    return [sys.executable, "-c", RUN, source, target, str(plan.block_tiles), scheduler]


def quiet(source: str, target: str, plan: Plan) -> float:
    """The run that everything is compared with; seconds."""
    begun = time.monotonic()
    done = subprocess.run(command(source, target, plan), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: the quiet run failed: {done.stderr[-2000:]}")
    return time.monotonic() - begun


def stormy(source: str, target: str, plan: Plan, folder: Path, outcome: Outcome) -> None:
    """The same in a storm; what happened is added to ``outcome``."""
    log, restarts = folder / "units.jsonl", []
    with Faulty(os.environ["AWS_ENDPOINT_URL"], share=plan.share, kinds=KINDS, methods=METHODS, stall=STALL) as front:
        env = {"AWS_ENDPOINT_URL": front.url, "CHAOS_LOG": str(log)}
        options = ["--preload", str(HERE / "chaos_log.py")]
        storm = Storm(log, plan)
        with PlainCluster(folder, plan.workers, plan.threads, options=options, env=env) as cluster:
            words = command(source, target, plan, cluster.address)
            thread = threading.Thread(target=storm.blow, daemon=True)
            thread.start()
            begun = time.monotonic()
            try:
                for number in range(TRIES):
                    with (folder / f"run-{number}.log").open("wb") as out:
                        running = subprocess.Popen(words, stdout=out, stderr=out, env={**os.environ, **env})
                        if plan.restart and not restarts:
                            wait_until(lambda: well_begun(log, outcome.slides), "a third of the slides", 3600)
                            restarts.append(restart(cluster, storm, plan))
                        outcome.runs.append(running.wait())
                    if not outcome.runs[-1]:
                        break
            finally:
                storm.over.set()
                thread.join()
            outcome.seconds = time.monotonic() - begun
        outcome.requests, outcome.faults = front.requests, front.faults
    outcome.kills, outcome.restarts = storm.count, len(restarts)
    outcome.units = tally(doings(line for line in lines_of(log) if line["name"]), storm.killed, restarts)


def well_begun(log: Path, slides: int) -> bool:
    """A third of the slides are done."""
    done = {line["name"] for line in lines_of(log) if line["what"] == "ok" and "/publish/" in str(line["name"])}
    return len(done) >= max(1, slides // 3)


def restart(cluster: PlainCluster, storm: Storm, plan: Plan) -> float:
    """The scheduler dies, with it its workers, as when a node is gone; all of them are started again. When it was."""
    moment = time.time()
    kill(cluster.scheduler.pid)
    cluster.scheduler.wait(20)  # else its port answers once more, and the next one cannot have it
    for process in cluster.processes[1:]:
        for pid in [child.pid for child in family(process.pid)]:
            if pid in storm.alive():
                storm.kill(pid)
        kill(process.pid)
    cluster.scheduler = cluster.start_scheduler()
    for _ in range(plan.workers):
        cluster.add_worker(*cluster.options)
    with cluster.client() as client:
        client.wait_for_workers(plan.workers, timeout=300)
    return moment


def family(pid: int) -> list[psutil.Process]:
    """Processes below one; none when it is gone."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def chaos(slides: Sequence[Path], synthetic: int, plan: Plan, folder: Path) -> Outcome:
    """The whole of it."""
    with bucket() as (_, place):
        outcome = Outcome(put(slides, synthetic, plan.size, folder, f"{place}/in"))
        outcome.quiet_s = quiet(f"{place}/in", f"{place}/quiet", plan)
        stormy(f"{place}/in", f"{place}/out", plan, folder, outcome)
        wanted, found = digests(f"{place}/quiet"), digests(f"{place}/out")
        outcome.files, outcome.wrong = len(wanted), differences(wanted, found)
    return outcome


def table(outcome: Outcome) -> str:
    """For people, and for docs/scaling.md."""
    units = outcome.units
    again = ", ".join(f"{count} {reason}" for reason, count in sorted(units.again.items())) or "none"
    rows = {
        "slides, files compared": f"{outcome.slides}, {outcome.files}",
        "quiet run, s": f"{outcome.quiet_s:.0f}",
        "in the storm, s": f"{outcome.seconds:.0f}",
        "workers killed": outcome.kills,
        "scheduler restarted": outcome.restarts,
        "S3 requests, failed": f"{outcome.requests:,}, {outcome.faults:,}",
        "exit codes of the command": ", ".join(map(str, outcome.runs)),
        "units": units.done,
        "units redone, by reason": f"{units.redone}: {again}",
        "files that differ": len(outcome.wrong),
    }
    return "| what | figure |\n|---|--:|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=Path, nargs="*", default=[], help="small real slides")
    parser.add_argument("--synthetic", type=int, help="made-up ones (30 less the real ones)")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between kills (20)")
    parser.add_argument("--share", type=float, default=0.05, help="of the S3 requests that fail (0.05)")
    parser.add_argument("--no-restart", action="store_true", help="leave the scheduler alone")
    parser.add_argument("--keep", type=Path, help="folder for logs, which then stay")
    given = parser.parse_args()
    synthetic = max(0, 30 - len(given.slides)) if given.synthetic is None else given.synthetic
    plan = Plan(given.workers, every=given.every, share=given.share, restart=not given.no_restart)
    with contextlib.ExitStack() as stack:
        folder = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        outcome = chaos(given.slides, synthetic, plan, folder)
    print(table(outcome))
    if wrong := outcome.failures():
        sys.exit("\n".join(f"bar: {reason}" for reason in wrong))


if __name__ == "__main__":
    main()
