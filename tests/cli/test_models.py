"""``wsi-mmm models`` and ``export``: what they list and write."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from helpers.commands import invoke, json_lines
from wsi_mmm.cli import models
from wsi_mmm.errors import InputError
from wsi_mmm.model.card import zoo_names
from wsi_mmm.outputs.exports import write_features


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


def test_features_of_several_encoders_are_exported_to_a_folder_for_each(tmp_path: Path) -> None:
    """``embed --encoder a --encoder b`` writes <encoder>/<slide>; both encoders' vectors of a slide are kept apart."""
    for encoder, width in (("a", 2), ("b", 3)):
        for slide in ("one", "two"):
            vectors = np.full((4, width), width, np.float32)
            write_features(str(tmp_path / "f" / encoder / slide / "features.zarr"), vectors, np.zeros((4, 2)), {})
    lines = json_lines(invoke("export", str(tmp_path / "f"), "--to", "h5", "-o", str(tmp_path / "out"), "--json"))
    written = [Path(line["output"]).relative_to(tmp_path / "out").as_posix() for line in lines]
    assert written == ["a/one.h5", "a/two.h5", "b/one.h5", "b/two.h5"]
    for name in written:
        with h5py.File(tmp_path / "out" / name) as file:
            assert file["features"].shape == (4, 2 if name.startswith("a/") else 3)
    [flat] = json_lines(invoke("export", str(tmp_path / "f" / "b" / "one"), "-o", str(tmp_path / "out"), "--json"))
    assert flat["output"] == str(tmp_path / "out" / "one.h5")
