"""models encoders and models convert."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.commands import invoke, json_lines
from wsi_mmm.model import convert_weights as converting
from wsi_mmm.model.convert_weights import ConvertedWeights


def test_the_list_begins_with_licences() -> None:
    """One line each, the licence first; --json: all fields, the licence first."""
    lines = invoke("models", "encoders").stdout.splitlines()
    assert lines[0].startswith("licence\tcommercial use")
    assert "CC-BY-NC-ND-4.0\tno\tgated\tuni2-h\t1536\tcls" in lines
    found = json_lines(invoke("models", "encoders", "--json"))
    assert len(found) >= 30
    assert next(iter(found[0])) == "licence" and len(found[0]["sources"]) >= 2


def test_one_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its facts and sources, and where its weights are."""
    monkeypatch.setenv("WSI_MMM_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    shown = invoke("models", "encoders", "UNI").stdout
    assert "licence" in shown and "https://github.com/mahmoodlab/UNI" in shown
    assert f"put that folder at {tmp_path}/uni" in shown
    weights = tmp_path / "uni" / "model.safetensors"
    weights.parent.mkdir()
    (tmp_path / "uni" / "pytorch_model.bin").write_bytes(b"")
    shown = invoke("models", "encoders", "uni").stdout
    assert "licence" in shown and "wsi-mmm models convert" in shown
    weights.write_bytes(b"")
    assert json_lines(invoke("models", "encoders", "uni", "--json"))[0]["weights"] == str(weights)


def test_unknown_encoder() -> None:
    """Near names, one line, exit code 1."""
    result = invoke("models", "encoders", "uni_v2")
    assert result.exit_code == 1
    assert "no published encoder 'uni_v2': did you mean uni2-h" in result.stderr


def test_convert_says_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default target lies beside the source."""
    asked: list[Path] = []

    def convert(source: Path, target: Path) -> ConvertedWeights:
        asked.extend((source, target))
        return ConvertedWeights(target, 3, 2_500_000, 1, "teacher")

    monkeypatch.setattr(converting, "convert_weights", convert)
    shown = invoke("models", "convert", tmp_path / "w.bin").stdout
    assert asked == [tmp_path / "w.bin", tmp_path / "w.safetensors"]
    assert "3 tensors of 'teacher', 2.5 MB; 1 values that are no tensors were left out" in shown
    [line] = json_lines(invoke("models", "convert", tmp_path / "w.bin", "-o", tmp_path / "x.safetensors", "--json"))
    assert line["output"] == str(tmp_path / "x.safetensors") and line["tensors"] == 3
