"""Files of slides' vectors from anywhere: what they claim is not believed."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from wsi_mmm.errors import StorageError
from wsi_mmm.outputs.slide_vectors import SlideVector, as_stamp_slide, read_slide_vector, slide_h5

VECTOR = np.arange(5, dtype=np.float32)


def test_a_vector_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Numbers, words, and lists as JSON."""
    path = tmp_path / "slide_features.h5"
    path.write_bytes(slide_h5(VECTOR, {"name": "a", "mpp": 0.5, "patch_size": 256, "more": [1]}))
    found = read_slide_vector(str(path))
    assert np.array_equal(found.vector, VECTOR) and found.name == "a"
    assert dict(found.attributes) == {"name": "a", "mpp": 0.5, "patch_size": 256, "more": "[1]"}


def faulty(name: str, path: Path) -> None:
    """A file with one fault."""
    with h5py.File(path, "w") as file:
        if name == "matrix":
            file["features"] = np.zeros((3, 4), np.float32)
        elif name == "words":
            file["features"] = ["a", "b"]
        elif name == "huge":
            file.create_dataset("features", shape=(1 << 40,), dtype="f4", chunks=(1024,))
        elif name == "nan":
            file["features"] = np.array([1, np.nan], np.float32)
        elif name == "link":
            file["features"] = h5py.ExternalLink(str(path.parent / "secret.h5"), "/features")
        elif name == "external":
            secret = str(path.parent / "secret.bin")
            file.create_dataset("features", shape=(2,), dtype="f4", external=[(secret, 0, 8)])
        elif name == "group":
            file.create_group("features")
    if name == "torn":
        path.write_bytes(slide_h5(VECTOR, {})[:200])
    elif name == "text":
        path.write_bytes(b"not HDF5")


@pytest.mark.parametrize(
    "name", ["matrix", "words", "huge", "nan", "link", "external", "group", "none", "torn", "text"]
)
def test_what_is_no_vector_is_refused(name: str, tmp_path: Path) -> None:
    """One line; nothing of other files is read, nothing large is made."""
    np.arange(2, dtype=np.float32).tofile(tmp_path / "secret.bin")
    (tmp_path / "secret.h5").write_bytes(slide_h5(VECTOR, {}))
    faulty(name, tmp_path / "slide_features.h5")
    with pytest.raises(StorageError, match=r"wsi-mmm embed|--force"):
        read_slide_vector(str(tmp_path / "slide_features.h5"))


def test_stamp_names_the_encoder_of_the_tiles_as_it_does(tmp_path: Path) -> None:
    """Its own name of UNI2-h, and ours of the slide model."""
    said = {"encoder": "uni2-h", "pooling": "cls", "slide_encoder": "mean", "slide_hash": "mean", "name": "a"}
    (tmp_path / "a.h5").write_bytes(as_stamp_slide(SlideVector(VECTOR, said)))
    with h5py.File(tmp_path / "a.h5") as file:
        assert (file.attrs["extractor"], file.attrs["encoder"], file.attrs["feat_type"]) == ("uni2", "mean", "slide")
        assert file["feats"].shape == (5,)
