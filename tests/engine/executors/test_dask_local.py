"""Worker processes of a run's own: one GPU for each."""

from __future__ import annotations

import os

import pytest

from wsi_mmm.config import visible_gpus

pytest.importorskip("distributed")


def _seen() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.slow
def test_each_worker_sees_one_gpu() -> None:
    """Three workers on two GPUs; one that is started anew sees what it saw before."""
    from wsi_mmm.engine.executors.dask_local import local_cluster

    executor = local_cluster(3, ("4", "7"))
    try:
        before = executor._client.run(_seen)
        assert sorted(before.values()) == ["4", "4", "7"]
        executor._client.restart()
        assert sorted(executor._client.run(_seen).values()) == ["4", "4", "7"]
    finally:
        executor.close()


@pytest.mark.parametrize(
    ("said", "gpus"), [("0,1", ("0", "1")), ("GPU-12ab, 3", ("GPU-12ab", "3")), ("", ()), ("-1", ())]
)
def test_gpus_are_those_that_may_be_used(said: str, gpus: tuple[str, ...]) -> None:
    """What the variable names, in its words."""
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": said}) == gpus
