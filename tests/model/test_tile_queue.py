"""Calls that wait for the model."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from wsi_mmm.model.tile_queue import TileQueue
from wsi_mmm.timing import StageTimer


def test_standing_in_the_queue_is_waiting_and_no_time_of_the_model() -> None:
    """From being added to its first tiles being taken; what follows is the model's."""
    queue = TileQueue((), 2)

    def model() -> None:
        time.sleep(0.1)
        spans = queue.take_batch()
        time.sleep(0.05)
        queue.finish(spans, {"": np.zeros((2, 3), np.float32)})

    with StageTimer("model") as whole:
        pending = queue.add(np.zeros((2, 4, 4, 3), np.uint8))
        thread = threading.Thread(target=model)
        thread.start()
        assert pending.wait()[""].shape == (2, 3)
    thread.join()
    assert whole.result.seconds["waiting"] >= 0.1
    assert whole.result.seconds["model"] >= 0.05
    total = whole.result.end - whole.result.start
    assert sum(whole.result.seconds.values()) == pytest.approx(total, abs=1e-6)


def test_a_call_that_was_never_taken_has_not_waited() -> None:
    """One that failed in the queue: its time stays where it was."""
    queue = TileQueue((), 2)
    with StageTimer("model") as whole:
        pending = queue.add(np.zeros((1, 4, 4, 3), np.uint8))
        pending.error = ValueError("storm")
        pending.done.set()
        with pytest.raises(ValueError, match="storm"):
            pending.wait()
    assert set(whole.result.seconds) == {"model"}
