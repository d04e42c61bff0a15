"""Published encoders by name: read from ``encoders.json``, which is data. No torch here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from wsi_mmm.errors import ModelError
from wsi_mmm.model.recipe import EncoderRecipe, parse_recipe

REGISTRY_FORMAT = "wsi-mmm-encoders/1"
_FILE = Path(__file__).with_name("encoders.json")
_ALIKE = 0.6
_NEAR = 3

Commercial = Literal["yes", "no", "conditions", "unknown"]


class EncoderEntry(BaseModel):
    """A published encoder. ``commercial``: whether its licence permits commercial use, as far as its text says.

    ``note``: what differs between its users. ``unknown``: facts for which no second independent source was found.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: EncoderRecipe
    title: str
    commercial: Commercial
    note: str = ""
    unknown: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name that ``--encoder`` takes."""
        return self.recipe.name

    @property
    def hub_url(self) -> str:
        """The address of its page, where the terms of a gated one are accepted."""
        return f"https://huggingface.co/{self.recipe.hub_id}"


def parse_entry(raw: Mapping[str, Any], source: str) -> EncoderEntry:
    """Check one entry in JSON: the fields of a recipe beside those of `EncoderEntry`. ModelError names the fault."""
    own = EncoderEntry.model_fields.keys() - {"recipe"}
    recipe = parse_recipe({key: value for key, value in raw.items() if key not in own}, source)
    try:
        return EncoderEntry(recipe=recipe, **{key: value for key, value in raw.items() if key in own})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "entry"
        raise ModelError(f"{source} is no valid encoder: {where}: {first['msg']}") from error


@cache
def encoder_entries() -> Mapping[str, EncoderEntry]:
    """Every published encoder by its name, as the file lists them. ModelError: the installed file is damaged."""
    try:
        raw = json.loads(_FILE.read_text(encoding="utf-8"))
        found = [parse_entry(one, f"encoder '{one.get('name')}'") for one in raw["encoders"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"the list of encoders {_FILE} cannot be read ({error}): install the package again") from error
    if raw.get("format") != REGISTRY_FORMAT:
        raise ModelError(f"the list of encoders {_FILE} is not of format {REGISTRY_FORMAT}: install the package again")
    return {entry.name: entry for entry in found}


def find_entry(name: str) -> EncoderEntry | None:
    """The encoder called ``name``; capitals and underscores do not matter (``UNI2_h``). None: not in the registry."""
    return encoder_entries().get(name.lower().replace("_", "-"))


def near_names(name: str) -> list[str]:
    """Names of the registry that resemble ``name``, or whose repository it names, best first, at most three."""
    wanted = _plain_name(name)

    def likeness(entry: EncoderEntry) -> float:
        repository = _plain_name(entry.recipe.hub_id)
        if wanted in (repository, repository.split("/")[-1]):
            return 2.0
        known = _plain_name(entry.name)
        ratio = SequenceMatcher(None, wanted, known).ratio()
        return 0.7 + 0.3 * ratio if len(wanted) > 2 and (wanted in known or known in wanted) else ratio

    scored = sorted(((likeness(entry), entry.name) for entry in encoder_entries().values()), key=lambda s: -s[0])
    return [known for score, known in scored[:_NEAR] if score >= _ALIKE]


def _plain_name(name: str) -> str:
    """``hf-hub:Org/Model_v2`` as ``org/model2``: what is left when habits of writing are taken off."""
    plain = name.lower().removeprefix("hf-hub:").removeprefix("hf_hub:")
    return re.sub(r"v(?=\d)", "", re.sub(r"[_-]", "", plain))


def suggest_encoders(name: str) -> str:
    """The end of a message about an unknown encoder: near names, and where all are listed."""
    near = near_names(name)
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{guess}wsi-mmm models encoders lists the published ones"


def describe_licence(entry: EncoderEntry) -> str:
    """One line about what the licence of an encoder permits, said when it is used."""
    use = {
        "yes": "commercial use is permitted",
        "no": "no commercial use",
        "conditions": "conditions apply, read them",
        "unknown": "sources disagree: ask its authors before any use",
    }[entry.commercial]
    return f"{entry.title}: licence {entry.recipe.licence} ({use}); {entry.hub_url}"
