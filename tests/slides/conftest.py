"""Synthetic slides as fixtures."""

from helpers.made_slides import board, copy_slide, small_slide

__all__ = ["board", "copy_slide", "small_slide"]
