"""Weights that were read for their hash and wait in memory for the model that is made of them. No torch here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_lock = threading.Lock()
_kept: dict[Path, tuple[dict[str, Any], str]] = {}
_scopes: list[object] = []


@contextmanager
def keep_weights() -> Iterator[None]:
    """A context in which a request may read weights ahead, as it is executed in this process: they are read once.

    Without it they are read for their hash, and again when they are loaded. What no model took is dropped at its end.
    """
    scope = object()
    with _lock:
        _scopes.append(scope)
    try:
        yield
    finally:
        with _lock:
            _scopes.remove(scope)
            if not _scopes:
                _kept.clear()


def may_keep() -> bool:
    """True within `keep_weights`, in whatever thread."""
    return bool(_scopes)


def put_weights(path: Path, tensors: dict[str, Any], sha256: str) -> None:
    """Keep the tensors of a file, in place of those that were read of it before."""
    with _lock:
        if _scopes:
            _kept[path] = tensors, sha256


def peek_weights(path: Path) -> dict[str, Any]:
    """The tensors that are kept of a file, which stay; empty when there are none."""
    with _lock:
        return _kept[path][0] if path in _kept else {}


def take_weights(path: Path) -> tuple[dict[str, Any], str] | None:
    """The tensors that were kept of a file, and the sha256 of its bytes, for one model; None when there are none."""
    with _lock:
        return _kept.pop(path, None)
