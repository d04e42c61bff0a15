"""Zarr: features, maps and tiles between steps, runs and workers. Its reading side *is a Reader* (pixels.py)."""

from wsi_mmm.cache.entry import ArraySpec, CacheEntry
from wsi_mmm.cache.pixels import CachedReader

__all__ = ["ArraySpec", "CacheEntry", "CachedReader"]
