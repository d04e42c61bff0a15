"""The recipe: everything a result depends on, and what it does not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from wsi_mmm.errors import OptionError
from wsi_mmm.model.identity import FULL_PRECISION, RUNTIME_OF_PRECISION
from wsi_mmm.model.recipe import EncoderRecipe, parse_recipe
from wsi_mmm.model.registry import EncoderEntry, describe_licence, find_entry
from wsi_mmm.model.slide_model import SlideModel
from wsi_mmm.options import BLOCK_TILES, RUN_OPTIONS, TISSUE_WORDS, Affects, RunOptions, recipe_names
from wsi_mmm.storage import store

MOST_TILE = 8192  # px of a tile's side: 200 MB of pixels
OFF_SCALE = 1.1  # ratio of resolutions from which on objects look clearly larger or smaller than those learnt from
RESULT_FORMAT = 3  # raised when the same recipe would give other objects or other files
_RESOLVED = {"mpp": "mpp", "tile_size": "tile", "overlap": "overlap", "block_tiles": "block_tiles"}
"""Options that the model decides when the user does not: the fields of a recipe that hold what they came to."""
_REPORTED = [o.name for o in RUN_OPTIONS if o.per != "run" and o.name not in _RESOLVED]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The model and the options that turn slides into results.

    ``model``: name or path of a model, or of a bare encoder when ``encoder`` is true; ``model_hash`` identifies its
    weights; ``network``: how a bare encoder makes vectors, with ``weights`` as the user named them. ``model_mpp``:
    resolution at which it learnt, None: unknown. ``mpp`` micrometres per target px; ``tile``/``overlap`` target px;
    ``block_tiles``: rows and columns of tiles in a block. ``options``: what the user asked for, with paths made
    absolute. ``user_cache``: folder, on the machine that works, of what is kept per user (``~`` is that machine's);
    None keeps nothing.

    ``script``: the model is TorchScript (`model.wsinfer`), which answers per tile alone.

    ``companions``: output folder and recipe of further encoders that see the same tiles, whose values are computed as
    the tiles are read. ``after_others``: an earlier run of the same request may have computed values of this recipe,
    which ``force`` then leaves.

    ``slide``: makes a vector of each slide from those of its tiles. It is in no hash: slide.json says which one did,
    and another makes its vectors from the features that are there.
    """

    model: str
    model_hash: str
    tasks: tuple[str, ...]
    mpp: float
    tile: int
    overlap: int
    block_tiles: int = BLOCK_TILES
    options: RunOptions = field(default_factory=RunOptions)
    encoder: bool = False
    weights: str | None = None
    network: EncoderRecipe | None = field(default=None, hash=False)
    user_cache: str | None = None
    model_mpp: float | None = None
    companions: tuple[tuple[str, Recipe], ...] = ()
    after_others: bool = False
    script: bool = False
    slide: SlideModel | None = None
    _result_hashes: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 16 <= self.tile <= MOST_TILE or not 0 <= self.overlap < self.tile:
            sizes = f"tile size {self.tile} px and overlap {self.overlap} px"
            bounds = f"tiles have 16 to {MOST_TILE} px and overlap by less than themselves"
            raise OptionError(f"{sizes} do not fit: {bounds}")
        if self.tasks and not self.script:
            self._check_map_sizes()

    def _check_map_sizes(self) -> None:
        """Maps of neighbouring tiles must lie on one grid of map pixels (strides up to 8, encoders down to 32)."""
        if self.tile < 64 or self.tile % 32:
            raise OptionError(f"tile size must be a multiple of 32 px of at least 64, not {self.tile}")
        if not 0 <= self.overlap <= self.tile // 2 or self.overlap % 8:
            raise OptionError(f"overlap must be a multiple of 8 px and at most half a tile, not {self.overlap}")

    def warnings(self) -> tuple[str, ...]:
        """Return what a user should know before the run begins, a line each: a licence that forbids some uses, a
        resolution that is far off."""
        licence = () if self._is_permissive() else self._licence_lines()
        return (*licence, *self._slide_lines(closed=True), *self._script_lines(), *self._scale_warnings())

    def remarks(self) -> tuple[str, ...]:
        """Return what is said before the run begins and is no warning: a licence that permits commercial use,
        what is taken for granted of the slide model."""
        licence = self._licence_lines() if self._is_permissive() else ()
        source = self.slide.describe_source(store.redact(self.model)) if self.slide is not None else ""
        return (*licence, *self._slide_lines(closed=False), *([source] if source else ()))

    def _slide_lines(self, *, closed: bool) -> tuple[str, ...]:
        """The licence of the slide model, if it forbids commercial use as ``closed`` says."""
        line, forbids = self.slide.describe_licence() if self.slide is not None else ("", False)
        return (line,) if line and forbids == closed else ()

    def _script_lines(self) -> tuple[str, ...]:
        shown = store.redact(self.model)
        code = "is TorchScript, which is code of its authors: it runs in a process of its own (docs/security.md)"
        return (f"{shown} {code}",) if self.script else ()

    def _licence_lines(self) -> tuple[str, ...]:
        entry = self._published_encoder()
        return (describe_licence(entry),) if entry is not None else ()

    def _is_permissive(self) -> bool:
        entry = self._published_encoder()
        return entry is not None and entry.commercial == "yes"

    def _published_encoder(self) -> EncoderEntry | None:
        return find_entry(self.network.name) if self.network is not None else None

    def warns_of_scale(self) -> bool:
        """Return whether `warnings` say that the resolution is far off."""
        return bool(self._scale_warnings())

    def _scale_warnings(self) -> tuple[str, ...]:
        if self.model_mpp is None or 1 / OFF_SCALE <= self.mpp / self.model_mpp <= OFF_SCALE:
            return ()
        seen = "smaller" if self.mpp > self.model_mpp else "larger"
        ratio = max(self.mpp / self.model_mpp, self.model_mpp / self.mpp)
        asked = f"{store.redact(self.model)} learnt at {self.model_mpp:g} mpp and is to work at {self.mpp:g} mpp"
        return (
            f"{asked}: it sees everything {ratio:.3g} times {seen} and will miss or mistake much of it; "
            f"use --mpp {self.model_mpp:g} (Python: mpp={self.model_mpp:g})",
        )

    def forward_hash(self, kind: str, scale: tuple[float, float], reader: str = "", listed: str = "") -> str:
        """Return the hash of all that the network's values depend on.

        ``kind``: the kind of device ("cpu", "cuda"); ``scale``: level-0 px per target px (x, y), which a user who
        corrects a slide's mpp changes; ``reader``: the reader that opened the slide, because readers differ in the
        levels and scales they read; ``listed``: the digest of the list that the tiles are from, if they are.
        """
        facts: dict[str, object] = {"device": kind, "scale": scale, "reader": reader, "runtime": self.runtime_on(kind)}
        return self._hash_options("values", facts | ({"listed": listed} if listed else {}))

    def runtime_on(self, kind: str) -> str:
        """Return the runtime on a kind of device ("cpu", "cuda"): the one asked for, else the precision that the entry
        of a published encoder names on a GPU, and float32 everywhere else."""
        if self.options.runtime != "auto":
            return self.options.runtime
        return self._reduced_runtime() if kind == "cuda" else FULL_PRECISION

    def _reduced_runtime(self) -> str:
        return RUNTIME_OF_PRECISION[self.network.precision] if self.network is not None else FULL_PRECISION

    def _runtime_text(self) -> str:
        """The runtime as a result depends on it, wherever that is computed."""
        reduced = self._reduced_runtime()
        automatic = reduced if reduced == FULL_PRECISION else f"{reduced} on a GPU"
        return automatic if self.options.runtime == "auto" else self.options.runtime

    def result_hash(self, reader: str = "") -> str:
        """Return the hash of all that the published files depend on; ``reader``: the reader that opened the slide.

        The contents of files that say where to look are compared apart.
        """
        if reader not in self._result_hashes:  # every unit asks
            tissue = self.options.tissue if self.options.tissue in TISSUE_WORDS else "file"
            regions = "file" if self.options.regions else None
            facts = {"tissue": tissue, "regions": regions, "reader": reader, "runtime": self._runtime_text()}
            self._result_hashes[reader] = self._hash_options("result", facts)
        return self._result_hashes[reader]

    def _hash_options(self, affects: Affects, resolved: Mapping[str, object]) -> str:
        """Hash model, tasks, the options that have this effect, and ``resolved`` facts in place of options."""
        facts = {name: getattr(self.options, name) for name in recipe_names(affects)}
        facts |= {name: getattr(self, own) for name, own in _RESOLVED.items() if name in facts}
        facts |= {"format": RESULT_FORMAT, "model_hash": self.model_hash, "tasks": self.tasks, **resolved}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    def to_json(self) -> dict[str, object]:
        """Return the recipe as a flat JSON object, for reports and workers."""
        return self._model_facts() | {
            "block_tiles": self.block_tiles, "weights": self.weights, "user_cache": self.user_cache,
            "model_mpp": self.model_mpp,
            **{name: getattr(self.options, name) for name in _REPORTED},
            **({"companions": [[place, one.to_json()] for place, one in self.companions]} if self.companions else {}),
            **({"after_others": True} if self.after_others else {}),
            **({"script": True} if self.script else {}),
            **({"slide": asdict(self.slide)} if self.slide is not None else {}),
        }  # fmt: skip

    def published(self) -> dict[str, object]:
        """Return the part of the recipe that a result depends on, for slide.json: nothing of time or place."""
        names = [name for name in recipe_names("result") if name not in _RESOLVED]
        facts = self._model_facts() | {name: getattr(self.options, name) for name in names}
        return facts | {"runtime": self._runtime_text()}

    def _model_facts(self) -> dict[str, object]:
        names = ("model", "model_hash", "tasks", "mpp", "tile", "overlap", "encoder")
        network = {"network": self.network.model_dump(mode="json")} if self.network is not None else {}
        return {name: getattr(self, name) for name in names} | network


def recipe_from_json(facts: Mapping[str, Any]) -> Recipe:
    """Return the recipe that `Recipe.to_json` described; options of the run (workers, scheduler) are not in it."""
    own = {name: value for name, value in facts.items() if name not in _REPORTED}
    options = RunOptions(**{name: facts[name] for name in _REPORTED})
    network = parse_recipe(own.pop("network")) if "network" in own else None
    companions = tuple((place, recipe_from_json(one)) for place, one in own.pop("companions", ()))
    own["tasks"] = tuple(facts["tasks"])
    slide = SlideModel(**own.pop("slide")) if "slide" in own else None
    return Recipe(**own, network=network, options=options, companions=companions, slide=slide)
