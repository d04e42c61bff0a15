"""How a run ends when something outside ends it: batch systems, closed shells, full devices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

COMMAND = [sys.executable, "-m", "wsi_mmm", "run"]


def test_signals_stop_a_run_that_then_resumes(tiny_slide: Path, tmp_path: Path) -> None:
    """SLURM sends SIGUSR1 or SIGTERM before it kills, a closed shell SIGHUP: exit code 130, then it resumes."""
    out, log = tmp_path / "out", tmp_path / "log"
    options = [str(tiny_slide), "-o", str(out), "--device", "cpu", "--log-file", str(log), "--log-level", "debug"]
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1"):
        log.unlink(missing_ok=True)
        # Under nohup the suite itself ignores SIGHUP, and what it starts would, too.
        heard = partial(signal.signal, getattr(signal, name), signal.SIG_DFL)
        with subprocess.Popen(
            [*COMMAND, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heard
        ) as run:
            end = time.monotonic() + 120
            while not log.exists():  # the run has begun
                assert run.poll() is None and time.monotonic() < end
                time.sleep(0.01)
            run.send_signal(getattr(signal, name))
            _, err = run.communicate(timeout=120)
        assert run.returncode == 130, (name, err)
        assert "run the same command again to resume" in err and "Traceback" not in err, name
    again = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=280)
    assert again.returncode == 0, again.stderr
    assert (out / tiny_slide.stem / "result.geojson.gz").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_device_under_standard_output_is_named(tiny_slide: Path) -> None:
    """The line on stderr says what is full, not that something unexpected happened."""
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "wsi_mmm", "info", str(tiny_slide)]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert ended.returncode == 1
    assert "full device" in ended.stderr and "unexpected" not in ended.stderr and "Traceback" not in ended.stderr


def test_a_closed_standard_output_is_no_fault(tiny_slide: Path) -> None:
    """Nor does a slide get its number."""
    command = [sys.executable, "-m", "wsi_mmm", "info", str(tiny_slide)]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, preexec_fn=lambda: os.close(1))
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 130), ("SIGKILL", -signal.SIGKILL)])
def test_no_process_outlives_the_command_that_began_it(tiny_slide: Path, tmp_path: Path, name: str, code: int) -> None:
    """Neither workers that are just starting nor what multiprocessing keeps beside them; kill -9 included."""
    command = [*COMMAND, str(tiny_slide), "-o", str(tmp_path / "out"), "--device", "cpu", "--workers", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        below, end = psutil.Process(run.pid), time.monotonic() + 120
        helpers: list[psutil.Process] = []
        while len(helpers) < 2:  # a worker, and the tracker of its semaphores
            assert run.poll() is None and time.monotonic() < end
            time.sleep(0.05)
            helpers = below.children(recursive=True)
        run.send_signal(getattr(signal, name))
        _, err = run.communicate(timeout=60)
    assert run.returncode == code and "Traceback" not in err, err
    _, alive = psutil.wait_procs(helpers, timeout=30)
    assert not alive


def test_a_unit_in_a_process_of_its_own_ends_with_its_parent(tmp_path: Path) -> None:
    """The process that runs a unit apart is told by the system when the one that waits for it is killed."""
    inner = (
        "import os, time; from wsi_mmm.engine.executors.isolated import end_with_parent; end_with_parent();"
        "print(os.getpid(), flush=True); time.sleep(100)"
    )
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert not psutil.wait_procs([child], timeout=30)[1]
