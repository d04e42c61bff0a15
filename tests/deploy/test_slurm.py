"""deploy/slurm/cluster.py: what it asks SLURM for, and a run on a stand-in for SLURM that starts jobs as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.compose import ROOT
from helpers.processes import BIN, wait_for

SCRIPT = ROOT / "deploy" / "slurm" / "cluster.py"

SBATCH = """#!/bin/sh
for last; do :; done
cp "$last" "$JOBS/script"
setsid sh "$JOBS/script" >"$JOBS/log" 2>&1 &
echo $! >"$JOBS/pid"
echo "Submitted batch job 7"
"""
SCANCEL = """#!/bin/sh
kill -- -"$(cat "$JOBS/pid")"
"""


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The script in ``folder``, with sbatch and scancel that start and end processes."""
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    env = {**os.environ, "JOBS": str(folder), "PATH": f"{folder / 'bin'}:{BIN}:{os.environ['PATH']}"}
    env["AWS_SECRET_ACCESS_KEY"] = "only-in-the-environment"
    command = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=500, check=False)


def test_a_job_has_what_was_asked_for_and_no_secret(tmp_path: Path) -> None:
    """Cores, memory, partition, a GPU and its resource, TLS; the script that SLURM stores holds no credentials."""
    pytest.importorskip("dask_jobqueue")
    words = ["x.svs", "--output", "o", "--gpu", "--cores", "8", "--memory", "32GiB", "--partition", "p", "--print"]
    ended = run(words, tmp_path)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    wanted = ["-p p", "--cpus-per-task=8", "--mem=32G", "--gres=gpu:1", "--resources GPU=1", "tls://", "--tls-key"]
    assert [word for word in wanted if word not in ended.stdout] == []
    assert "only-in-the-environment" not in ended.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]  # the certificates are gone


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_on_slurm_ends_with_its_jobs(tiny_slide: Path, tmp_path: Path) -> None:
    """A slide is done by a worker that the batch system started; the job ends with the run."""
    pytest.importorskip("dask_jobqueue")
    words = [str(tiny_slide), "--output", str(tmp_path / "out"), "--cores", "2", "--memory", "4GiB"]
    ended = run([*words, "--interface", "lo"], tmp_path)
    assert ended.returncode == 0, ended.stderr + (tmp_path / "log").read_text()
    assert "1 slides in" in ended.stdout
    assert (tmp_path / "out" / "tiny" / "result.geojson.gz").exists()
    assert "only-in-the-environment" not in (tmp_path / "script").read_text() + (tmp_path / "log").read_text()
    group = (tmp_path / "pid").read_text().strip()

    def ended_too() -> bool:
        return subprocess.run(["pgrep", "-g", group], capture_output=True, check=False).returncode == 1

    wait_for(ended_too, "the end of the job", tmp_path / "log")
