"""Label nuclei on the tiles of slides with a model that was trained without them, for it to go on learning from.

    python pipelines/default/relabel.py --model runs/default/model --data data/default --out data/default/found

``--data`` is what prepare.py made. For each picture of its background/ a label file comes below ``--out``/labels:
nuclei that the model finds there, a rim round each and what is surely background as 0, and -1 (not learnt from) for
the rest. This is self-training (Lee 2013; Xie et al. 2020, noisy student): labelled images and slides look different,
and a model that has seen slides as background only learns to see no nuclei on them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from wsi_mmm import api
from wsi_mmm.errors import InputError, WsiError
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.tasks import make_task
from wsi_mmm.tasks.instances import Instances
from wsi_mmm.types import I32, U8

TASK = "nuclei"
RIM = 2  # px round a nucleus that are none


def eager(task: Instances, share: float) -> Instances:
    """The task with its thresholds times ``share``."""
    rules = replace(task.rules, foreground=int(task.rules.foreground * share), core=int(task.rules.core * share))
    return replace(task, rules=rules)


def nuclei_of(model: MultiTaskModel, task: Instances, pixels: U8) -> I32:
    """int32[h, w] labels of uint8[h, w, 3]."""
    with torch.inference_mode():
        logits = model(model.prepare(torch.from_numpy(pixels)[None]), [TASK])[TASK]
        return task.labels(task.quantise(logits)[0].numpy())


def merged(found: I32, known: I32, largest: int) -> I32:
    """``found`` labels (those of more than ``largest`` px: unknown; 0: all are sure) over ``known`` (0 no nucleus, -1
    unknown), with a rim of no nucleus round each: what borders on unknown px is not learnt."""
    doubtful = (np.bincount(found.ravel()) > largest)[found] & (found > 0) & (largest > 0)
    sure = np.where(doubtful, 0, found)
    near = ndimage.binary_dilation(sure > 0, iterations=RIM) & ~doubtful
    return np.where(sure > 0, sure, np.where(near, 0, np.where(doubtful, -1, known))).astype(np.int32)


def relabelled(model: MultiTaskModel, folder: Path, share: float, largest: int) -> Iterator[tuple[str, I32]]:
    """(name, labels) of every picture of ``folder``; see `eager` and `merged`."""
    task = next((make_task(card) for card in model.card.tasks if card.name == TASK), None)
    if not isinstance(task, Instances):
        raise InputError(f"the model has no task '{TASK}' of kind instances; give one that train.toml made")
    task = eager(task, share)
    paths = sorted((folder / "images" / "train").glob("*.png"))
    if not paths:
        raise InputError(f"{folder} has no pictures; run prepare.py first")
    for path in paths:
        label = folder / "labels" / "train" / path.stem
        if not label.with_suffix(".npy").exists():
            raise InputError(f"{label}.npy is missing; run prepare.py again")
        known = np.load(label.with_suffix(".npy"), allow_pickle=False).astype(np.int32)
        empty = path.stem.startswith("empty-")
        with Image.open(path) as picture:
            pixels = np.array(picture.convert("RGB"))
        yield path.stem, known if empty else merged(nuclei_of(model, task, pixels), known, largest)


def main() -> int:
    """Exit code 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--data", type=Path, default=Path("data/default"), help="what prepare.py made")
    parser.add_argument("--out", type=Path, default=Path("data/default/found"), help="where labels/train/ is made")
    parser.add_argument("--eager", type=float, default=0.8, help="thresholds, in shares of a run's: pale nuclei count")
    parser.add_argument("--largest", type=int, default=540, help="px; what is larger is unknown (median nucleus: 150)")
    args = parser.parse_args()
    nuclei, pictures = 0, 0
    try:
        place = args.out / "labels" / "train"
        place.mkdir(parents=True, exist_ok=True)
        model = api.load_model(args.model).eval()
        for name, labels in relabelled(model, args.data / "background", args.eager, args.largest):
            np.save(place / f"{name}.npy", labels.astype(np.int16))
            nuclei, pictures = nuclei + np.unique(labels[labels > 0]).size, pictures + 1
    except (OSError, WsiError) as error:  # a full disk, a damaged picture
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{nuclei} nuclei on {pictures} pictures in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
