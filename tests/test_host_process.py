"""A library call changes nothing of the process that it runs in; the command line's tuning has an entry of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import ctypes, gc, logging, os, signal, sys, threading
import distributed, timm, torch

called = []

class Watched(ctypes.CDLL):
    def __getattr__(self, name):
        called.append(name)
        return super().__getattr__(name)

ctypes.CDLL = Watched
os.register_at_fork(before=lambda: called.append("fork"))
PARTS = ("batched", "client", "comm", "core", "utils")
NAMES = ["", "wsi_mmm", "distributed", *(f"distributed.{part}" for part in PARTS)]

def state():
    loggers = [logging.getLogger(name) for name in NAMES]
    return {
        "collecting": (gc.isenabled(), gc.get_freeze_count(), gc.get_threshold()),
        "switch interval": sys.getswitchinterval(),
        "loggers": [(one.level, one.disabled, one.propagate, len(one.handlers)) for one in loggers],
        "torch": (torch.compiler.disable, torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "environment": dict(os.environ),
        "hooks": (sys.excepthook, threading.excepthook),
    }

before = state()
import wsi_mmm

report = wsi_mmm.run(sys.argv[1], output=sys.argv[2], tasks=["stain"], device="cpu")
assert [row.status for row in report.slides] == ["done"], report
from wsi_mmm.engine.executors import dask

dask.connect.__defaults__ = (2.0,)  # seconds until a scheduler is given up
try:
    wsi_mmm.run(sys.argv[1], output=sys.argv[2], scheduler="tcp://127.0.0.1:9")
except wsi_mmm.WsiError as error:
    assert "no Dask scheduler" in str(error), error
after = state()
assert {name: (before[name], after[name]) for name in before if before[name] != after[name]} == {}
seen = []
thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
thread.start(), thread.join()
assert seen == [before["torch"][1]], f"threads that begin later compute on {seen} cores"
assert "mallopt" not in called and "fork" not in called, called
"""


def test_a_run_leaves_its_host_process_as_it_was(tiny_slide: Path, tmp_path: Path) -> None:
    """Garbage collection, thread switching, loggers, torch, signal handlers, allocator; nothing is forked."""
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", PROGRAM, str(tiny_slide), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_command_line_tunes_its_process() -> None:
    """And keeps what `distributed` logs from its output, but nobody else's warnings."""
    program = """
import gc, logging, sys
from wsi_mmm import host_tuning
host_tuning.tune_process()
assert sys.getswitchinterval() <= 0.0006 and gc.get_threshold()[0] >= 100_000
import distributed
logging.getLogger("distributed.client").error("hidden")
logging.getLogger("wsi_mmm").warning("shown")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    assert "shown" in done.stderr and "hidden" not in done.stderr
