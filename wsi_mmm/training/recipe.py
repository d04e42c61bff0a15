"""The recipe of the default model, from data folder to model folder."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from wsi_mmm.errors import RecipeError
from wsi_mmm.model.card import ModelCard
from wsi_mmm.model.checkpoint import build_model, load_model, save_model
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.tasks import Task, make_task
from wsi_mmm.training import evaluate
from wsi_mmm.training.compose import Composer
from wsi_mmm.training.loop import Feed, Plan, Say, train
from wsi_mmm.training.sampler import Mix, Shelf
from wsi_mmm.training.sources import LabelledImage, SlideSource, StainedTile, load_nuclei, load_tiles, split


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SlideEntry(_Part):
    """A slide of the data folder and the stain of its tissue."""

    file: str
    stain: str
    tiles: int
    mpp: float | None = None


class Recipe(_Part):
    """What ``train_default.toml`` says. ``card`` holds the fields of the model card that are known beforehand."""

    seed: int
    split_seed: int
    steps: int
    crop: int
    nuclei_per_step: int
    tiles_per_step: int
    rate: float
    every: int
    threads: int
    nuclei: str
    tile: int
    slides: tuple[SlideEntry, ...]
    card: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Material:
    """Everything that is learnt from and judged by."""

    learn: list[LabelledImage]
    judge: list[LabelledImage]
    tiles: list[StainedTile]
    judge_tiles: list[StainedTile]


def read_recipe(path: str | Path) -> Recipe:
    """A recipe file. RecipeError names what is wrong with it."""
    try:
        return Recipe.model_validate(tomllib.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"the recipe {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def gather(recipe: Recipe, data: Path, stains: Sequence[str], mpp: float) -> Material:
    """Read and split the material under ``data``."""
    learn, judge = split(load_nuclei(data / recipe.nuclei), recipe.split_seed)
    sources = [SlideSource(str(data / s.file), s.stain, s.tiles, s.mpp) for s in recipe.slides]
    tiles = load_tiles(sources, stains, mpp=mpp, size=recipe.tile, seed=recipe.split_seed)
    return Material(learn, judge, [t for t in tiles if not t.held], [t for t in tiles if t.held])


def train_default(recipe: Recipe, data: str | Path, out: str | Path, say: Say) -> dict[str, Any]:
    """Train, save the model folder ``out``, and judge it as saved on what was held out; returns the figures.

    ``out`` also holds the checkpoint from which an interrupted training goes on.
    """
    folder = Path(out)
    card = ModelCard.model_validate(recipe.card)
    tasks = {task.name: make_task(task) for task in card.tasks}
    stains = [name for name in card.task("stain").classes if name != "other"]
    material = gather(recipe, Path(data), stains, card.mpp)
    say(f"{len(material.learn)} images to learn from, {len(material.judge)} held out")
    say(f"{len(material.tiles)} tiles to learn from, {len(material.judge_tiles)} held out")
    torch.manual_seed(recipe.seed)
    plan = Plan(
        recipe.steps, recipe.seed, Mix(recipe.nuclei_per_step, recipe.tiles_per_step), rate=recipe.rate,
        every=recipe.every, threads=recipe.threads, weights={"nuclei": 1.0, "stain": 0.2},
    )  # fmt: skip
    feed = Feed(
        tasks, Composer(material.learn, material.tiles, tasks=tasks, size=recipe.crop), _shelf(material, len(stains))
    )
    watch = partial(_progress, tasks=tasks, material=material, folder=folder)
    model = train(_begin(card), feed, plan=plan, folder=folder, say=say, evaluate=watch)
    save_model(model, folder)
    figures = judge(load_model(folder), tasks, material)
    save_model(
        load_model(folder), folder, card=card.model_copy(update={"metrics": figures, "data": _data(card, material)})
    )
    return figures


def judge(model: MultiTaskModel, tasks: dict[str, Task], material: Material) -> dict[str, Any]:
    """Figures on what was held out, as they go into the card."""
    nuclei, single = evaluate.nuclei_figures(model, tasks, material.judge)
    stain = evaluate.stain_figures(model, tasks, material.judge_tiles)
    by_look = {
        look: round(sum(single[i.name] for i in some) / len(some), 4)
        for look in ("pale", "purple", "pink")
        if (some := [i for i in material.judge if i.look == look])
    }
    return {
        "nuclei": {
            **{k: round(v, 4) for k, v in nuclei.items()},
            "iou": 0.5,
            "images": len(single),
            "f1_by_look": by_look,
        },
        "stain": {**{k: round(v, 4) for k, v in stain.items()}, "tiles": len(material.judge_tiles)},
    }


def _begin(card: ModelCard) -> MultiTaskModel:
    """Random weights; foreground and depth start as rare."""
    model = build_model(card)
    with torch.no_grad():
        model.get_parameter("heads.nuclei.out.bias").copy_(torch.tensor([-1.5, -1.5, 0.0, 0.0]))
    return model


def _shelf(material: Material, stains: int) -> Shelf:
    numbers = tuple(tuple(i for i, tile in enumerate(material.tiles) if tile.stain == s) for s in range(stains))
    return Shelf(tuple(image.radius for image in material.learn), numbers)


def _progress(model: MultiTaskModel, *, tasks: dict[str, Task], material: Material, folder: Path) -> str:
    """Figures in a line; the model so far is saved beside the checkpoint."""
    save_model(model, folder / "latest")
    figures = judge(model, tasks, material)
    nuclei, stain = figures["nuclei"], figures["stain"]
    looks = f"by look {nuclei['f1_by_look']}"
    return f"held-out F1 {nuclei['f1']} PQ {nuclei['pq']} {looks}; stain accuracy {stain['accuracy']}"


def _data(card: ModelCard, material: Material) -> dict[str, Any]:
    return {
        **card.data,
        "images_learnt": len(material.learn),
        "images_held_out": sorted(image.name for image in material.judge),
        "tiles_learnt": len(material.tiles),
        "tiles_held_out": len(material.judge_tiles),
    }
