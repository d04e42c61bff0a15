"""Bounds on what a model card from anywhere may ask for, before anything is built by it."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from wsi_mmm.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

MAX_WIDTH = 16_384
"""Channels of any layer, and any other number among the arguments of an encoder."""
MAX_LAYERS = 1_024
MAX_IMAGE = 4_096
"""Side of the pictures that an encoder is made for, px: positions are as many as its square."""
MAX_TASKS = 256
MAX_CLASSES = 4_096
MAX_ARGUMENTS = 1_000
"""Values among the arguments of an encoder."""
MAX_CARD_BYTES = 64 << 20

_LAYERS = ("depth", "depths", "layers", "num_layers")
_IMAGE = ("img_size", "input_size", "pretrain_img_size")
_SPARE_TENSORS, _SPARE_NUMBERS = 1_000, 10_000_000


class _TooManyParameters(BaseException):
    """Passes through what foreign code catches."""


def check_arguments(args: Mapping[str, Any]) -> None:
    """ValueError naming the first argument of an encoder that asks for more than any network has."""
    values = [(key, value) for key, one in args.items() for value in _flat_values(one)]
    if len(values) > MAX_ARGUMENTS:
        raise ValueError(f"{len(values):,} values among the arguments, more than {MAX_ARGUMENTS:,}")
    for key, value in values:
        if isinstance(value, int | float) and not isinstance(value, bool):
            most = MAX_IMAGE if key in _IMAGE else MAX_WIDTH
            if not math.isfinite(value) or abs(value) > most:
                raise ValueError(f"{key} is {value:g}: at most {most:,}")
    for key in _LAYERS:
        count = sum(value for name, value in values if name == key and isinstance(value, int | float))
        if count > MAX_LAYERS:
            raise ValueError(f"{key} makes {count:,} layers: at most {MAX_LAYERS:,}")


def _flat_values(value: Any) -> Iterator[Any]:
    """The values of nested lists and tables, one by one."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
        else:
            yield one


@contextmanager
def bounded_parameters(tensors: int, numbers: int, source: str) -> Iterator[None]:
    """Let the calling thread build no network of many more parameters than its weights have: ``tensors`` and
    ``numbers`` are those of the file ``source``. ModelError as soon as there are twice as many."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    owner, made = threading.get_ident(), [0, 0]
    most = (2 * tensors + _SPARE_TENSORS, 2 * numbers + _SPARE_NUMBERS)

    def count_parameter(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        if threading.get_ident() == owner and parameter is not None:
            made[0], made[1] = made[0] + 1, made[1] + parameter.numel()
            if made[0] > most[0] or made[1] > most[1]:
                raise _TooManyParameters

    handle = register_module_parameter_registration_hook(count_parameter)
    try:
        yield
    except _TooManyParameters as error:
        raise ModelError(
            f"the model card describes a network of more than {made[1]:,} parameters in {made[0]:,} tensors, "
            f"the weights {source} hold {numbers:,} in {tensors:,}: card and weights are not of one model"
        ) from error
    finally:
        handle.remove()
