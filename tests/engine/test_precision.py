"""The precision of published encoders by device: float32 on a CPU, what their entry says on a GPU, or what is asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsi_mmm import api
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.stages import context, prepare, publish
from wsi_mmm.model import choose
from wsi_mmm.model.registry import encoder_entries, parse_entry
from wsi_mmm.options import RunOptions
from wsi_mmm.outputs.exports import read_features
from wsi_mmm.slides.fake import synthetic_slide

RUNTIMES = {"fp32": "eager", "fp16": "fp16", "bf16": "bf16"}
TINY = {
    "name": "tiny", "title": "Tiny", "architecture": "test_vit", "arguments": {}, "mean": [0.5] * 3, "std": [0.5] * 3,
    "tile_px": 64, "pooling": "cls", "precision": "bf16", "licence": "none", "commercial": "yes",
}  # fmt: skip


def recipe_of(name: str | None, runtime: str = "auto") -> Recipe:
    """The recipe of a published encoder; None: of a model."""
    network = encoder_entries()[name].recipe if name is not None else None
    return Recipe(name or "default", "0" * 64, (), 0.5, 224, 0, options=RunOptions(runtime=runtime), network=network)


@pytest.mark.parametrize("name", [None, *encoder_entries()])
def test_the_entry_says_the_precision_on_a_gpu_and_the_user_wins(name: str | None) -> None:
    """The values of a run are known by the precision that computes them, whether it was asked for or not."""
    reduced = RUNTIMES[encoder_entries()[name].recipe.precision] if name is not None else "eager"
    automatic, exact, asked = (recipe_of(name, runtime) for runtime in ("auto", "eager", reduced))
    assert (automatic.runtime_on("cpu"), automatic.runtime_on("cuda")) == ("eager", reduced)
    assert exact.runtime_on("cuda") == "eager"
    assert recipe_of(name, "compile").runtime_on("cuda") == "compile"
    hashes = {(kind, one.forward_hash(kind, (1, 1))) for kind in ("cpu", "cuda") for one in (automatic, exact, asked)}
    assert automatic.forward_hash("cpu", (1, 1)) == exact.forward_hash("cpu", (1, 1))
    assert automatic.forward_hash("cuda", (1, 1)) == asked.forward_hash("cuda", (1, 1))
    assert len(hashes) == (2 if reduced == "eager" else 4)
    assert (automatic.result_hash() == exact.result_hash()) is (reduced == "eager")
    assert automatic.published()["runtime"] == ("eager" if reduced == "eager" else f"{reduced} on a GPU")


def test_the_registry_names_each_precision() -> None:
    """So the test above is about all of them."""
    assert {entry.recipe.precision for entry in encoder_entries().values()} == set(RUNTIMES)


def test_a_gpus_precision_is_in_the_features_the_report_and_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, computed by this CPU: bfloat16 vectors apart from float32 ones in one cache, and the difference."""
    entry = parse_entry(TINY, "test")
    monkeypatch.setattr(choose, "find_entry", lambda _: entry)
    synthetic_slide(tmp_path / "s.tiff", 1, width=128, height=128, mpp=0.5, nuclei=5)
    options: dict[str, Any] = {"weights": "random", "tissue": "none", "cache": tmp_path / "cache", "device": "cpu"}

    def embed(name: str, **more: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        report = api.embed(str(tmp_path / "s.tiff"), "tiny", output=tmp_path / name, **options, **more)
        found = read_features(str(tmp_path / name / "s" / "features.zarr"))
        [facts] = json.loads((tmp_path / name / "report.json").read_text())["slides"][0]["encoder"]
        assert report.exit_code == 0
        return found.vectors, dict(found.attributes), facts

    exact, attributes, facts = embed("cpu")
    assert (attributes["precision"], facts["runtime"], "difference" in facts) == ("fp32", "eager", False)
    for module in (context, prepare, publish):
        monkeypatch.setattr(module, "device_kind", lambda _: "cuda")
    short, attributes, facts = embed("gpu")
    assert (attributes["precision"], facts["runtime"], facts["precision"]) == ("bf16", "bf16", "bf16")
    assert facts["difference"]["tiles"] == 4
    assert facts["difference"]["largest"] == pytest.approx(np.abs(exact - short).max() / np.abs(exact).max(), rel=0.2)
    assert 0 < facts["difference"]["largest"] < 5e-2
    page = (tmp_path / "gpu" / "report.html").read_text()
    stated = f"on the first 4 tiles the cosine to float32 is at least {facts['difference']['cosine']}"
    assert f"Computed in bf16: {stated}" in page
    assert "Computed in" not in (tmp_path / "cpu" / "report.html").read_text()
    again, attributes, _ = embed("asked", runtime="eager")
    assert attributes["precision"] == "fp32"
    assert np.array_equal(again, exact)


def test_recipes_of_workers_keep_what_is_decided_there() -> None:
    """The client of a cluster need not have the device."""
    from wsi_mmm.engine.recipe import recipe_from_json

    recipe = recipe_of("uni2-h")
    sent = recipe_from_json(json.loads(json.dumps(recipe.to_json())))
    assert sent.runtime_on("cuda") == "bf16"
    assert replace(sent, network=None).runtime_on("cuda") == "eager"
