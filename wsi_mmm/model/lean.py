"""Importing timm without torch's compiler, which nothing of ours needs unless ``--runtime compile`` asks for it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any

import torch

_UTILS = "torch._dynamo.utils"


@contextmanager
def without_compiler() -> Iterator[None]:
    """What is imported meanwhile does not load ``torch._dynamo`` (nor sympy, nor triton) before it uses it.

    Of the 3.5 s of importing torch and timm that takes 1.4: for one function that torchvision's detectors call when
    they are built, and for a mark on five methods of timm that tells the compiler to leave them alone.
    """
    if _UTILS in sys.modules:
        yield
        return
    stand_in, disable = _Utils(_UTILS), torch.compiler.disable
    sys.modules[_UTILS] = stand_in
    torch.compiler.disable = functools.partial(_disabled_later, disable)
    try:
        yield
    finally:
        torch.compiler.disable = disable
        if sys.modules.get(_UTILS) is stand_in:
            del sys.modules[_UTILS]


class _Utils(ModuleType):
    """In place of ``torch._dynamo.utils``: one function that costs nothing until it is called; all else loads it."""

    @staticmethod
    def is_compile_supported(device_type: Any) -> Any:
        """As the original."""
        return _original().is_compile_supported(device_type)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system looks for __path__ and __spec__
            raise AttributeError(name)
        return getattr(_original(), name)


def _original() -> Any:
    if isinstance(sys.modules.get(_UTILS), _Utils):
        del sys.modules[_UTILS]
    return import_module(_UTILS)


def _disabled_later(disable: Callable[..., Any], fn: Any = None, recursive: bool = True, **reason: Any) -> Any:
    """As ``torch.compiler.disable``; of a plain function it marks a wrapper as the compiler does, and loads nothing."""
    if type(fn) is not FunctionType or not recursive:
        return disable(fn, recursive, **reason)

    @functools.wraps(fn)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        if _UTILS not in sys.modules:  # nothing can be compiling
            return fn(*arguments, **options)
        return disable(fn, **reason)(*arguments, **options)

    for name, value in (("", True), ("_msg", reason.get("reason")), ("_recursive", True)):
        setattr(wrapper, f"_torchdynamo_disable{name}", value)
    return wrapper
