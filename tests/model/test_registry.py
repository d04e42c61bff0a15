"""The list of published encoders is complete, cites its facts, and unknown names lead to near ones."""

from __future__ import annotations

import re
from typing import Any

import pytest

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import zoo_names
from wsi_mmm.model.registry import (
    EncoderEntry,
    describe_licence,
    encoder_entries,
    find_entry,
    near_names,
    parse_entry,
    suggest_encoders,
)

NAMES = {
    "uni", "uni2-h", "virchow", "virchow2", "h-optimus-0", "h-optimus-1",
    "h0-mini", "gigapath", "gigapath-flash", "gpfm", "mstar", "pathorchestra",
    "crown", "kaiko-s16", "kaiko-s8", "kaiko-b16", "kaiko-b8", "kaiko-l14",
    "lunit-s8", "lunit-s16", "lunit-resnet50-bt", "lunit-resnet50-mocov2", "lunit-resnet50-swav", "phikon",
    "phikon-v2", "hibou-b", "hibou-l", "midnight", "openmidnight", "dinobloom-s",
    "dinobloom-b", "dinobloom-l", "dinobloom-g", "dinov2-s", "dinov2-b", "dinov2-l",
    "dinov2-g", "dinov3-s", "dinov3-b", "dinov3-l", "resnet50-imagenet", "convnext-base-imagenet",
    "efficientnet-b0-imagenet",
}  # fmt: skip

ENTRIES = list(encoder_entries().values())


def test_the_field_s_encoders_are_there() -> None:
    """At least thirty, under names that no packaged model has."""
    known = encoder_entries()
    assert len(known) >= 30
    assert set(known) >= NAMES
    assert not set(known) & set(zoo_names())
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in known)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_cites_its_facts(entry: EncoderEntry) -> None:
    """Two sources of different owners, or the file says that there is no second; licence, id and sizes."""
    owners = set()
    for source in entry.recipe.sources:
        match = re.fullmatch(r"https://github\.com/([\w.-]+)/[\w.-]+/blob/([0-9a-f]{40}|v[\d.]+)/\S+", source)
        assert match, source
        owners.add(match.group(1).lower())
    assert len(owners) >= 2 or "a second source" in entry.unknown
    recipe = entry.recipe
    assert recipe.licence and entry.title and re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.hub_id)
    assert recipe.dimension and recipe.mean and recipe.std and recipe.input_px == 224
    assert recipe.file or "file" in entry.unknown
    assert recipe.mpp == 0.5 and recipe.tile_px in (224, 256)


FACTS: dict[str, dict[str, Any]] = {
    "virchow2": {"registers": 4, "pooling": "cls+patch_mean", "dimension": 2560},
    "uni2-h": {"registers": 8, "dimension": 1536, "gated": True, "mean": (0.485, 0.456, 0.406)},
    "h-optimus-1": {"mean": (0.707223, 0.578729, 0.703617), "std": (0.211883, 0.230117, 0.177517)},
    "midnight": {"pooling": "cls+patch_mean", "dimension": 3072, "mean": (0.5, 0.5, 0.5), "registers": 0},
    "openmidnight": {"mean": (0.485, 0.456, 0.406), "registers": 4, "dimension": 1536},
    "hibou-l": {"mean": (0.7068, 0.5755, 0.722), "std": (0.195, 0.2316, 0.1816), "registers": 4},
    "mstar": {"mean": (0.485, 0.456, 0.406)},
    "kaiko-s8": {"mean": (0.5, 0.5, 0.5)},
    "lunit-s16": {"mean": (0.70322989, 0.53606487, 0.66096631)},
}


@pytest.mark.parametrize("name", FACTS)
def test_facts_that_others_got_wrong(name: str) -> None:
    """Registers, pooling, constants and sizes that published tools differ in."""
    recipe = encoder_entries()[name].recipe
    assert {key: getattr(recipe, key) for key in FACTS[name]} == FACTS[name]


def test_names_are_found_in_any_writing() -> None:
    """Capitals and underscores do not matter; a foreign name is not found."""
    for written in ("uni2-h", "UNI2-h", "uni2_h"):
        entry = find_entry(written)
        assert entry is not None and entry.name == "uni2-h"
    assert find_entry("resnet50") is None


@pytest.mark.parametrize(
    ("written", "first"),
    [
        ("unii", "uni"),
        ("uni_v2", "uni2-h"),
        ("virchov2", "virchow2"),
        ("hoptimus0", "h-optimus-0"),
        ("MahmoodLab/UNI2-h", "uni2-h"),
        ("hf-hub:kaiko-ai/midnight", "midnight"),
        ("phikonv2", "phikon-v2"),
    ],
)
def test_unknown_names_lead_to_near_ones(written: str, first: str) -> None:
    """Slips, names of other tools and addresses on the hub."""
    assert near_names(written)[0] == first
    assert first in suggest_encoders(written)


def test_a_foreign_name_leads_to_the_list() -> None:
    """Nothing near: no guess, but the command that lists them."""
    assert near_names("zzzzqqq") == []
    assert suggest_encoders("zzzzqqq") == "wsi-mmm models encoders lists the published ones"


def test_the_licence_is_one_line() -> None:
    """What it is called, whether it forbids commercial use, and where its terms are."""
    for entry in ENTRIES:
        line = describe_licence(entry)
        assert "\n" not in line and entry.recipe.licence in line
    assert describe_licence(encoder_entries()["uni"]) == (
        "UNI: licence CC-BY-NC-ND-4.0 (no commercial use); https://huggingface.co/MahmoodLab/UNI"
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"std": [0, 1, 1]}, "std"),
        ({"commercial": "maybe"}, "commercial"),
        ({"surprise": 1}, "surprise"),
        ({"mpp": -1}, "mpp"),
    ],
)
def test_a_wrong_entry_is_named(change: dict[str, Any], named: str) -> None:
    """One line that names the encoder and the field."""
    good = {"name": "x", "architecture": "resnet50", "title": "X", "commercial": "yes"}
    assert parse_entry(good, "encoder 'x'").name == "x"
    with pytest.raises(ModelError, match=f"encoder 'x' is no valid encoder: .*{named}"):
        parse_entry(good | change, "encoder 'x'")
