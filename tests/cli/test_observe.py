"""The options that show a run from outside."""

from __future__ import annotations

import pytest

from wsi_mmm.cli.observe import observed
from wsi_mmm.engine.monitoring.observe import Observe
from wsi_mmm.errors import OptionError


def test_options_of_watching_are_told_from_the_others() -> None:
    """They become an Observe; the rest is for the run. Nothing asked for shows nothing."""
    given = {"mpp": 0.5, "log_file": "run.jsonl", "log_level": "debug", "metrics_port": 9464}
    assert observed(given) == (Observe("run.jsonl", "debug", 9464), {"mpp": 0.5})
    assert observed({"mpp": 0.5}) == (None, {"mpp": 0.5})


@pytest.mark.parametrize(
    ("variable", "exporter"), [(None, "otlp"), ("", "otlp"), ("console", "console"), ("none", None)]
)
def test_the_environment_says_where_traces_go(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, exporter: str | None
) -> None:
    """By the standard variable; a settings file may name the exporter itself."""
    monkeypatch.delenv("OTEL_TRACES_EXPORTER", raising=False)
    if variable is not None:
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", variable)
    assert observed({"traces": True})[0] == Observe(traces=exporter)
    assert observed({"traces": False})[0] == Observe()
    assert observed({"traces": "zipkin"})[0] == Observe(traces="zipkin")


@pytest.mark.parametrize(
    ("name", "value"), [("metrics_port", True), ("metrics_port", "9464"), ("log_file", 3), ("log_level", True)]
)
def test_a_value_of_the_wrong_kind_is_named(name: str, value: object) -> None:
    """As a settings file may hold one."""
    with pytest.raises(OptionError, match=f"option {name} must be"):
        observed({name: value})
