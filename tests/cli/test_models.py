"""``wsi-mmm models`` and ``export``: what they list and write."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.commands import invoke, json_lines
from wsi_mmm.cli import models
from wsi_mmm.errors import InputError
from wsi_mmm.model.card import zoo_names


def test_models_lists_and_shows_the_default() -> None:
    """The packaged default model is there with its tasks, and an unknown one is one line."""
    names = [card["name"] for card in json_lines(invoke("models", "--json"))]
    assert names[0] == "default" and sorted(names) == sorted(zoo_names())
    assert "nuclei" in invoke("models", "show", "default").stdout
    result = invoke("models", "show", "no-such-model")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)


def test_models_export_says_what_was_written(monkeypatch: pytest.MonkeyPatch, in_tmp: Path) -> None:
    """The file, its tasks, the tile sizes that fit, and how far its answers lie from torch's."""
    from wsi_mmm import api
    from wsi_mmm.model.onnx import Exported

    def written(name: str, *, output: Path, tasks: list[str] | None, **rest: object) -> Exported:
        return Exported(output, tuple(tasks or ("nuclei", "stain")), None if tasks is None else 512, 1.04e-06)

    monkeypatch.setattr(api, "export_model", written)
    plain = invoke("models", "export", "default").stdout
    assert plain.startswith("wrote default.onnx: features, nuclei, stain; tile size: any multiple of 32 px\n")
    assert "1.0e-06 of the largest answer" in plain
    assert "features, stain; tile size: 512 px only" in invoke("models", "export", "--task", "stain").stdout
    [line] = json_lines(invoke("models", "export", "-o", "a.onnx", "--json"))
    assert line == {"path": "a.onnx", "tasks": ["nuclei", "stain"], "side": None, "difference": 1.04e-06}


def test_features_are_found_and_exported_to_one_file_per_slide(tmp_path: Path) -> None:
    """A store itself, or every store below a folder; files go beside the features or into one folder."""
    stores = [f"{tmp_path}/{name}/features.zarr" for name in ("a", "b")]
    for uri in stores:
        Path(uri).mkdir(parents=True)
        (Path(uri) / "zarr.json").touch()
    assert models.feature_stores(str(tmp_path)) == stores
    assert models.targets([stores[0]], "h5", None) == [(stores[0], f"{tmp_path}/a/features.h5")]
    assert [target for _, target in models.targets([str(tmp_path)], "pt", "out")] == ["out/a.pt", "out/b.pt"]
    with pytest.raises(InputError, match="same id"):
        models.targets([stores[0], stores[0]], "pt", "out")
