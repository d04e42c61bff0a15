"""The vector of a slide, made of the features that lie in its folder: when it is published, or later by another run."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from functools import lru_cache

from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.stages import workdir
from wsi_mmm.engine.units import SlideSummary, SlideTask
from wsi_mmm.errors import StorageError
from wsi_mmm.model.slide_model import MEAN, SlideModel, mean_vector
from wsi_mmm.outputs.exports import read_attributes, read_feature_blocks
from wsi_mmm.outputs.slide_vectors import SLIDE_FILE, read_slide_vector, slide_h5
from wsi_mmm.storage import store
from wsi_mmm.types import F32, Mask

_lock = threading.Lock()


def slide_facts(recipe: Recipe) -> dict[str, str]:
    """The slide model of a recipe, for slide.json: nothing of time or place."""
    assert recipe.slide is not None
    return {"name": recipe.slide.name, "kind": recipe.slide.kind, "identity": recipe.slide.identity}


def write_vector(task: SlideTask, failed: Mask | None = None) -> str:
    """Write the slide's vector, of all tiles but those in ``failed`` bool[n]; return the name of its file."""
    slide, features = task.recipe.slide, store.join(task.output, "features.zarr")
    assert slide is not None
    vector = _pool_features(slide, task.recipe.user_cache, features, failed)
    facts = {**read_attributes(features), **slide.attributes()}
    store.write_bytes(store.join(task.output, SLIDE_FILE), slide_h5(vector, facts))
    return SLIDE_FILE


def _pool_features(slide: SlideModel, cache: str | None, features: str, failed: Mask | None) -> F32:
    blocks = read_feature_blocks(features, failed)
    if slide.kind == MEAN:
        return mean_vector(blocks)
    with _lock:  # one at a time: each holds a block of tiles and a thread
        return _open_model(slide, cache)(blocks)


@lru_cache(maxsize=2)
def _open_model(slide: SlideModel, cache: str | None) -> Callable[[Iterable[F32]], F32]:
    from wsi_mmm.model.slide_pooling import open_slide_model

    return open_slide_model(slide, cache)


def complete_slide(task: SlideTask, done: SlideSummary) -> SlideSummary:
    """The summary of a slide that an earlier run has published, after its vector was added where it lacks that."""
    recipe = task.recipe
    if recipe.slide is None or "features" not in done.files:
        return done
    place = store.join(task.output, "slide.json")
    found = workdir.read_json(place) or {}
    if found.get("slide") == slide_facts(recipe) and _file_is_of(task.output, recipe.slide):
        return done
    files = found.get("files")
    name = write_vector(task)
    found |= {"files": {**(files if isinstance(files, dict) else {}), "slide": name}, "slide": slide_facts(recipe)}
    store.write_bytes(place, json.dumps(found, indent=1).encode())
    return SlideSummary.from_json(found)


def _file_is_of(folder: str, slide: SlideModel) -> bool:
    """Whether the vector in the folder was made by this model: an earlier run may have ended between two files."""
    try:
        return read_slide_vector(store.join(folder, SLIDE_FILE)).attributes.get("slide_hash") == slide.identity
    except StorageError:
        return False
