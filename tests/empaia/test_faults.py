"""Every fault at every stage of a job, through the command that a container runs: how it ends, what is told whom."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from helpers.empaia_platform import FakePlatform, Fault
from wsi_mmm.empaia import app as job
from wsi_mmm.empaia.app import JobEnd
from wsi_mmm.empaia.results import Results, results_at
from wsi_mmm.empaia.transport import Patience
from wsi_mmm.storage import retry

from .conftest import QUICK, Command, Start, posted, run

ALWAYS = 9999
ASKING = {
    "mode": Fault("GET /mode"),
    "slide": Fault("GET /inputs/slide"),
    "regions": Fault("GET /inputs/regions"),
    "slide, again": Fault("GET /inputs/slide", after=1),  # by who reads its pixels
}
READING = {"pixels": Fault("GET /regions"), "later pixels": Fault("GET /regions", after=1)}
POSTING = {
    "collection": Fault("POST /outputs/nuclei_objects"),
    "objects": Fault("POST /collections", after=1),  # the first is of tissue
    "classes": Fault("POST /collections", after=2),
    "numbers": Fault("POST /collections", after=3),
    "text": Fault("POST /outputs/stain_slide_class"),
    "map": Fault("POST /outputs/nuclei_map"),
    "tile": Fault("/data"),
}
FINALIZE = {"finalize": Fault("PUT /finalize")}
READER = ("slide, again", *READING)
STAGES = ASKING | READING | POSTING | FINALIZE
STATUSES = (401, 404, 422, 429, 500, 503)
INTERNALS = re.compile(r"https?:|[/_{}<>\\]|[a-z]Error|Traceback|None|\d{3}|token|JSON|v3|retry|\.py", re.IGNORECASE)


def faults() -> dict[str, Fault]:
    """Each kind of fault at each stage where it can be, for good: by name."""
    found: dict[str, Fault] = {}
    for stage, at in STAGES.items():
        always = replace(at, times=ALWAYS, headers={"Retry-After": "0"})
        found |= {f"{stage}: {status}": replace(always, status=status) for status in STATUSES}
        found |= {f"{stage}: reset": always, f"{stage}: torn": replace(always, torn=True)}
        if stage in POSTING:
            found[f"{stage}: 413"] = replace(always, status=413)
    return found


def soon(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """If the fault of a stage is met by who reads the slide's pixels, the slide is given up soon."""
    if stage in READER:
        monkeypatch.setenv("WSI_MMM_STORAGE_TIMEOUT", "2" if "later" in stage else "1")
        monkeypatch.setattr(retry, "OUTAGE", replace(retry.OUTAGE, seconds=0.1, unproven=0.1))


@pytest.fixture
def nowhere(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> Callable[[FakePlatform, Result], None]:
    """Asserts that a job's token is not in what the app said, logged, told the platform, or wrote."""

    def check(platform: FakePlatform, result: Result) -> None:
        token = platform.job.token
        said = [result.output, caplog.text, platform.message, repr(result.exception), *platform.log]
        assert not any(token in text or token.split(".")[1] in text for text in said)
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert written and not any(token.encode() in path.read_bytes() for path in written)

    return check


def once(platform: FakePlatform) -> None:
    """Nothing was posted twice: no output, no object of a collection; and a finished job was left alone."""
    for items in platform.items.values():
        bare = [json.dumps({k: v for k, v in one.items() if k != "id"}, sort_keys=True) for one in items]
        assert len(set(bare)) == len(bare)
    ends = [i for i, line in enumerate(platform.log) if line in ("PUT /finalize", "PUT /failure")]
    assert all(line in ("PUT /finalize", "PUT /failure") for line in platform.log[ends[0] :])


def failed(platform: FakePlatform, result: Result, *, told: int = 1) -> None:
    """The job ended once, as a failure, and whoever reads its message learns nothing of how the app is built.

    ``told``: how often the platform may have been told.
    """
    assert result.exit_code == 1, result.output
    assert (platform.ends, platform.state) == (["failure"], "FAILED")
    assert 1 <= platform.log.count("PUT /failure") <= told
    message = platform.message
    assert 20 <= len(message) <= 255 and message.endswith(".") and not INTERNALS.search(message), message
    error = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and message in error[0]
    once(platform)


# ------------------------------------------------------------------------------------------------ what stays


@pytest.mark.parametrize("name", faults())
def test_a_fault_that_stays_is_a_failure(
    start: Start,
    half_done: str,
    command: Command,
    nowhere: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Whatever keeps failing wherever: one failure, exit code 1, one line, no token, nothing posted twice."""
    soon(monkeypatch, name.partition(":")[0])
    fault = faults()[name]
    platform = start(faults=[fault])
    work = f"{half_done}-new" if "later" in name else half_done
    result = command("--work", work)
    failed(platform, result)
    nowhere(platform, result)
    assert fault.times < ALWAYS, "it was never met"
    assert platform.log.count("PUT /finalize") <= QUICK.attempts * ("finalize" in name)


@pytest.mark.parametrize("stage", POSTING | FINALIZE)
@pytest.mark.parametrize("torn", [False, True])
def test_answers_that_are_always_lost(
    start: Start, half_done: str, command: Command, nowhere: Callable[..., None], stage: str, torn: bool
) -> None:
    """What was done although nobody said so: objects are found again, an output is asked for once, a job that has ended
    stays as it is."""
    at = (POSTING | FINALIZE)[stage]
    platform = start(faults=[replace(at, times=ALWAYS, done=True, torn=torn)])
    result = command("--work", half_done)
    nowhere(platform, result)
    once(platform)
    if stage in ("objects", "classes", "numbers"):
        assert (result.exit_code, platform.ends) == (0, ["finalize"]) and len(posted(platform, "nuclei_classes")) > 3
    elif stage == "finalize":
        assert (result.exit_code, platform.ends) == (1, ["finalize"]) and "could not be told" in result.output
    else:
        failed(platform, result)
        if at.where.startswith("POST"):
            assert platform.log.count(at.where) == 1


SILENT = {name: at for name, at in STAGES.items() if name not in ("slide", "regions", "classes", "numbers", "text")}


@pytest.mark.parametrize("stage", SILENT)
def test_silence_is_a_failure(
    start: Start, half_done: str, command: Command, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """A platform or a slide service that does not answer any more is given up after the time-out."""
    soon(monkeypatch, stage)
    platform = start(faults=[replace(SILENT[stage], status=200, times=ALWAYS, wait=60.0)])
    work = f"{half_done}-new" if "later" in stage else half_done
    began = time.monotonic()
    result = command("--work", work, patient=Patience(total=0.8, attempts=2, pause=0.01))
    failed(platform, result, told=2)  # where the machine is busy, its answer to the failure may be late, too
    assert time.monotonic() - began < 50


# ------------------------------------------------------------------------------------------------ what passes

AGAIN = ("mode", "slide", "regions", "slide, again", "pixels", "objects", "classes", "numbers", "tile", "finalize")
PASSING = {
    **{f"{stage}: 503": replace(STAGES[stage], status=503, times=2) for stage in AGAIN},
    **{f"{stage}: 429": replace(STAGES[stage], status=429) for stage in STAGES if stage != "later pixels"},
    **{f"{stage}: torn": replace(STAGES[stage], torn=True) for stage in AGAIN},
    **{f"{stage}: reset": STAGES[stage] for stage in ("objects", "tile", "finalize")},
    **{f"{stage}: lost": replace(STAGES[stage], done=True) for stage in ("objects", "numbers", "tile", "finalize")},
    **{f"{stage}: late": replace(STAGES[stage], late=True, wait=0.3, times=2) for stage in ("pixels", "objects")},
    **{f"{stage}: twice": replace(STAGES[stage], twice=True) for stage in ("slide", "pixels", "tile")},
    "objects: 413": replace(STAGES["objects"], status=413),
}
PROGRESS = {
    **{f"progress: {status}": Fault("/progress", status, times=ALWAYS) for status in (*STATUSES, 413)},
    "progress: reset": Fault("/progress", times=ALWAYS),
    "progress: lost": Fault("/progress", times=ALWAYS, done=True),
    "progress: torn": Fault("/progress", times=ALWAYS, torn=True),
    "progress: twice": Fault("/progress", times=ALWAYS, twice=True),
}


@pytest.mark.parametrize("name", PASSING | PROGRESS)
def test_what_passes_is_survived(
    start: Start,
    half_done: str,
    command: Command,
    nowhere: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Faults that pass, lost answers, a slow slide service, and a platform that wants no progress: finalized once, with
    everything, nothing twice."""
    monkeypatch.setattr(retry, "OUTAGE", replace(retry.OUTAGE, pause=0.1))
    fault = replace((PASSING | PROGRESS)[name], headers={"Retry-After": "0"})
    platform = start(faults=[fault])
    result = command("--work", half_done)
    assert (result.exit_code, platform.ends) == (0, ["finalize"]), result.output
    once(platform)
    nowhere(platform, result)
    assert len(posted(platform, "nuclei_objects")) == len(posted(platform, "nuclei_classes")) > 3
    assert "progress" in name or fault.times < (PASSING | PROGRESS)[name].times
    assert "PUT /progress" in platform.log and "PUT /failure" not in platform.log


def test_a_platform_that_is_silent_about_progress(
    start: Start, half_done: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keeps nobody waiting for as long as it is silent."""
    monkeypatch.setattr(job, "_PROGRESS_TIMEOUT", 0.2)
    fault = Fault("/progress", 200, times=ALWAYS, wait=60.0)
    platform, began = start(faults=[fault]), time.monotonic()
    result = command("--work", half_done)
    assert (result.exit_code, platform.ends) == (0, ["finalize"]), result.output
    assert fault.times < ALWAYS and time.monotonic() - began < 25


# ------------------------------------------------------------------------------------------------ the failure itself

FAILURE = Fault("/failure", headers={"Retry-After": "0"})


@pytest.mark.parametrize("kind", [*map(str, STATUSES), "reset", "torn", "lost", "silence"])
def test_a_failure_that_nobody_takes(start: Start, command: Command, nowhere: Callable[..., None], kind: str) -> None:
    """The app ends all the same, with 1, and says in its log that the platform was not told; nothing was finalized."""
    always = replace(FAILURE, times=ALWAYS, status=int(kind) if kind.isdigit() else 0)
    fault = replace(always, torn=kind == "torn", done=kind == "lost", wait=60.0 if kind == "silence" else 0.0)
    platform = start(mode="REPORT", faults=[fault])
    result = command(patient=replace(QUICK, total=0.5))
    assert result.exit_code == 1 and "report mode" in result.output and "could not be told" in result.output
    assert platform.ends == (["failure"] if kind == "lost" else [])
    assert 1 <= platform.log.count("PUT /failure") <= QUICK.attempts and "PUT /finalize" not in platform.log
    assert platform.job.token not in result.output


@pytest.mark.parametrize("kind", ["429", "503", "reset", "torn", "lost"])
def test_a_failure_that_is_taken_at_last(start: Start, command: Command, kind: str) -> None:
    """Faults of the failure itself pass: it is said again, and counts once."""
    fault = replace(FAILURE, status=int(kind) if kind.isdigit() else 0, torn=kind == "torn", done=kind == "lost")
    platform = start(mode="REPORT", faults=[fault])
    result = command()
    assert (result.exit_code, platform.ends) == (1, ["failure"]) and "could not be told" not in result.output
    assert platform.log.count("PUT /failure") == 2


@pytest.mark.parametrize(("how", "mode"), [("finalize", "STANDALONE"), ("failure", "REPORT")])
def test_an_end_that_arrives_twice(start: Start, half_done: str, command: Command, how: str, mode: str) -> None:
    """The platform refuses the second of one message; the job has ended as it should, and the app ends, too."""
    platform = start(mode=mode, faults=[Fault(f"/{how}", twice=True)])
    command("--work", half_done)
    assert platform.ends == [how]


# ------------------------------------------------------------------------------------------------ again and twice


@pytest.mark.parametrize("stage", ["collection", "numbers", "tile"])
def test_a_job_that_died_while_posting_is_not_posted_again(
    start: Start, half_done: str, command: Command, stage: str
) -> None:
    """Started again in the same work folder, it fails with words that say what to do, and posts nothing."""
    platform = start(faults=[replace(POSTING[stage], times=ALWAYS), replace(FAILURE, times=ALWAYS)])
    assert command("--work", half_done).exit_code == 1 and not platform.ends
    platform.faults.clear()
    platform.log.clear()
    failed(platform, command("--work", half_done))
    assert "interrupted" in platform.message
    assert not any(line.startswith("POST") or "/data" in line for line in platform.log)


def test_a_job_that_died_before_posting_goes_on(start: Start, command: Command, tmp_path: Path) -> None:
    """What the engine had published is not done again: no picture but those that tell of tissue is fetched twice."""
    work = tmp_path / "work"
    platform = start(faults=[Fault("/outputs/tissue", 500), replace(FAILURE, times=ALWAYS)])
    assert command("--work", str(work)).exit_code == 1
    (work / "posting.json").unlink()  # it died just before
    platform.faults, before = [], len(platform.log)
    assert command("--work", str(work)).exit_code == 0 and len(posted(platform, "nuclei_objects")) > 3
    pictures = [line for line in platform.log[before:] if line.startswith(("GET /regions", "GET /tiles"))]
    assert len(pictures) <= 2


def test_a_job_started_again_elsewhere_meets_its_outputs(start: Start, half_done: str, command: Command) -> None:
    """Where the work folder is gone, a platform that has the output refuses it, and the job fails; nothing is added."""
    platform = start(faults=[Fault("/nuclei_confidences", times=ALWAYS), replace(FAILURE, times=ALWAYS)])
    assert command("--work", half_done).exit_code == 1
    kept = {key: len(items) for key, items in platform.items.items()}
    (Path(half_done) / "posting.json").unlink()
    platform.faults.clear()
    platform.log.clear()
    failed(platform, command("--work", half_done))
    assert {key: len(items) for key, items in platform.items.items()} == kept


@pytest.mark.parametrize("shared", [True, False])
def test_a_job_that_is_given_to_two_apps(
    start: Start, half_done: str, published: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """Both end, the job ends once, and nothing is there twice, in one work folder or in two."""
    both, look = threading.Barrier(2, timeout=60), job._open_slide

    def looked_at(request: Any, inputs: Any) -> Any:
        both.wait()  # both have looked for the mark of posting before either makes it
        return look(request, inputs)

    monkeypatch.setattr(job, "_open_slide", looked_at)
    platform = start()
    works = [half_done, half_done if shared else shutil.copytree(published, f"{half_done}-too")]
    ends: list[JobEnd] = []
    apps = [threading.Thread(target=lambda work=work: ends.append(run(folder=str(work)))) for work in works]
    for one in apps:
        one.start()
    for one in apps:
        one.join(60)
    assert len(ends) == 2 and len(platform.ends) == 1
    assert platform.log.count("POST /outputs/tissue") <= (1 if shared else 2)
    assert sum(one.how == "finalized" for one in ends) == (platform.ends == ["finalize"])
    for items in platform.items.values():
        assert len({one["id"] for one in items}) == len(items)
    assert len(platform.outputs) == len({one["id"] for one in platform.outputs.values()})
    if shared and platform.ends == ["failure"]:  # else one was done before the other came to it
        assert "started twice" in platform.message or "interrupted" in platform.message


def test_only_one_app_begins_to_post(
    start: Start, half_done: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another has begun to while this one worked on the slide, this one does not."""

    def and_another_begins(folder: str) -> Results:
        (Path(half_done) / "posting.json").touch()
        return results_at(folder)

    monkeypatch.setattr("wsi_mmm.empaia.results.results_at", and_another_begins)
    platform = start()
    failed(platform, command("--work", half_done))
    assert "interrupted" in platform.message and not any(line.startswith("POST") for line in platform.log)
