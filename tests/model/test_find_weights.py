"""Weights are found where users put them, in the documented sequence; what is in the way is named with its fix."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wsi_mmm.errors import ModelError
from wsi_mmm.model import find_weights as finding
from wsi_mmm.model.find_weights import (
    WeightPlaces,
    choose_file,
    download_weights,
    explain_missing,
    find_weights,
    local_places,
)
from wsi_mmm.model.recipe import EncoderRecipe

RECIPE = EncoderRecipe(
    name="uni2-h", architecture="vit_giant_patch14_reg4_dinov2", hub_id="MahmoodLab/UNI2-h", file="pytorch_model.bin",
    gated=True,
)  # fmt: skip


def put(path: Path, text: str = "x") -> Path:
    """A file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def cached(hub: Path, name: str = "MahmoodLab--UNI2-h", file: str = "model.safetensors", revision: str = "abc") -> Path:
    """A file as the hub's cache keeps it."""
    put(hub / f"models--{name}" / "refs" / "main", revision)
    return put(hub / f"models--{name}" / "snapshots" / revision / file)


def test_the_sequence_of_places(tmp_path: Path) -> None:
    """--weights, then the folder of folders, then the hub's cache; nowhere is None."""
    places = WeightPlaces(str(tmp_path / "all"), str(tmp_path / "hub"))
    (tmp_path / "all").mkdir()
    assert find_weights(RECIPE, None, places) is None
    hub = cached(tmp_path / "hub")
    found = find_weights(RECIPE, None, places)
    assert found is not None and (found.path, found.place) == (hub, "the hub's cache")
    own = put(tmp_path / "all" / "uni2-h" / "model.safetensors")
    found = find_weights(RECIPE, None, places)
    assert found is not None and (found.path, found.place) == (own, "WSI_MMM_WEIGHTS")
    given = put(tmp_path / "given.safetensors")
    found = find_weights(RECIPE, str(given), places)
    assert found is not None and (found.path, found.place) == (given, "--weights")


@pytest.mark.parametrize(
    "place",
    [
        "uni2-h/model.safetensors", "uni2-h/pytorch_model.safetensors", "uni2-h/anything.safetensors",
        "uni2-h.safetensors", "UNI2-h/model.safetensors", "MahmoodLab/UNI2-h/model.safetensors",
        "MahmoodLab--UNI2-h/model.safetensors", "Uni2-H/model.safetensors",
        "models--MahmoodLab--UNI2-h/snapshots/abc/model.safetensors",
    ],
)  # fmt: skip
def test_names_in_the_folder_of_folders(tmp_path: Path, place: str) -> None:
    """Our name, that of the hub in its usual forms, the hub's own cache copied there."""
    written = put(tmp_path / place)
    found = find_weights(RECIPE, None, WeightPlaces(str(tmp_path)))
    assert found is not None and found.path.samefile(written)


def test_the_cache_of_the_hub(tmp_path: Path) -> None:
    """The snapshot of the branch main, in any writing of the id; without that branch, the only snapshot."""
    other = cached(tmp_path, revision="old")
    newest = cached(tmp_path, revision="new")
    found = find_weights(RECIPE, None, WeightPlaces(hub=str(tmp_path)))
    assert found is not None and found.path == newest != other
    lower = cached(tmp_path / "lower", "MahmoodLab--uni2-h")
    (tmp_path / "lower" / "models--MahmoodLab--uni2-h" / "refs" / "main").unlink()
    found = find_weights(RECIPE, None, WeightPlaces(hub=str(tmp_path / "lower")))
    assert found is not None and found.path == lower


def test_a_reference_out_of_the_cache_is_not_followed(tmp_path: Path) -> None:
    """The text of a branch is a name of a snapshot, nothing else."""
    put(tmp_path / "elsewhere" / "model.safetensors")
    home = tmp_path / "hub" / "models--MahmoodLab--UNI2-h"
    put(home / "refs" / "main", "../../../elsewhere")
    (home / "snapshots").mkdir()
    assert find_weights(RECIPE, None, WeightPlaces(hub=str(tmp_path / "hub"))) is None


def message(call: Any, *arguments: Any) -> str:
    """The text of the ModelError, one line."""
    with pytest.raises(ModelError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_pickle_leads_to_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, a folder, the hub's cache: the message is the command that reads it."""
    file = put(tmp_path / "pytorch_model.bin")
    assert f"wsi-mmm models convert {file} -o {tmp_path}/pytorch_model.safetensors" in message(choose_file, file)
    assert f"wsi-mmm models convert {file}" in message(choose_file, tmp_path, "pytorch_model.bin")
    inside = cached(tmp_path / "hub", file="pytorch_model.bin")
    text = message(find_weights, RECIPE, None, WeightPlaces(hub=str(tmp_path / "hub")))
    assert f"models convert {inside} -o uni2-h/model.safetensors" in text
    assert "then give embed --weights uni2-h, or set WSI_MMM_WEIGHTS to the folder of uni2-h" in text
    monkeypatch.setenv("WSI_MMM_WEIGHTS", str(tmp_path / "all"))
    text = message(find_weights, RECIPE, None, WeightPlaces(hub=str(tmp_path / "hub")))
    assert text.endswith(f"-o {tmp_path}/all/uni2-h/model.safetensors reads the tensors alone, without running any")


def test_what_is_in_the_way(tmp_path: Path) -> None:
    """A missing path, an empty folder, several files, shards, a variable that names no folder."""
    assert "are missing: check the path of --weights" in message(
        find_weights, RECIPE, str(tmp_path / "no"), WeightPlaces()
    )
    assert "holds no weights" in message(choose_file, tmp_path)
    put(tmp_path / "two" / "a.safetensors")
    put(tmp_path / "two" / "b.safetensors")
    assert "several weights (a.safetensors, b.safetensors)" in message(choose_file, tmp_path / "two")
    put(tmp_path / "cut" / "model-00001-of-00002.safetensors")
    assert "no model.safetensors.index.json: copy it too" in message(choose_file, tmp_path / "cut")
    index = put(tmp_path / "cut" / "model.safetensors.index.json")
    assert choose_file(tmp_path / "cut") == index
    put(tmp_path / "cut" / "other.safetensors.index.json")
    assert choose_file(tmp_path / "cut") == index
    index.rename(tmp_path / "cut" / "third.safetensors.index.json")
    assert "several indexes of such files" in message(choose_file, tmp_path / "cut")
    part = tmp_path / "cut" / "model-00001-of-00002.safetensors"
    assert "is one of several files of weights: give their folder" in message(choose_file, part)
    pickled = put(tmp_path / "bins" / "pytorch_model-00001-of-00002.bin").parent
    put(pickled / "pytorch_model.bin.index.json")
    text = message(choose_file, pickled)
    assert f"models convert {pickled}/pytorch_model.bin.index.json -o {pickled}/model.safetensors" in text
    places = WeightPlaces(str(tmp_path / "no"))
    assert "WSI_MMM_WEIGHTS names" in message(find_weights, RECIPE, None, places)


def test_an_empty_folder_of_its_name_is_passed_over(tmp_path: Path) -> None:
    """A folder made in advance does not hide the hub's cache."""
    (tmp_path / "all" / "uni2-h").mkdir(parents=True)
    hub = cached(tmp_path / "hub")
    found = find_weights(RECIPE, None, WeightPlaces(str(tmp_path / "all"), str(tmp_path / "hub")))
    assert found is not None and found.path == hub


@pytest.mark.parametrize(
    ("environment", "hub"),
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x/"}, "/x/huggingface/hub"),
        ({"HF_HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/h/hub"),
        ({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}, "/c"),
    ],
)
def test_variables(environment: dict[str, str], hub: str) -> None:
    """Those of the hub's own library, and ours."""
    assert local_places(environment) == WeightPlaces("", hub, False)
    assert local_places({"WSI_MMM_WEIGHTS": "/w", "HF_HUB_OFFLINE": "1"}).folder == "/w"
    assert local_places({"HF_HUB_OFFLINE": "true"}).offline and not local_places({"HF_HUB_OFFLINE": "0"}).offline


class GatedRepoError(Exception):
    """As huggingface_hub names it."""


class RemoteEntryNotFoundError(Exception):
    """As huggingface_hub names it."""


def hub_that(monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any]) -> None:
    """A hub that answers for each file with an error, or a path."""

    def download(repository: str, name: str, cache_dir: str | None, revision: str | None = None) -> str:
        assert repository == RECIPE.hub_id
        answer = answers.get(name, RemoteEntryNotFoundError("404"))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(finding, "import_package", lambda *_: SimpleNamespace(hf_hub_download=download))


def test_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Safetensors first; what is only published as a pickle leads to convert; no file of either name."""
    online = WeightPlaces(hub=str(tmp_path), offline=False)
    safe, pickled = put(tmp_path / "model.safetensors"), put(tmp_path / "pytorch_model.bin")
    hub_that(monkeypatch, {"model.safetensors": safe})
    assert download_weights(RECIPE, online).path == safe
    absent = RemoteEntryNotFoundError("404")
    hub_that(monkeypatch, {"model.safetensors": absent, "pytorch_model.bin": pickled})
    assert "wsi-mmm models convert" in message(download_weights, RECIPE, online)
    several = put(tmp_path / "model.safetensors.index.json", '{"weight_map": {"a": "m-00001-of-00001.safetensors"}}')
    hub_that(
        monkeypatch, {"model.safetensors.index.json": several, "m-00001-of-00001.safetensors": put(tmp_path / "m")}
    )
    assert download_weights(RECIPE, online).path == several
    hub_that(monkeypatch, {"model.safetensors": absent, "pytorch_model.bin": absent})
    assert "neither model.safetensors nor 'pytorch_model.bin'" in message(download_weights, RECIPE, online)


def test_no_network_and_no_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in one line that names the fix; offline, nothing is tried."""
    online = WeightPlaces(offline=False)
    hub_that(monkeypatch, {"model.safetensors": GatedRepoError("Access to model is restricted.\nMore.")})
    text = message(download_weights, RECIPE, online)
    assert "accept its terms at https://huggingface.co/MahmoodLab/UNI2-h and run hf auth login" in text
    absent = type("RepositoryNotFoundError", (Exception,), {})("401 Client Error. Repository Not Found")
    hub_that(monkeypatch, {"model.safetensors": absent})
    assert "MahmoodLab/UNI2-h is not there, or private: check the name" in message(download_weights, RECIPE, online)
    hub_that(monkeypatch, {"model.safetensors": ConnectionError("cannot reach /api/f401c")})
    assert "the hub cannot be reached" in message(download_weights, RECIPE, online)
    hub_that(monkeypatch, {"model.safetensors": ConnectionError("[Errno -2] Name or service not known\nMax retries")})
    text = message(download_weights, RECIPE, online)
    assert "the hub cannot be reached" in text and "hf download MahmoodLab/UNI2-h --local-dir uni2-h" in text
    hidden = FileNotFoundError("An error happened while trying to locate the file on the Hub and we cannot find it.")
    hidden.__cause__ = OSError("429 Client Error: Too Many Requests")
    hub_that(monkeypatch, {"model.safetensors": hidden})
    assert "(429 Client Error: Too Many Requests)" in message(download_weights, RECIPE, online)
    hub_that(monkeypatch, {"model.safetensors": type("RevisionNotFoundError", (Exception,), {})("404 Client Error.")})
    assert "has no revision 'main': check what follows the @" in message(download_weights, RECIPE, online)
    hub_that(monkeypatch, {})
    assert message(download_weights, RECIPE, WeightPlaces()) == explain_missing(RECIPE, WeightPlaces())
