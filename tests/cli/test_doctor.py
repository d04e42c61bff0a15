"""``wsi-mmm doctor``: a line per check, with the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.commands import invoke, json_lines
from wsi_mmm.cli import doctor


def test_doctor_names_the_runtimes_and_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With their tolerance; one that lacks its packages says how to install them."""
    from wsi_mmm.model import identity

    assert "onnx: float32 through ONNX Runtime: within 1e-3" in doctor.runtimes().detail
    monkeypatch.setattr(identity, "find_spec", lambda name: None)
    detail = doctor.runtimes().detail
    assert "pip install 'wsi-mmm[onnx]'" in detail
    assert "through ONNX Runtime" not in detail


def test_doctor_gives_a_line_per_check_and_hides_secrets(monkeypatch: pytest.MonkeyPatch, in_tmp: Path) -> None:
    """Every finding has a status; a secret never shows."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA123")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setattr(doctor, "smoke", lambda: doctor.CheckResult("ok", "model", "fine"))
    result = invoke("doctor", "--json")
    assert result.exit_code == 0
    assert [line["what"] for line in json_lines(result)] == [
        "python", "libraries", "device", "encoder", "runtimes", "openslide", "storage", "output", "model",
    ]  # fmt: skip
    assert "hunter2" not in result.output
    assert "AKIA123" not in result.output
    assert "warn  storage" in invoke("doctor").stdout


def test_doctor_fails_with_the_fix_when_something_is_broken(monkeypatch: pytest.MonkeyPatch, in_tmp: Path) -> None:
    """A check that breaks is a finding, never a traceback."""

    def broken() -> doctor.CheckResult:
        raise ImportError("no torch here")

    for name in ("device", "smoke"):
        monkeypatch.setattr(doctor, name, broken)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "fail  device      ImportError: no torch here  ->  pip install" in result.stdout
