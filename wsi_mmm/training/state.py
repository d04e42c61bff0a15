"""Checkpoints: all that training carries from step to step, as one safetensors file with JSON facts. Never pickle.

A folder (local or ``s3://``) holds ``step-00000200.safetensors`` and so on, and two pointers, ``latest.json`` and
``best.json``. A file is written whole under its name or not at all, a pointer only after its file, so whatever happens
in between, the pointers name whole checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wsi_mmm.errors import ModelError, NotFound, OutputError, WsiError
from wsi_mmm.model.checkpoint import pack_tensors, unpack_tensors
from wsi_mmm.storage import store
from wsi_mmm.storage.base import is_local
from wsi_mmm.training.optim import Optimiser, Scale
from wsi_mmm.training.ranks import ALONE, Ranks, first_message, total

FORMAT = "wsi-mmm-training/1"
LATEST, BEST = "latest", "best"
Facts = Mapping[str, Any]


@dataclass(slots=True)
class Training:
    """The state that changes from step to step. ``average``: moving average of the weights (None: none is kept).
    ``best``: the best value of the named metric so far; ``stale``: validations since. ``skipped``: steps that did not
    count because of NaN; ``lost``: items that could not be read."""

    model: nn.Module
    optimiser: Optimiser
    own: nn.Module
    average: dict[str, Tensor] | None = None
    scale: Scale = field(default_factory=Scale)
    step: int = 0
    best: float | None = None
    stale: int = 0
    skipped: int = 0
    lost: int = 0


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """The folder of checkpoints, the configuration they belong to (JSON values; compared when resuming), and how many
    are kept besides the best one (0: all)."""

    folder: str
    identity: Facts
    keep: int = 2

    @property
    def hash(self) -> str:
        """sha256 hex of the configuration."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def file(self, step: int) -> str:
        """The URI of the checkpoint of a step."""
        return store.join(self.folder, f"step-{step:08d}.safetensors")

    def pointer(self, name: str) -> str:
        """The URI of the pointer "latest" or "best"."""
        return store.join(self.folder, f"{name}.json")


# ------------------------------------------------------------------------------------------- writing
def write(checkpoints: CheckpointStore, training: Training, *, ranks: Ranks = ALONE, best: bool = False) -> str:
    """Write the state after ``training.step`` steps and point "latest" (and "best") at it; returns its URI.

    Every rank must call it, rank 0 writes. OutputError (on every rank) when it cannot; earlier checkpoints are whole.
    """
    tensors = gather(training)
    uri = checkpoints.file(training.step)
    fault = ""
    if ranks.first:
        facts = {name: getattr(training, name) for name in ("step", "best", "stale", "skipped", "lost")}
        facts |= {"scale": [training.scale.value, training.scale.good], "format": FORMAT}
        facts |= {"identity": dict(checkpoints.identity), "hash": checkpoints.hash}
        text = json.dumps({"step": training.step, "best": training.best, "hash": checkpoints.hash})
        try:
            store.write_bytes(uri, pack_tensors(tensors, {"facts": json.dumps(facts, sort_keys=True)}))
            for name in (LATEST, BEST) if best else (LATEST,):
                store.write_bytes(checkpoints.pointer(name), text.encode())
            _delete_old(checkpoints)
        except WsiError as error:
            fault = f"checkpoint of step {training.step}: {error}"
    if total(ranks, [float(bool(fault))])[0]:
        raise OutputError(first_message(ranks, fault))
    return uri


def gather(training: Training) -> dict[str, Tensor]:
    """Every tensor of the state under one flat set of names."""
    found = {f"model.{k}": v for k, v in training.model.state_dict().items()}
    found |= {f"average.{k}": v for k, v in (training.average or {}).items()}
    found |= {f"strategy.{k}": v for k, v in training.own.state_dict().items()}
    found |= {f"optimiser.{k}": v for k, v in training.optimiser.state().items()}
    return found | _random_state()


def _delete_old(checkpoints: CheckpointStore) -> None:
    """Delete all but the newest ``keep`` and the best."""
    if not checkpoints.keep:
        return
    steps = stored(checkpoints)
    spared = {*steps[-checkpoints.keep :], pointed(checkpoints, BEST)}
    for step in steps:
        if step not in spared:
            store.delete(checkpoints.file(step))


def stored(checkpoints: CheckpointStore) -> list[int]:
    """Steps of the checkpoints that are there, ascending."""
    if is_local(checkpoints.folder) and not store.exists(checkpoints.folder):
        return []
    names = (uri.rsplit("/", 1)[-1] for uri in store.list_uris(checkpoints.folder))
    found = (name.removeprefix("step-").removesuffix(".safetensors") for name in names if name.startswith("step-"))
    return sorted(int(number) for number in found if number.isdigit())


def pointed(checkpoints: CheckpointStore, name: str) -> int | None:
    """The step that "latest" or "best" points at; None when there is no such pointer. ModelError if it is damaged."""
    uri = checkpoints.pointer(name)
    try:
        return int(json.loads(store.read_bytes(uri))["step"])
    except NotFound:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{uri} is damaged; remove it to begin anew, or write the step to go on from") from error


# ------------------------------------------------------------------------------------------- reading
def resume(checkpoints: CheckpointStore, training: Training) -> bool:
    """Put ``training`` where the latest checkpoint left it; False when there is none. Every rank reads for itself.

    ModelError: the checkpoint is damaged, or belongs to another configuration (named).
    """
    step = pointed(checkpoints, LATEST)
    if step is None:
        return False
    uri = checkpoints.file(step)
    tensors, facts = read(uri)
    _check_identity(uri, facts["identity"], checkpoints.identity)
    try:
        _restore_training(training, tensors, facts)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        why = str(error).splitlines()[0]
        raise ModelError(f"{uri} does not fit this model ({why}); choose another folder to begin anew") from error
    return True


def read(uri: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint. ModelError if it is missing, damaged or of another format."""
    try:
        tensors, metadata = unpack_tensors(store.read_bytes(uri), uri)
        facts: dict[str, Any] = json.loads(metadata["facts"])
    except NotFound as error:
        raise ModelError(f"{uri} is missing; remove latest.json beside it to begin anew") from error
    except (KeyError, ValueError) as error:
        raise ModelError(f"{uri} is no checkpoint of training; remove it") from error
    if facts.get("format") != FORMAT:
        raise ModelError(f"{uri} is of format '{facts.get('format')}', not '{FORMAT}'; this version cannot read it")
    return tensors, facts


def weights_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's weights in a checkpoint: averaged ones when there are any."""
    return under(tensors, "average.") or under(tensors, "model.")


def best_weights(folder: str) -> tuple[int, dict[str, Tensor]] | None:
    """Step and weights (averaged, if averages are kept) of the best checkpoint in ``folder``; None: none is marked."""
    checkpoints = CheckpointStore(folder, {})
    step = pointed(checkpoints, BEST)
    return None if step is None else (step, weights_of(read(checkpoints.file(step))[0]))


def _check_identity(uri: str, old: Facts, identity: Facts) -> None:
    """ModelError naming what differs between the configuration of a checkpoint and that of this training."""

    def shown(facts: Facts, key: str) -> str:
        text = json.dumps(facts[key]) if key in facts else "absent"
        return text if len(text) <= 60 else text[:57] + "..."

    new = json.loads(json.dumps(dict(identity)))  # as the stored one went: tuples are lists there
    different = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    other = [f"{key} {shown(old, key)} there, {shown(new, key)} here" for key in different]
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise ModelError(
            f"{uri} belongs to another configuration ({'; '.join(other[:3])}{more}); choose another folder, or go back"
        )


def _restore_training(training: Training, tensors: Mapping[str, Tensor], facts: Facts) -> None:
    training.model.load_state_dict(under(tensors, "model."))
    training.own.load_state_dict(under(tensors, "strategy."))
    training.optimiser.restore(under(tensors, "optimiser."))
    if training.average is not None:
        average = under(tensors, "average.")
        for key, value in training.average.items():
            value.copy_(average[key])
    value, good = facts["scale"]
    training.scale = Scale(float(value), int(good), training.scale.every)
    training.step, training.best = int(facts["step"]), facts["best"]
    training.stale, training.skipped, training.lost = (int(facts[k]) for k in ("stale", "skipped", "lost"))
    _restore_random(tensors)


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name begins with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


# ------------------------------------------------------------------------------------------- random states
# Draws, warps and dropout depend on the step's own seeds alone. These are kept for what callbacks may draw.
def _on_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _random_state() -> dict[str, Tensor]:
    found = {"random.torch": torch.get_rng_state()}
    if _on_gpu():
        found["random.cuda"] = torch.cuda.get_rng_state()
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the global state itself is what is kept
    inner = state["state"]
    found["random.numpy"] = torch.from_numpy(np.append(inner["key"].astype(np.int64), inner["pos"]))
    found["random.gauss"] = torch.tensor([float(state["has_gauss"]), float(state["gauss"])], dtype=torch.float64)
    return found


def _restore_random(tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.torch"])
    if _on_gpu() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    words = tensors["random.numpy"].numpy()
    has, gauss = tensors["random.gauss"].tolist()
    state = {"key": words[:-1].astype(np.uint32), "pos": int(words[-1])}
    np.random.set_state(  # noqa: NPY002 - see above
        {"bit_generator": "MT19937", "state": state, "has_gauss": int(has), "gauss": gauss}
    )
