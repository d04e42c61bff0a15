"""The real ``eats`` command line of EMPAIA, before a platform of ours; see tests/empaia/official."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OFFICIAL = ROOT / "tests" / "empaia" / "official"
EAD = ROOT / "deploy" / "empaia" / "ead.json"
Judge = Callable[[Sequence[tuple[str, Any]]], list[str | None]]
"""What EMPAIA's own code says of values, each with the name of its model or "ead"; None: accepted."""

DIRECT = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # the services are on this machine


@dataclass(frozen=True)
class Platform:
    """Our platform, running; ``folder`` is where its commands work."""

    port: int
    python: Path
    folder: Path

    def eats(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command of the real ``eats``."""
        command = map(str, [self.python, OFFICIAL / "eats.py", self.port, *words])
        return subprocess.run(
            list(command), cwd=self.folder, env={**os.environ, **DIRECT}, capture_output=True, text=True, timeout=250
        )

    def app(self, image: str, ead: Path = EAD) -> str:
        """The id of an image that is registered as an app now."""
        return said(self.eats("apps", "register", ead, image))["APP_ID"]

    def run(
        self, image: str, inputs: Path, out: Path, *, mode: str = "preprocessing"
    ) -> subprocess.CompletedProcess[str]:
        """Register the app and run a job of it from beginning to end, its outputs exported to ``out``."""
        return self.eats("jobs", "exec", self.app(image), inputs / mode, out, "--job-mode", mode)

    def job(self, job_id: str) -> dict[str, Any]:
        """What ``eats jobs inspect`` says."""
        found: dict[str, Any] = json.loads(self.eats("jobs", "inspect", job_id).stdout)
        return found

    def seen(self, job_id: str) -> dict[str, Any]:
        """What our platform saw of a job's process."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/seen/{job_id}", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


def said(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The variables that a command of ``eats`` printed."""
    assert "=" in done.stdout, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines())
