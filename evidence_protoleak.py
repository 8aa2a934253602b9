"""
Whether a picture shows anything that an attribution could rest on. The rule takes pixels alone, so that it is
the same for every model: an image has no evidence if it is smaller than `LEAST_SIDE`, or if each of its tiles
is too smooth (flat, or a gradient) or nothing but noise.

Limits are set by what known images are like: of the 2,497 images of wild's train and validation splits, 498
of them photographs, none is refused. The least rough has 1.8 times `LEAST_ROUGHNESS`, the least laid out 1.5
times `LEAST_LAYOUT`.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

LEAST_SIDE = 64  # pixels
TILE = 256  # pixels; limits are of tiles of this size
MOST_TILES = 3  # along a side
STEP = 2  # grey levels by which a pixel must differ from its neighbours' mean to count as rough
LEAST_ROUGHNESS = 0.005  # of pixels are rough
BLOCK = 16  # pixels
LEAST_LAYOUT = 0.04  # of the variance is between blocks; of white noise 1 / 256 is
SUFFICIENT, TOO_SMALL, TOO_SMOOTH, NOISE = range(4)  # what is lacking


def lack_of_evidence(image: Image.Image) -> int:
    """What an RGB image lacks: `TOO_SMALL`, `TOO_SMOOTH`, `NOISE`, or nothing, `SUFFICIENT`."""
    if min(image.size) < LEAST_SIDE:
        return TOO_SMALL
    lacks = set()
    for box in tiles(*image.size):
        lack = _lack_of_tile(np.asarray(image.crop(box)))
        if lack == SUFFICIENT:
            return SUFFICIENT
        lacks.add(lack)
    return max(lacks)


def tiles(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Left, top, right and bottom of up to nine tiles, spread from edge to edge, the middle one first."""
    spread = []
    for side in (width, height):
        free = max(0, side - TILE)
        starts = {round(i * free / (MOST_TILES - 1)) for i in range(MOST_TILES)}
        spread.append(sorted(starts, key=lambda start: abs(2 * start - free)))
    for top in spread[1]:
        for left in spread[0]:
            yield left, top, min(left + TILE, width), min(top + TILE, height)


def _lack_of_tile(pixels: np.ndarray) -> int:
    """(H, W, 3) uint8, H and W at least `LEAST_SIDE`"""
    if roughness(pixels) < LEAST_ROUGHNESS:
        return TOO_SMOOTH
    return NOISE if layout(pixels) < LEAST_LAYOUT else SUFFICIENT


def roughness(pixels: np.ndarray) -> float:
    """
    The share of pixels that differ from the mean of their four neighbours by `STEP` or more in a channel.
    Of a flat picture or a slow gradient it is zero, however many colours it has. (H, W, 3) uint8.
    """
    x = pixels.astype(np.int16)
    around = x[1:-1, 2:] + x[1:-1, :-2] + x[2:, 1:-1] + x[:-2, 1:-1]
    red, green, blue = (np.abs(around - 4 * x[1:-1, 1:-1]) >= 4 * STEP).transpose(2, 0, 1)
    return float((red | green | blue).mean())


def layout(pixels: np.ndarray) -> float:
    """
    The share of the variance, of all channels together, that is between blocks rather than within: something
    is shown somewhere. (H, W, 3) uint8.
    """
    height, width = (n - n % BLOCK for n in pixels.shape[:2])
    planes = pixels[:height, :width].transpose(2, 0, 1).astype(np.float32, order="C")
    rows = planes.reshape(3, height // BLOCK, BLOCK, width).mean(axis=2)
    blocks = rows.reshape(3, height // BLOCK, width // BLOCK, BLOCK).mean(axis=3)
    total = planes.var(axis=(1, 2)).sum()
    return float(blocks.var(axis=(1, 2)).sum() / total) if total > 0 else 0.0
