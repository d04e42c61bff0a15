"""Published encoders by name: read from ``encoders.json``, which is data, or offered by packages. No torch here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from wsi_mmm.errors import ModelError, PluginError
from wsi_mmm.model.recipe import EncoderRecipe, parse_recipe
from wsi_mmm.plugins import load_plugin, plugin_names, plugin_package

if TYPE_CHECKING:
    from torch import nn

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
    def page(self) -> str:
        """The address of its page on the hub, where the terms of a gated one are accepted, else its first source."""
        return (
            f"https://huggingface.co/{self.recipe.hub_id}" if self.recipe.hub_id else "".join(self.recipe.sources[:1])
        )


@dataclass(frozen=True, slots=True)
class EncoderPlugin:
    """An encoder with code of its own: the object that an entry point of the group ``wsi_mmm.encoders`` names.

    ``entry``: its facts, with the keys of an encoder in ``encoders.json``; architecture, arguments, key_map, registers
    and pooling are left out, since the code decides them. ``build``: the file of its weights (None: random ones) -> the
    module, float32[n, 3, h, w] normalised -> float[n, dimension]; or a `PyramidEncoder`, if it has maps for decoders.
    The module is called by several threads at once. docs/extending.md shows a package.
    """

    entry: Mapping[str, Any]
    build: Callable[[Path | None], nn.Module]


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


def load_encoder_plugin(name: str) -> EncoderPlugin:
    """The object that an installed package offers as the encoder ``name``. PluginError: of another type."""
    found = load_plugin("encoders", name)
    if not isinstance(found, EncoderPlugin):
        raise PluginError(
            f"the encoder {name!r} of {plugin_package('encoders', name)} is no wsi_mmm.model.registry.EncoderPlugin: "
            "see 'An encoder' in docs/extending.md"
        )
    return found


def plugin_entry(name: str) -> EncoderEntry:
    """The facts of the encoder that an installed package offers as ``name``. PluginError: they cannot be used."""
    package = plugin_package("encoders", name)
    if not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", name) or name in encoder_entries():
        why = "is taken" if name in encoder_entries() else "is none: use small letters, digits, '-' and '.'"
        raise PluginError(f"{package} offers an encoder by the name {name!r}, which {why}")
    raw = load_encoder_plugin(name).entry
    fixed = {"name": name, "architecture": name, "pooling": "native", "package": package}
    where = f"the entry of the encoder {name!r} of {package}"
    try:
        for key in (*fixed, "arguments", "key_map", "registers"):
            if key in raw and raw[key] != fixed.get(key):
                raise PluginError(f"{where} has {key} {raw[key]!r}: leave it out")
        entry = parse_entry({**raw, **fixed}, where)
    except (ModelError, TypeError, AttributeError) as error:
        raise PluginError(f"{where} cannot be used: {error}") from error
    recipe = entry.recipe
    if not recipe.dimension or recipe.mean is None or recipe.std is None or not recipe.licence:
        raise PluginError(f"{where} must say licence, mean, std and dimension")
    return entry


def offered_entries() -> tuple[list[EncoderEntry], list[str]]:
    """The encoders that installed packages offer, and a line for each that cannot be used."""
    found, faults = [], []
    for name in plugin_names("encoders"):
        try:
            found.append(plugin_entry(name))
        except PluginError as error:
            faults.append(str(error))
    return found, faults


def find_entry(name: str) -> EncoderEntry | None:
    """The encoder called ``name``; capitals and underscores do not matter (``UNI2_h``). None: nobody offers it.

    PluginError: that of a package, which cannot be used.
    """
    plain = name.lower().replace("_", "-")
    for offered in plugin_names("encoders"):
        if plain == offered.lower().replace("_", "-"):
            return plugin_entry(offered)
    return encoder_entries().get(plain)


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

    known = [*encoder_entries().values(), *offered_entries()[0]]
    scored = sorted(((likeness(entry), entry.name) for entry in known), key=lambda s: -s[0])
    return [near for score, near in scored[:_NEAR] if score >= _ALIKE]


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
    return "; ".join(filter(None, (f"{entry.title}: licence {entry.recipe.licence} ({use})", entry.page)))
