"""The tissue of the first slide, found by a forked process: the same mask, and no harm where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import os, signal, sys, time
import numpy as np
from wsi_mmm.engine.stages import ahead
from wsi_mmm.engine.units import SlideTask
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.slides import open_slide
from wsi_mmm.tiles.tissue import tissue_mask

task = SlideTask("a", sys.argv[1], "out", Recipe("m", "h", (), 0.5, 256, 0))
ahead.begin(task)
"""


def in_new_process(code: str, slide: Path) -> str:
    """What this prints in a process that has neither threads nor torch."""
    done = subprocess.run([sys.executable, "-c", CODE + code, slide], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


needs_fork = pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="forks on Linux with two cores only"
)


@needs_fork
def test_the_mask_of_another_process_is_the_same(tiny_slide: Path) -> None:
    """What the forked process finds is this process's mask to the bit; its reading is counted; nobody is left."""
    code = """
with open_slide(sys.argv[1]) as slide:
    found, own = ahead.tissue_of(slide, task), tissue_mask(slide)
assert found.spent["pid"] != os.getpid() and found.spent["bytes_read"] > 0
assert (found.mask.scale_x, found.mask.scale_y) == (own.scale_x, own.scale_y)
assert np.array_equal(found.mask.mask, own.mask) and own.mask.any()
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print("same")
"""
    assert in_new_process(code, tiny_slide) == "same"


@needs_fork
def test_a_killed_process_costs_nothing_but_time(tiny_slide: Path) -> None:
    """Where the forked process dies, this one finds the same mask itself."""
    code = """
[helper] = ahead._helpers.values()
os.kill(helper.pid, signal.SIGKILL)
with open_slide(sys.argv[1]) as slide:
    found, own = ahead.tissue_of(slide, task), tissue_mask(slide)
    assert found.spent == {} and np.array_equal(found.mask.mask, own.mask)
print("found")
"""
    assert in_new_process(code, tiny_slide) == "found"


@needs_fork
def test_a_process_that_nobody_asks_is_ended(tiny_slide: Path) -> None:
    """After ``end`` the forked process is gone, though it had not finished."""
    code = """
[helper] = ahead._helpers.values()
os.kill(helper.pid, signal.SIGSTOP)
ahead.end()
try:
    os.kill(helper.pid, 0)
except ProcessLookupError:
    print("gone", ahead._helpers)
"""
    assert in_new_process(code, tiny_slide) == "gone {}"


def test_nothing_is_forked_beside_threads(tiny_slide: Path) -> None:
    """With a thread at work nothing is forked: a lock that it holds would stay locked in the other process."""
    code = """
import threading
ahead.end()  # of the one above
stop = threading.Event()
threading.Thread(target=stop.wait).start()
ahead.begin(task)
print(len(ahead._helpers))
stop.set()
"""
    assert in_new_process(code, tiny_slide) == "0"
