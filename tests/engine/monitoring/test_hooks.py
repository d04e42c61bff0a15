"""What telemetry hears, and what it may say."""

from __future__ import annotations

import pytest

from wsi_mmm.engine.events import Event
from wsi_mmm.engine.monitoring.observe import Hooks, combine_hooks, redact_uris
from wsi_mmm.engine.units import PlanResult, UnitFacts


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no such file: /data/a@b.svs", "no such file: /data/a@b.svs"),
        ("s3://key:hush@bucket/a.svs: no such object", "s3://bucket/a.svs: no such object"),
        ("GET https://me:hush@host/a.svs?sig=hush failed", "GET https://host/a.svs failed"),
        ("'https://host/a?X-Amz-Signature=hush' and s3://b/c", "'https://host/a' and s3://b/c"),
    ],
)
def test_uris_in_a_text_are_shown_without_credentials(text: str, shown: str) -> None:
    """Users, passwords and queries go, wherever in the text the URI stands; the rest stays."""
    assert redact_uris(text) == shown


def test_several_hooks_hear_the_same_in_order() -> None:
    """All of them, one after another; none is needed."""
    heard: list[tuple[int, object]] = []
    hooks = combine_hooks(
        [Hooks(lambda e, n=n: heard.append((n, e)), lambda t, n=n: heard.append((n, t))) for n in (1, 2)]
    )
    event, result = Event("stage", "s"), PlanResult(UnitFacts("plan", "s"))
    hooks.listener(event)
    hooks.watch(result)
    assert heard == [(1, event), (2, event), (1, result), (2, result)]
    nothing = combine_hooks([])
    nothing.listener(event)
    nothing.watch(result)
