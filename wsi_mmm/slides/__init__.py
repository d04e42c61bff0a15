"""From a URI to pixels: the Reader port, its adapters, and storage."""

from wsi_mmm.slides.base import Reader, ReadStats, Slide
from wsi_mmm.slides.registry import open_slide

__all__ = ["ReadStats", "Reader", "Slide", "open_slide"]
