"""How a run ends when something outside ends it: batch systems, closed shells, full devices."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "wsi_mmm", "run"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_stops_a_run_that_then_resumes(tiny_slide: Path, tmp_path: Path, name: str) -> None:
    """SLURM sends SIGUSR1 or SIGTERM before it kills, a closed shell SIGHUP: exit code 130, then it resumes."""
    out, log = tmp_path / "out", tmp_path / "log"
    options = [str(tiny_slide), "-o", str(out), "--device", "cpu", "--log-file", str(log), "--log-level", "debug"]
    # Under nohup the suite itself ignores SIGHUP, and what it starts would, too.
    heard = partial(signal.signal, getattr(signal, name), signal.SIG_DFL)
    with subprocess.Popen(
        [*COMMAND, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    ) as run:
        end = time.monotonic() + 120
        while not out.exists():
            assert run.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        run.send_signal(getattr(signal, name))
        _, err = run.communicate(timeout=120)
    assert run.returncode == 130, err
    assert "run the same command again to resume" in err and "Traceback" not in err
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
