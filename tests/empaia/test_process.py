"""The app as the platform starts it: a process that knows three variables, may be stopped, and may use a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers.cluster import PlainCluster
from helpers.empaia_platform import FakePlatform, Fault
from wsi_mmm.cli import app
from wsi_mmm.config import empaia_places

from .conftest import Start

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


@pytest.mark.slow
def test_on_a_cluster(start: Start, tmp_path: Path) -> None:
    """Workers that have the job's variables read the slide themselves; the token is in nothing that is written."""
    alone = start()
    subprocess.run(COMMAND, check=True, timeout=200)
    platform = start()
    where = {"WSI_MMM_EMPAIA_WORK": str(tmp_path / "work")}
    with PlainCluster(tmp_path, env=dict(os.environ)) as cluster:
        environment = {**os.environ, **where, "WSI_MMM_EMPAIA_SCHEDULER": cluster.address}
        subprocess.run(COMMAND, env=environment, check=True, timeout=250)
    assert platform.state == "COMPLETED"
    found, expected = (
        [one["coordinates"] for one in some.items[some.outputs["nuclei_objects"]["id"]]] for some in (platform, alone)
    )
    assert found == expected and len(found) > 3
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5 and not any(platform.job.token.encode() in path.read_bytes() for path in written)
