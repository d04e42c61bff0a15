"""The app as the platform starts it: a process that knows three variables, may be stopped, and may use a cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from helpers.cluster import PlainCluster
from helpers.empaia_platform import FakePlatform, Fault
from wsi_mmm.cli.main import app
from wsi_mmm.config import empaia_places
from wsi_mmm.empaia.app import JobEnd

from .conftest import Start, rectangle, regions, run

COMMAND = [str(Path(sys.executable).parent / "wsi-mmm"), "empaia", "run"]


def begun(*more: str) -> subprocess.Popen[str]:
    """The app, started with the variables of this process."""
    return subprocess.Popen([*COMMAND, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(holds: Callable[[], bool]) -> None:
    """Until it holds; two minutes are too long."""
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def asked_for(platform: FakePlatform, where: str) -> Callable[[], bool]:
    return lambda: any(where in line for line in platform.log)


@pytest.mark.parametrize("where", ["/mode", "GET /regions", "POST /outputs/nuclei_objects"])
def test_a_signal_to_stop_is_a_failure(start: Start, tmp_path: Path, where: str) -> None:
    """Wherever the app stands, also while the platform is silent: the platform is told, and the exit code is 130."""
    platform = start(faults=[Fault(where, 200, times=99, wait=60.0)])
    running = begun("--work", str(tmp_path / "work"))
    wait_for(asked_for(platform, where))
    assert platform.job.token not in Path(f"/proc/{running.pid}/cmdline").read_text()
    running.send_signal(signal.SIGTERM)
    wait_for(lambda: platform.state == "FAILED")
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "stopped" in platform.message
    assert platform.job.token not in out + err
    assert sum(line == "PUT /failure" for line in platform.log) == 1 and "PUT /finalize" not in platform.log


def test_the_app_needs_only_three_variables(start: Start) -> None:
    """The command does the job of the environment and exits with 0; the token is in none of its words."""
    platform = start()
    running = begun()
    out, err = running.communicate(timeout=200)
    assert running.returncode == 0, err
    assert platform.state == "COMPLETED" and "finalized" in out and platform.job.token not in out + err


def test_a_failure_has_an_exit_code(start: Start) -> None:
    """1, and one line that says what is wrong."""
    platform = start(mode="POSTPROCESSING")
    running = begun()
    _, err = running.communicate(timeout=100)
    assert (
        running.returncode == 1
        and "postprocessing" in err
        and len(err.splitlines()) == 1
        and platform.state == "FAILED"
    )


def test_without_a_job_there_is_nothing_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable that is missing is named."""
    monkeypatch.delenv("EMPAIA_APP_API", raising=False)
    running = begun()
    _, err = running.communicate(timeout=100)
    assert running.returncode == 1 and "EMPAIA_APP_API is not set" in err


def test_a_signal_before_the_app_listens(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the program still loads, the platform is told, too."""
    platform = start()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wsi_mmm.empaia.app.run_app", interrupted)
    result = CliRunner().invoke(app, ["empaia", "run"])
    assert result.exit_code == 130 and platform.state == "FAILED" and "stopped" in platform.message
    assert platform.log == ["PUT /failure"]


def test_where_an_app_works_may_come_from_the_environment() -> None:
    """What is not set is not said."""
    assert empaia_places({}) == {} == empaia_places({"WSI_MMM_EMPAIA_WORK": " "})
    said = {"WSI_MMM_EMPAIA_WORK": "/w", "WSI_MMM_EMPAIA_SCHEDULER": "tcp://s:8786"}
    assert empaia_places(said) == {"work": "/w", "scheduler": "tcp://s:8786"}


REGIONS = regions(rectangle(300, 200, 500, 400), {"type": "circle", "center": [1000, 700], "radius": 200})


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["STANDALONE", "PREPROCESSING"])
def test_on_a_cluster(start: Start, tmp_path: Path, mode: str) -> None:
    """Workers that have the job's variables read the slide themselves, in either mode, with circles as regions: all
    that is posted is what one machine posts. The token is in nothing that is written, and in no process's words."""
    alone = start(mode=mode, inputs={"regions": REGIONS})
    assert run() == JobEnd("finalized")
    platform = start(mode=mode, inputs={"regions": REGIONS})
    where = {"WSI_MMM_EMPAIA_WORK": str(tmp_path / "work")}
    with PlainCluster(tmp_path, env=dict(os.environ)) as cluster:
        environment = {**os.environ, **where, "WSI_MMM_EMPAIA_SCHEDULER": cluster.address}
        running = subprocess.Popen(COMMAND, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while running.poll() is None:
            assert not seen_by_everybody(platform.job.token)
            time.sleep(0.5)
        said, _ = running.communicate(timeout=10)
    assert running.returncode == 0 and platform.job.token.encode() not in said
    assert platform.ends == ["finalize"] and platform.refused == []
    assert values(platform) == values(alone) and len(values(platform)["nuclei_objects"]) > 20
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5 and not any(platform.job.token.encode() in path.read_bytes() for path in written)


def values(platform: FakePlatform) -> dict[str, list[Any]]:
    """What was posted as each output: outlines, classes and numbers, in order."""
    whole = {key: platform.items.get(one["id"], [one]) for key, one in platform.outputs.items()}
    names = ("coordinates", "value", "levels")
    return {
        key: [next((one[name] for name in names if name in one), None) for one in found] for key, found in whole.items()
    }


def seen_by_everybody(token: str) -> list[list[str]]:
    """Command lines of this machine with the token in them."""
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if any(token in word for word in line)]


# ------------------------------------------------------------------------------------------------ death


@pytest.mark.parametrize(("where", "again"), [("GET /regions", 0), ("POST /collections", 1)])
def test_a_job_that_is_killed_and_started_again(start: Start, tmp_path: Path, where: str, again: int) -> None:
    """While it read the slide, it goes on and is finalized; while it posted, it fails and posts nothing more."""
    fault = Fault(where, 200, times=99, wait=60.0, after=1)
    platform = start(faults=[fault])
    running = begun("--work", str(tmp_path / "work"))
    wait_for(lambda: fault.after < 0)
    running.kill()
    running.communicate(timeout=60)
    assert platform.ends == []
    platform.faults, before = [], len(platform.log)
    second = begun("--work", str(tmp_path / "work"))
    out, err = second.communicate(timeout=200)
    assert second.returncode == again, err
    assert platform.job.token not in out + err and platform.ends == (["failure"] if again else ["finalize"])
    posts = [line for line in platform.log[before:] if line.startswith("POST")]
    assert posts == [] if again else len(posts) > 5
    for items in platform.items.values():
        assert len({one.get("reference_id", "") + str(one.get("coordinates")) for one in items}) == len(items)


def test_a_token_is_in_no_words_of_a_failure(start: Start) -> None:
    """Not with --debug either, which shows where an error came from; nor is it in any process's command line."""
    platform = start(faults=[Fault("POST /outputs", 401, times=99)])
    running = begun("--debug", "--json")
    wait_for(asked_for(platform, "GET /inputs"))
    assert not seen_by_everybody(platform.job.token)
    out, err = running.communicate(timeout=200)
    assert running.returncode == 1 and "401" in err and platform.job.token not in out + err
    assert json.loads(out)["ended"] == "failed" and platform.ends == ["failure"]
