"""Tissue detection on a small picture of a slide: pure functions of pixels, deterministic, nothing learned.

Three things tell tissue from glass: it absorbs light (optical density above the *local* background, so that shading
and stitching steps count as background), it is coloured, and it is finely textured. Shade has the first
without the last; an ink stroke has the first two without the last, in a colour that textured tissue does not have.
Lengths are given in micrometres and turned into pixels by ``um_per_px``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from wsi_mmm.types import F32, F64, U8, Mask

GLASS_DENSITY = 0.45
"""Glass absorbs less than this (natural log units; 0.45 is grey level 162 of 255)."""

GLASS_CHROMA = 0.12
"""The channels of glass differ by less than this in optical density, whatever the white balance."""

SHADE_CHROMA = 0.03
"""Shade has the colour of the glass to within this."""

SHADE_DEPTH = 0.3
"""Smooth grey that is darker than the glass by less than this is shade."""

FOREIGN = 3.0
"""A colour is no tissue's when that many times more smooth than textured pixels have it."""

DEFAULT_GLASS = -math.log(245 / 256)
"""Assumed where a picture shows no glass at all."""

SPECK_UM2 = 10_000.0
"""Smaller things are dust, on a slide of ordinary size (a square of 100 micrometres)."""

OPTICAL_DENSITY: F32 = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)
"""Of each grey level."""

WINDOW_UM = 72.0
"""Side of the window in which texture is counted: a few cells wide."""


@dataclass(frozen=True, slots=True)
class PixelFeatures:
    """Per-pixel float32[h, w] maps (``density`` float32[h, w, 3]: optical density above the local glass).

    ``depth``: mean density of the channels; ``chroma``: their spread; ``texture``: share of finely structured
    pixels around (0 to 1). ``has_glass``: whether bare glass was seen at all.
    """

    density: F32
    depth: F32
    chroma: F32
    texture: F32
    has_glass: bool


def find_tissue(rgb: U8, um_per_px: float = 8.0) -> Mask:
    """Mask bool[h, w] of the tissue on uint8[h, w, 3]: all True for a picture full of tissue, all False for glass.

    ``um_per_px`` may be a guess: it only sets the sizes of windows and of what is too small to keep.
    """
    window = max(5, 2 * round(WINDOW_UM / um_per_px / 2) + 1)
    features = _measure_features(rgb, window)
    weak, seed = _tissue_candidates(features)
    ink = _find_ink(features, weak, um_per_px)
    mask = _apply_hysteresis(weak & ~ink, seed & ~ink)
    return _tidy_mask(mask, features, um_per_px)


def _measure_features(rgb: U8, window: int) -> PixelFeatures:
    density = OPTICAL_DENSITY[rgb]
    mean = mean_of(density)
    texture = _local_texture(mean, window)
    glass = _glass_colour(density, mean, texture)
    density -= DEFAULT_GLASS if glass is None else glass
    return PixelFeatures(
        density=density,
        depth=mean_of(density),
        chroma=spread_of(density),
        texture=texture,
        has_glass=glass is not None,
    )


def mean_of(pixels: F32) -> F32:
    """The mean of three channels; numpy's own along an axis of three takes ten times as long."""
    return np.asarray((pixels[..., 0] + pixels[..., 1] + pixels[..., 2]) / np.float32(3), np.float32)


def spread_of(pixels: F32) -> F32:
    """The largest of three channels less the smallest."""
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    largest = np.maximum(np.maximum(red, green), blue)
    return np.asarray(largest - np.minimum(np.minimum(red, green), blue), np.float32)


def _local_texture(mean: F32, window: int) -> F32:
    """Share of pixels in the window that differ from their 3 x 3 surroundings by more than noise or smooth edges do."""
    fine = np.abs(mean - ndimage.uniform_filter(mean, 3))
    bright = fine[mean < GLASS_DENSITY]
    # The quietest tenth of bright pixels tells the noise of the camera: 0.126 sigma, were it Gaussian.
    noise = np.percentile(bright, 10) / 0.126 if bright.size else 0.0
    busy = fine > np.clip(3 * noise, 0.01, 0.03) + 0.03 * ndimage.uniform_filter(mean, 5)
    return np.asarray(ndimage.uniform_filter(busy.astype(np.float32), window), np.float32)


def _glass_colour(density: F32, mean: F32, texture: F32) -> F32 | None:
    """Optical density float32[h, w, 3] of smooth, bright, neutral px nearby, else the slide's; None without glass."""
    spread = spread_of(density)
    smooth = (texture < 0.05) & (mean < GLASS_DENSITY) & (spread < GLASS_CHROMA)
    enough = max(50, 0.001 * smooth.size)
    if smooth.sum() < enough:
        return None
    # Pure white is mostly what a scanner writes where it did not look; glass that is there tells more.
    scanned = smooth & (mean > 0)
    smooth = scanned if scanned.sum() >= enough else smooth
    reference = _histogram_mode(density, mean, smooth)
    offset = density - reference
    neutral = spread_of(offset) < SHADE_CHROMA
    glass = smooth & neutral & (mean_of(offset) < SHADE_DEPTH)
    return _mode_spread(density, glass, reference)


def _histogram_mode(density: F32, mean: F32, smooth: Mask) -> F32:
    """The commonest colour of smooth bright pixels: the mean around the highest peak of their density histogram."""
    values = mean[smooth]
    counts, edges = np.histogram(values, bins=np.arange(0, GLASS_DENSITY + 0.02, 0.01))
    # Glass is the brightest thing on a slide, so of two peaks of like height the brighter one is it.
    peak = int(np.flatnonzero(counts >= 0.3 * counts.max())[0])
    near = np.abs(values - (edges[peak] + 0.005)) <= 0.01
    return np.asarray(np.median(density[smooth][near], axis=0), np.float32)


def _mode_spread(density: F32, glass: Mask, reference: F32) -> F32:
    """The glass colour carried smoothly over the whole picture from pixels ``glass``, ``reference`` far from any."""
    weight = glass.astype(np.float32)
    layers = np.concatenate([(density - reference) * weight[..., None], weight[..., None]], axis=2)
    small = _shrink_image(layers, 4)
    # Each scale counts as far as it saw glass; the constant lets the reference win where none did.
    seen = ndimage.gaussian_filter(small, (2, 2, 0)) + 0.02 * ndimage.gaussian_filter(small, (12, 12, 0))
    field = np.repeat(np.repeat(seen[..., :3] / (seen[..., 3:] + 1e-4), 4, axis=0), 4, axis=1)
    field = ndimage.uniform_filter(field, (5, 5, 1))[: weight.shape[0], : weight.shape[1]]
    return np.asarray(reference + field, np.float32)


def _shrink_image(layers: F32, factor: int) -> F32:
    """Means over ``factor`` x ``factor`` px, the last ones of repeated edge px."""
    height, width, depth = layers.shape
    layers = np.pad(layers, ((0, -height % factor), (0, -width % factor), (0, 0)), mode="edge")
    blocks = layers.reshape(layers.shape[0] // factor, factor, -1, factor, depth)
    return np.asarray(blocks.mean(axis=(1, 3)), np.float32)


def _tissue_candidates(features: PixelFeatures) -> tuple[Mask, Mask]:
    """(weak, seed): pixels that may be tissue next to a seed, and pixels that are tissue beyond doubt."""
    depth = ndimage.uniform_filter(features.depth, 3)
    chroma = ndimage.uniform_filter(features.chroma, 3)
    weak = (depth > 0.03) & ((features.texture > 0.15) | (chroma > 0.05) | (depth > 0.15))
    seed = weak & (((features.texture > 0.4) & (depth > 0.05)) | ((chroma > 0.08) & (depth > 0.08)) | (depth > 0.3))
    return weak, seed


def _find_ink(features: PixelFeatures, weak: Mask, um_per_px: float) -> Mask:
    """Pixels of pen strokes: smooth, dense, wide, and of a colour that textured tissue on this slide hardly has."""
    dense = weak & (features.depth > 0.2)
    smooth = dense & (features.texture < 0.3)
    textured = weak & (features.texture > 0.5)
    foreign = _implausible_colour(features)
    # Where little is textured, all of it may be out of focus: then only its colour can tell ink.
    if features.has_glass and 2 * textured.sum() > smooth.sum():
        foreign |= _foreign_matter(features, dense & textured, smooth)
    radius = max(1.5, 40 / um_per_px)
    core = grow_mask(_distance_to(smooth & foreign) > radius, radius)
    # The rim of a stroke counts as textured: it goes with the core when it has the ink's colour.
    rim = grow_mask(core, max(2.5, 150 / um_per_px)) & weak & (foreign | (features.texture < 0.3))
    return grow_mask(core, 2.5) | rim


def _implausible_colour(features: PixelFeatures) -> Mask:
    """Colours that no common stain has when dense: green (least absorbed of all channels) and deep neutral black."""
    red, green, blue = np.moveaxis(features.density, 2, 0)
    is_green = green + 0.15 * features.depth < np.minimum(red, blue)
    is_black = (features.depth > 1.2) & (features.chroma < 0.15 * features.depth)
    return np.asarray(is_green | is_black, bool)


def _foreign_matter(features: PixelFeatures, tissue: Mask, smooth: Mask) -> Mask:
    """Pixels whose colour is far commoner among ``smooth`` dense pixels than among textured ``tissue``."""
    clipped = np.maximum(features.density, 0)
    total = clipped[..., 0] + clipped[..., 1] + clipped[..., 2] + np.float32(1e-3)
    bins = 32
    red = np.minimum((clipped[..., 0] / total * bins).astype(np.int32), bins - 1)
    blue = np.minimum((clipped[..., 2] / total * bins).astype(np.int32), bins - 1)
    code = red * bins + blue

    def count(where: Mask) -> F32:
        histogram = np.bincount(code[where], minlength=bins * bins).astype(np.float32).reshape(bins, bins)
        return np.asarray(ndimage.gaussian_filter(histogram, 0.7), np.float32)

    commoner = count(smooth) > FOREIGN * count(tissue)
    return np.asarray(commoner.ravel()[code], bool)


def _apply_hysteresis(weak: Mask, seed: Mask) -> Mask:
    """The connected parts of ``weak`` that hold a pixel of ``seed``."""
    labels, count = ndimage.label(weak, np.ones((3, 3), bool))
    keep = np.zeros(count + 1, bool)
    keep[np.unique(labels[seed & weak])] = True
    keep[0] = False
    return np.asarray(keep[labels], bool)


def _tidy_mask(mask: Mask, features: PixelFeatures, um_per_px: float) -> Mask:
    """Close gaps between cells, drop what is too small or debris, fill small holes."""
    radius = max(1.5, 16 / um_per_px)
    closed = _distance_to(grow_mask(mask, radius)) > radius
    kept = _drop_debris(closed | mask, features, um_per_px)
    return _fill_holes(kept, 40_000 / um_per_px**2)


def _drop_debris(mask: Mask, features: PixelFeatures, um_per_px: float) -> Mask:
    """Remove specks, and colourless things that are thin (cover-slip edges, bubbles, fibres)."""
    labels, count = ndimage.label(mask, np.ones((3, 3), bool))
    if count == 0:
        return mask
    ids = np.arange(1, count + 1)
    area = ndimage.sum_labels(mask, labels, ids) * um_per_px**2
    thickness = ndimage.maximum(_distance_to(mask), labels, ids)
    chroma = ndimage.mean(features.chroma, labels, ids)
    thin = (chroma < 0.05) & (thickness * um_per_px < 60)
    # On a stained slide a small grey island is dust, a fibre or a bubble; on a grey slide it may be tissue.
    stained = np.average(chroma, weights=area) > 0.1
    island = stained & (chroma < 0.03) & (area < 1e6)
    keep = np.zeros(count + 1, bool)
    # On a picture of a few cells, cells are large.
    smallest = min(SPECK_UM2, 0.002 * mask.size * um_per_px**2)
    keep[1:] = (area >= smallest) & ~thin & ~island
    return np.asarray(keep[labels], bool)


def _fill_holes(mask: Mask, limit: float) -> Mask:
    """Fill holes of fewer than ``limit`` px; a gap open to the border of the picture is no hole."""
    labels, count = ndimage.label(~mask)
    if count == 0:
        return mask
    size = np.bincount(labels.ravel(), minlength=count + 1)
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    small = size < limit
    small[np.unique(border)] = False
    small[0] = False
    return np.asarray(mask | small[labels], bool)


def _distance_to(mask: Mask) -> F64:
    """Distance float64[h, w] of each pixel of ``mask`` to the nearest outside it; beyond the picture is not outside."""
    if mask.all():
        return np.full(mask.shape, np.inf)
    return np.asarray(ndimage.distance_transform_edt(mask), np.float64)


def grow_mask(mask: Mask, radius: float) -> Mask:
    """Pixels within ``radius`` px of ``mask``."""
    return np.asarray(_distance_to(~mask) <= radius, bool)
