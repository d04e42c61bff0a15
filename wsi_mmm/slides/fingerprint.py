"""A slide's fingerprint: a hash of its content. Equal bytes have equal fingerprints, on any storage."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from hashlib import blake2b

from wsi_mmm.storage.store import ByteStore

_ENDS = 64 << 10
_SAMPLE = 16 << 10
_SAMPLES = 16


def fingerprint_of(store: ByteStore) -> str | Callable[[], str]:
    """Return the fingerprint, or for a remote store what finds it later: opening need not wait for 16 more requests."""
    return cache(partial(fingerprint, store)) if store.remote else fingerprint(store)


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
