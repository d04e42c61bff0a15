"""Options on the command line: flags, settings file and environment, merged and handed to the api."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from wsi_mmm.cli.run import read_options
from wsi_mmm.engine.monitoring.observe import Observe
from wsi_mmm.errors import OptionError
from wsi_mmm.options import command_options

NOT_GIVEN: dict[str, Any] = dict.fromkeys((option.name for option in command_options("run")), None)


def observed(tmp_path: Path, **settings: object) -> Observe:
    """The Observe of a settings file."""
    (tmp_path / "run.toml").write_text("".join(f"{name} = {shown(value)}\n" for name, value in settings.items()))
    return read_options("run", {**NOT_GIVEN, "config": tmp_path / "run.toml"})[1]


def shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def test_options_of_watching_are_told_from_the_others() -> None:
    """They become an Observe; the rest is for the run. Nothing asked for shows nothing."""
    given = {"mpp": 0.5, "log_file": "run.jsonl", "log_level": "debug", "metrics_port": 9464}
    assert read_options("run", NOT_GIVEN | given) == ({"mpp": 0.5}, Observe("run.jsonl", "debug", 9464))
    assert read_options("run", NOT_GIVEN | {"mpp": 0.5}) == ({"mpp": 0.5}, Observe())


@pytest.mark.parametrize(
    ("variable", "exporter"), [(None, "otlp"), ("", "otlp"), ("console", "console"), ("none", None)]
)
def test_the_environment_says_where_traces_go(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, exporter: str | None, tmp_path: Path
) -> None:
    """By the standard variable; a settings file may name the exporter itself."""
    monkeypatch.delenv("OTEL_TRACES_EXPORTER", raising=False)
    if variable is not None:
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", variable)
    assert read_options("run", NOT_GIVEN | {"traces": True})[1] == Observe(traces=exporter)
    assert observed(tmp_path, traces=False) == Observe()
    assert observed(tmp_path, traces="zipkin") == Observe(traces="zipkin")


@pytest.mark.parametrize(
    ("name", "value"), [("metrics_port", True), ("metrics_port", "9464"), ("log_file", 3), ("log_level", True)]
)
def test_a_value_of_the_wrong_kind_is_named(name: str, value: object, tmp_path: Path) -> None:
    """As a settings file may hold one."""
    with pytest.raises(OptionError, match=f"option {name} must be"):
        observed(tmp_path, **{name: value})


def test_certificates_of_the_environment_are_for_schedulers_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """WSI_MMM_TLS counts for a tls:// address, and a flag wins over it."""
    monkeypatch.setenv("WSI_MMM_TLS", "certificates")
    encrypted = NOT_GIVEN | {"scheduler": "tls://host:8786"}
    assert read_options("run", encrypted)[0]["tls"] == "certificates"
    assert read_options("run", encrypted | {"tls": "others"})[0]["tls"] == "others"
    assert "tls" not in read_options("run", NOT_GIVEN | {"scheduler": "tcp://host:8786"})[0]
