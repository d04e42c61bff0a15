"""Jobs by the real ``eats``: an app's outputs before EMPAIA's own models and validator, on a platform of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.eats import OFFICIAL, Platform, ran, said
from helpers.processes import wait_for

pytestmark = [pytest.mark.empaia, pytest.mark.timeout(300)]


@pytest.mark.parametrize("mode", ["standalone", "preprocessing"])
def test_a_sound_job_is_exported(platform: Platform, inputs: Path, tmp_path: Path, mode: str) -> None:
    """Register, run, wait and export end with 0; both validations are COMPLETED; every output of the mode is a file."""
    seen, outputs = ran(platform, "stand-in-sound", inputs, tmp_path / "out", mode)
    assert json.loads(platform.eats("jobs", "inspect", seen["job"]).stdout) == platform.job(seen["job"])
    assert outputs["nuclei_objects"]["item_count"] == len(outputs["nuclei_objects"]["items"]) == 3
    assert seen["tiles"] == {"nuclei_map": 1}


@pytest.mark.parametrize(
    ("wrong", "mode", "why"),
    [
        ("reference", "standalone", "nuclei_confidences does not reference any item in nuclei_objects.items"),
        ("missing", "preprocessing", "Missing output stain_slide_class"),
        ("class", "preprocessing", "nuclei_classes class value is not known"),
    ],
)
def test_the_official_validator_refuses_wrong_outputs(
    platform: Platform, inputs: Path, tmp_path: Path, wrong: str, mode: str, why: str
) -> None:
    """A job whose outputs do not fit its description fails the official validation, by its own words."""
    done = platform.run(f"stand-in-{wrong}", inputs, tmp_path / "out", mode=mode)
    assert done.returncode == 1 and "Output validation failed" in done.stderr
    job = platform.job(said(done)["EMPAIA_JOB_ID"])
    assert (job["status"], job["output_validation_status"]) == ("COMPLETED", "ERROR")
    assert why in job["output_validation_error_message"]


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        ("failure", "FAILED", "The slide is not of tissue."),
        ("silence", "ERROR", "the container ended without finalize or failure"),
    ],
)
def test_a_job_that_fails_is_reported(
    platform: Platform, inputs: Path, tmp_path: Path, how: str, status: str, message: str
) -> None:
    """`eats` says that the execution failed, and the job has the app's message."""
    done = platform.run(f"stand-in-{how}", inputs, tmp_path / "out")
    assert done.returncode == 1 and "Error while Job execution" in done.stderr
    job = platform.job(said(done)["EMPAIA_JOB_ID"])
    assert (job["status"], job["error_message"]) == (status, message)


def test_inputs_that_do_not_fit_are_refused(platform: Platform, inputs: Path, tmp_path: Path) -> None:
    """Regions of interest without their class break the description's constraint: `eats` does not start the app."""
    (inputs / "standalone" / "roi_classes.json").unlink()
    done = platform.run("stand-in-sound", inputs, tmp_path / "out", mode="standalone")
    assert done.returncode == 1 and "Class constraint" in done.stderr


def test_an_app_may_be_started_by_hand(platform: Platform, inputs: Path) -> None:
    """`eats jobs set-running` lets a process that nobody started do the job, as docs/empaia.md says."""
    made = platform.eats("jobs", "register", platform.app("stand-in-sound"), inputs / "standalone")
    job_id = said(made)["EMPAIA_JOB_ID"]
    assert platform.eats("jobs", "set-running", job_id).returncode == 0
    by_hand = {**os.environ, **said(made), "EMPAIA_APP_API": f"http://127.0.0.1:{platform.port}/app-api"}
    stand_in = [sys.executable, OFFICIAL / "stand_in.py", "sound"]
    assert subprocess.run(stand_in, env=by_hand, check=False).returncode == 0
    waited = platform.eats("jobs", "wait", job_id)
    assert waited.returncode == 0, waited.stderr


def test_an_abort_ends_the_app(platform: Platform, inputs: Path, tmp_path: Path) -> None:
    """`eats jobs abort` ends a running container; one that says nothing more is an error, and cannot be waited for."""
    env = tmp_path / "job.env"
    made = platform.eats(
        "jobs", "register", platform.app("stand-in-waits"), inputs / "preprocessing", "--job-mode", "preprocessing"
    )
    env.write_text(made.stdout)
    job_id = said(made)["EMPAIA_JOB_ID"]
    assert platform.eats("jobs", "run", env).returncode == 0
    wait_for(lambda: any("/regions/" in one for one in platform.seen(job_id)["requests"]), "the app's work", env)
    assert platform.eats("jobs", "abort", job_id).returncode == 0
    assert platform.eats("jobs", "wait", job_id).returncode == 1
    assert platform.job(job_id)["status"] == "ERROR"
