"""The runner: answers depend on the pixels and on nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import wsi_mmm
from wsi_mmm.errors import ModelError
from wsi_mmm.model.checkpoint import load_model, save_model
from wsi_mmm.model.runner import Runner, RunOutput
from wsi_mmm.slides.fake import synthetic_slide
from wsi_mmm.tasks import make_task
from wsi_mmm.types import U8

TASKS = ["nuclei", "stain"]


@pytest.fixture(scope="module")
def runners(small_model: Path) -> dict[int, Runner]:
    """The same model with one, two and three threads."""
    model = load_model(small_model)
    quantise = {card.name: make_task(card).quantise for card in model.card.tasks}
    return {n: Runner(model, "cpu", n, quantise=quantise) for n in (1, 2, 3)}


def tiles(n: int, size: int = 64) -> U8:
    """Seeded noise."""
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


def same(a: RunOutput, b: RunOutput) -> bool:
    """Equal to the bit."""
    pairs = [
        (a.features, b.features),
        *((a.maps[k], b.maps[k]) for k in a.maps),
        *((a.tables[k], b.tables[k]) for k in a.tables),
    ]
    return all(np.array_equal(x, y) for x, y in pairs)


def part(a: RunOutput, index: slice) -> RunOutput:
    """Some of the tiles' answers."""
    return RunOutput(
        a.features[index], {k: v[index] for k, v in a.maps.items()}, {k: v[index] for k, v in a.tables.items()}
    )


def test_answers_have_the_promised_shapes(runners: dict[int, Runner]) -> None:
    """float32 features, uint8 maps at half size, uint8 tables; only asked-for tasks."""
    out = runners[1].run(tiles(3), TASKS)
    assert out.features.dtype == np.float32
    assert out.features.shape == (3, 32)
    assert out.maps["nuclei"].dtype == np.uint8
    assert out.maps["nuclei"].shape == (3, 4, 32, 32)
    assert out.tables["stain"].dtype == np.uint8
    assert out.tables["stain"].shape == (3, 2)
    assert runners[1].run(tiles(2), []).maps == {}
    assert runners[1].run(tiles(0), TASKS).maps["nuclei"].shape == (0, 4, 32, 32)


@pytest.mark.parametrize("size", [64, 96])
def test_bits_do_not_depend_on_batch_size_threads_or_companions(runners: dict[int, Runner], size: int) -> None:
    """Any cut of the tiles into calls, any order, any number of threads: the same bytes."""
    pixels = tiles(2 * runners[1].batch_size(size) + 3, size)
    whole = runners[1].run(pixels, TASKS)
    assert all(same(whole, runners[n].run(pixels, TASKS)) for n in (2, 3))
    assert same(part(whole, slice(5, 9)), runners[2].run(pixels[5:9], TASKS))
    assert same(part(whole, slice(None, None, -1)), runners[3].run(pixels[::-1].copy(), TASKS))


def test_a_runner_can_be_called_from_several_threads(runners: dict[int, Runner]) -> None:
    """Concurrent calls give what calls in a row give."""
    pixels = tiles(12)
    wanted = runners[1].run(pixels, TASKS)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: runners[2].run(pixels[i : i + 3], TASKS), range(0, 12, 3)))
    for k, found in enumerate(results):
        assert same(part(wanted, slice(3 * k, 3 * k + 3)), found)


def test_calls_share_micro_batches(small_model: Path) -> None:
    """Many short calls at once fill up each other's micro-batches: far fewer of them than calls, the same bits."""
    runner = Runner(load_model(small_model), "cpu", 1)
    pixels = tiles(40)
    wanted = runner.run(pixels).features
    passes, plain = [], runner._pass
    begun, hold = threading.Event(), threading.Event()

    def counted(x: Tensor, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        begun.set()
        hold.wait()
        passes.append(len(x))
        return plain(x, names)

    runner._pass = counted
    with ThreadPoolExecutor(20) as pool:
        results = [pool.submit(runner.run, pixels[:2])]
        begun.wait()
        results += [pool.submit(runner.run, pixels[i : i + 2]) for i in range(2, 40, 2)]
        while len(runner._find_queue(64, ()).pending) < 19:
            time.sleep(0.01)
        hold.set()
        found = np.concatenate([result.result().features for result in results])
    assert np.array_equal(found, wanted)
    assert len(passes) == 2


def test_a_pass_that_fails_fails_its_calls_and_no_others(small_model: Path) -> None:
    """The error is raised where the answer was waited for; the runner goes on."""
    runner = Runner(load_model(small_model), "cpu", 2)
    plain = runner._pass

    def failing(x: Tensor, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        raise RuntimeError("out of memory")

    runner._pass = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.run(tiles(300))
    runner._pass = plain
    assert len(runner.run(tiles(300)).features) == 300


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["vectors", "nuclei", "stain"])
def test_answers_that_are_not_finite_are_an_error(small_model: Path, where: str, value: float) -> None:
    """One number of one tile is enough; the tensor is named; the tiles of a batch that only fill it up do not count."""
    model = load_model(small_model)
    quantise = {card.name: make_task(card).quantise for card in model.card.tasks}
    runner = Runner(model, "cpu", 1, quantise=quantise)
    plain, row = runner._pass, [1]

    def spoilt(x: Tensor, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        vector, logits = plain(x, names)
        part = vector if where == "vectors" else logits[where]
        part[row[0], ..., -1] = value
        return vector, logits

    runner._pass = spoilt
    named = "the feature vectors" if where == "vectors" else f"the answers of task '{where}'"
    with pytest.raises(ModelError, match=f"{named} hold NaN or infinity"):
        runner.run(tiles(2), TASKS)
    row[0] = 2  # padding
    assert len(runner.run(tiles(2), TASKS).features) == 2


@pytest.mark.parametrize("command", ["run", "embed"])
def test_a_model_that_overflows_writes_nothing(small_model: Path, tmp_path: Path, command: str) -> None:
    """Its weights are numbers, its answers are not: the slide fails with a line, and has no result and no features."""
    model = load_model(small_model)
    with torch.no_grad():
        for name, value in model.encoder.named_parameters():
            if value.ndim == 1 and name.endswith("weight"):
                value.fill_(1e20)
    save_model(model, tmp_path / "big", half=False)
    synthetic_slide(tmp_path / "s.tiff", 1, width=128, height=128, mpp=0.5, nuclei=4)
    act = {"run": wsi_mmm.run, "embed": wsi_mmm.embed}[command]
    report = act(str(tmp_path / "s.tiff"), str(tmp_path / "big"), output=tmp_path / "out", tissue="none")
    assert report.exit_code != 0 and "hold NaN or infinity" in str(report.slides[0])
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.startswith(("result", "features", "tiles"))]


def test_wrong_pixels_tasks_and_devices_are_refused(runners: dict[int, Runner], small_model: Path) -> None:
    """ModelError in one line."""
    with pytest.raises(ModelError, match="uint8"):
        runners[1].run(np.zeros((1, 64, 64, 3), np.float32), TASKS)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no task 'dogs'"):
        runners[1].run(tiles(1), ["dogs"])
    with pytest.raises(ModelError, match="quantise"):
        Runner(load_model(small_model), "cpu").run(tiles(1), ["stain"])
    with pytest.raises(ModelError, match="device 'quantum'"):
        Runner(load_model(small_model), "quantum")


def test_model_threads_compute_on_one_core_each_and_the_host_on_all() -> None:
    """Also after batches were computed, in a process that has more: else the bits of convolutions would be others."""
    code = (
        "import numpy as np, torch\n"
        "from wsi_mmm.model.checkpoint import load_model\n"
        "from wsi_mmm.model.runner import Runner\n"
        "before = torch.get_num_threads()\n"
        "runner = Runner(load_model('default'), 'cpu', threads=2)\n"
        "runner.run(np.zeros((3, 64, 64, 3), np.uint8))\n"
        "inside = list(runner._pool.map(lambda _: torch.get_num_threads(), range(8)))\n"
        "print(set(inside) == {1}, torch.get_num_threads() == before > 1)\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["True", "True"]
