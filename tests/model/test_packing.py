"""Calls that wait for the model."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from wsi_mmm.model.packing import Call, Waiting
from wsi_mmm.timing import StageTimer


def test_standing_in_the_queue_is_waiting_and_no_time_of_the_model() -> None:
    """From being added to its first tiles being taken; what follows is the model's."""
    waiting = Waiting()

    def model() -> None:
        time.sleep(0.1)
        packet = waiting.take(lambda: 2)
        time.sleep(0.05)
        waiting.give(packet.pieces, {"": np.zeros((2, 3), np.float32)})

    with StageTimer("model") as whole:
        call = Call(np.zeros((2, 4, 4, 3), np.uint8))
        waiting.add(call)
        thread = threading.Thread(target=model)
        thread.start()
        assert call.wait()[""].shape == (2, 3)
    thread.join()
    assert whole.result.seconds["waiting"] >= 0.1
    assert whole.result.seconds["model"] >= 0.05
    total = whole.result.end - whole.result.start
    assert sum(whole.result.seconds.values()) == pytest.approx(total, abs=1e-6)


def test_a_call_that_was_never_taken_has_not_waited() -> None:
    """One that failed in the queue: its time stays where it was."""
    waiting = Waiting()
    with StageTimer("model") as whole:
        call = Call(np.zeros((1, 4, 4, 3), np.uint8))
        waiting.add(call)
        call.error = ValueError("storm")
        call.done.set()
        with pytest.raises(ValueError, match="storm"):
            call.wait()
    assert set(whole.result.seconds) == {"model"}
