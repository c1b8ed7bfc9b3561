"""Crop, resize and mirror of uint8 images [H, W, C], and the random numbers that steer them.

Randomness is a hash of (seed, position in the stream), not a generator's state: the example at one
position is treated alike whatever the batch size, the number of processes or the thread.
"""

from __future__ import annotations

import numpy as np

from jdiff.errors import UserError, choose

CROPS = ("center", "random", "adm", "patch")
FILTERS = ("bicubic", "bilinear", "box", "hamming", "lanczos")


def hashed(seed: int, positions: np.ndarray, stream: int) -> np.ndarray:
    """Uniform 64-bit words, one for each position: the SplitMix64 finalizer, three times.

    `stream` separates uses of one position. Source: Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014.
    """
    word = np.zeros(np.shape(positions), np.uint64)
    with np.errstate(over="ignore"):
        for part in (seed, stream, positions):
            word = word + np.asarray(part).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            word = word ^ (word >> np.uint64(31))
    return word


def uniform(seed: int, positions: np.ndarray, stream: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64, one for each position; see `hashed`."""
    return (hashed(seed, positions, stream) >> np.uint64(11)) * 2.0**-53


def mirror(images: np.ndarray, where: np.ndarray) -> np.ndarray:
    """`images` [B, H, W, C] with those that `where` [B] (bool) marks reversed left to right."""
    out = images.copy()
    out[where] = images[where, :, ::-1]
    return out


def crop(image: np.ndarray, kind: str, size: int | None, u: float, v: float) -> np.ndarray:
    """A square of `image` [H, W, C]; still to be resized, but for `adm` and `patch`.

    Args:
      kind: `center`, the largest centred square; `random`, the largest square at a random place;
        `adm`, the centred crop of guided-diffusion (Dhariwal and Nichol 2021, arXiv:2105.05233):
        box-halve while the short side is at least twice `size`, resize the short side to `size`
        with a bicubic filter, cut the centre; `patch`, a random window of `size` pixels.
      size: side of the result in pixels, for `adm` and `patch`.
      u, v: uniform numbers in [0, 1) that place a random square (vertically, horizontally).

    Raises:
      UserError: `patch` of an image that is smaller.
    """
    height, width = image.shape[:2]
    if kind == "adm":
        while min(height, width) >= 2 * size:
            height, width = height // 2, width // 2
            image = resize(image, (height, width), "box")
        scale = size / min(height, width)
        image = resize(image, (round(height * scale), round(width * scale)), "bicubic")
        height, width = image.shape[:2]
    side = min(height, width) if kind in ("center", "random") else size
    if side > min(height, width):
        raise UserError(f"crop 'patch' of size {side}: an image has only {height} x {width} pixels")
    if kind in ("center", "adm"):
        top, left = (height - side) // 2, (width - side) // 2
    else:
        top, left = int(u * (height - side + 1)), int(v * (width - side + 1))
    return image[top : top + side, left : left + side]


def resize(image: np.ndarray, size: tuple[int, int], resample: str) -> np.ndarray:
    """`image` uint8 [H, W, C] resampled to `size` (height, width), antialiased, by Pillow.

    `resample` is one of `FILTERS`; `box` averages areas. Pillow rounds to 8 bits after each axis.
    """
    if image.shape[:2] == tuple(size):
        return image
    from PIL import Image

    kind = Image.Resampling[choose("resample", resample, FILTERS).upper()]
    if image.shape[-1] == 3:
        return np.asarray(Image.fromarray(image).resize(size[::-1], kind))
    planes = [Image.fromarray(np.ascontiguousarray(c)) for c in np.moveaxis(image, -1, 0)]
    return np.stack([np.asarray(p.resize(size[::-1], kind)) for p in planes], axis=-1)
