"""A confined process can no longer reach out; this is looked at in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import json, os, socket, subprocess, sys
from wsi_mmm.model.confine import confine_process

def fails(what):
    try:
        what()
    except OSError as error:
        return type(error).__name__ == "PermissionError"
    return False

file = sys.argv[1]
prevented = confine_process()
print(json.dumps([prevented, {
    "connect": fails(socket.socket),
    "write": fails(lambda: open(file, "r+b")),
    "make": fails(lambda: open(file + ".new", "wb")),
    "remove": fails(lambda: os.remove(file)),
    "truncate": fails(lambda: os.truncate(file, 0)),
    "chmod": fails(lambda: os.chmod(file, 0)),
    "start": fails(lambda: subprocess.run(["true"])),
    "signal": fails(lambda: os.kill(os.getppid(), 0)),
    "environment": fails(lambda: open(f"/proc/{os.getppid()}/environ", "rb").read()),
    "read": fails(lambda: open(file, "rb").read()),
}]))
"""


def test_a_confined_process_reaches_nothing(tmp_path: Path) -> None:
    """No connection, no file changed, no program, nothing of the process that started it; reading is not prevented."""
    file = tmp_path / "file"
    file.write_bytes(b"kept")
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(file)], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    prevented, found = json.loads(done.stdout)
    if len(prevented) < 4:
        pytest.skip(f"this system prevents only: {prevented}")
    assert found.pop("read") is False
    assert all(found.values()), found
    assert file.read_bytes() == b"kept" and [path.name for path in tmp_path.iterdir()] == ["file"]
