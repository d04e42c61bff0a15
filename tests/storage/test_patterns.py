"""Patterns of object names, and names that look like patterns."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsi_mmm import inputs
from wsi_mmm.inputs import expand_inputs
from wsi_mmm.storage.patterns import match_uris

KEYS = [
    "a.tif", "b.tif", "a[1].tif", "a1.tif", "x?.tif", "xy.tif", "s*r.tif", "star.tif", "run[1]/a.tif", "run[1]/b.tif",
    "run1/a.tif", "deep/er/c.tif", "a^b.tif", "back\\slash.tif", "n\nl.tif", "[9-1].tif", "run[1]/n.txt",
]  # fmt: skip
URIS = [f"s3://b/{key}" for key in KEYS]


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("a[1].tif", ["a[1].tif"]), ("x?.tif", ["x?.tif"]), ("s*r.tif", ["s*r.tif"]),  # there under that name
        ("[9-1].tif", ["[9-1].tif"]), ("run[1]/[ab].tif", ["run[1]/a.tif", "run[1]/b.tif"]),
        ("b[1].tif", []), ("a[0-9].tif", ["a1.tif"]), ("[ab].tif", ["a.tif", "b.tif"]), ("[!b].tif", ["a.tif"]),
        ("?.tif", ["a.tif", "b.tif"]), ("run*/a.tif", ["run[1]/a.tif", "run1/a.tif"]), ("a[^x]b.tif", ["a^b.tif"]),
        ("**/c.tif", ["deep/er/c.tif"]), ("**/a.tif", ["a.tif", "run[1]/a.tif", "run1/a.tif"]),
        ("*/a.tif", ["run[1]/a.tif", "run1/a.tif"]), ("n*l.tif", ["n\nl.tif"]), ("back[\\d]*.tif", ["back\\slash.tif"]),
        ("[z-a].tif", []), ("[", []), ("[]", []), ("[!]", []), ("*", [k for k in KEYS if "/" not in k]),
    ],
)  # fmt: skip
def test_a_pattern_matches_as_in_a_shell_and_existing_names_mean_themselves(pattern: str, keys: list[str]) -> None:
    """No pattern is an error, and none is read as a regular expression."""
    assert match_uris(f"s3://b/{pattern}", URIS)[0] == [f"s3://b/{key}" for key in keys]


def test_prefixes_that_look_like_patterns_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a slash at the end; a pattern of prefixes gives the slides below all of them."""
    monkeypatch.setattr(inputs.store, "list_uris", lambda prefix: [uri for uri in URIS if uri.startswith(prefix)])
    monkeypatch.setattr(inputs.store, "exists", lambda uri: uri in URIS)
    run = ["s3://b/run[1]/a.tif", "s3://b/run[1]/b.tif"]
    assert [spec.uri for spec in expand_inputs(["s3://b/run[1]"])] == run
    assert [spec.uri for spec in expand_inputs(["s3://b/run[1]/"])] == run
    assert [spec.uri for spec in expand_inputs(["s3://b/run*/"])] == [*run, "s3://b/run1/a.tif"]


def test_a_prefix_with_a_dot_needs_no_slash(monkeypatch: pytest.MonkeyPatch) -> None:
    """``s3://bucket/study.v1`` is a prefix when there is no such object; a missing slide still fails by its name."""
    keys = ["s3://b/study.v1/a.tif", "s3://b/slide.v2"]
    monkeypatch.setattr(inputs.store, "list_uris", lambda prefix: [k for k in keys if k.startswith(f"{prefix}/")])
    monkeypatch.setattr(inputs.store, "exists", lambda uri: uri in keys)
    assert [spec.uri for spec in expand_inputs(["s3://b/study.v1"])] == ["s3://b/study.v1/a.tif"]
    assert [spec.uri for spec in expand_inputs(["s3://b/slide.v2"])] == ["s3://b/slide.v2"]
    assert [spec.uri for spec in expand_inputs(["s3://b/none.v3"])] == ["s3://b/none.v3"]


def test_local_folders_that_look_like_patterns_mean_themselves(tmp_path: Path) -> None:
    """As for a file of such a name; the rest of the path is still a pattern."""
    for name in ("run[1]/a.tif", "run[1]/b.tif", "run1/c.tif", "s[1].tif", "s1.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(pattern: str) -> list[str]:
        return [Path(spec.uri).relative_to(tmp_path).as_posix() for spec in expand_inputs([f"{tmp_path}/{pattern}"])]

    assert found("run[1]/*.tif") == ["run[1]/a.tif", "run[1]/b.tif"]
    assert found("run[0-9]/*.tif") == ["run1/c.tif"]
    assert found("s[1].tif") == ["s[1].tif"]
    assert found("s[0-9].tif") == ["s1.tif"]


@pytest.mark.parametrize("address", ["http://[bad/a.svs", "https://host:port/a.svs", "http:///a.svs", "HTTP://h/a.svs"])
def test_an_address_that_is_none_fails_alone(address: str) -> None:
    """It is a slide until it is opened."""
    (spec,) = expand_inputs([address])
    assert spec.uri == address
