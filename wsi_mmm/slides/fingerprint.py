"""A slide's fingerprint: a hash of its content. Equal bytes have equal fingerprints, on any storage."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from hashlib import blake2b

from wsi_mmm.storage.store import ByteStore

_ENDS = 64 << 10
_SAMPLE = 16 << 10
_SAMPLES = 16


def fingerprint_of(store: ByteStore, scene: int | None = None) -> str | Callable[[], str]:
    """Return the fingerprint, or for a remote store what finds it later: opening need not wait for 16 more requests.

    ``scene``: the number of an image that is read in place of the file's usual one: another slide."""
    return cache(partial(_scene_fingerprint, store, scene)) if store.remote else _scene_fingerprint(store, scene)


def _scene_fingerprint(store: ByteStore, scene: int | None) -> str:
    mark = fingerprint(store)
    return mark if scene is None else blake2b(f"{mark},scene {scene}".encode(), digest_size=16).hexdigest()


def fingerprint(store: ByteStore) -> str:
    """Return 32 hex characters of BLAKE2b over the size, both ends (64 KB) and 16 samples of 16 KB, evenly spaced."""
    size = store.size
    inner = max(0, size - _SAMPLE)
    ranges = [(0, _ENDS), (max(0, size - _ENDS), _ENDS)]
    ranges += [(inner * (n + 1) // (_SAMPLES + 1), _SAMPLE) for n in range(_SAMPLES)]
    digest = blake2b(str(size).encode(), digest_size=16)
    for part in store.get_ranges(ranges):
        digest.update(part)
    return digest.hexdigest()
