"""LPIPS: how different two images look, by the features of a VGG16 (Zhang et al. 2018, eq 1).

Version 0.1 with the VGG16 backbone, as pure functions on a dict of parameters: the published linear
weights, images in [-1, 1]. The gradient is finite where all features of a pixel are 0.
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
from jax import lax

from jdiff.errors import UserError
from jdiff.pytree import Array, PyTree

#: Convolutions of each of the five slices, and their channels. All but the first slice begin with a
#: maximum of 2 x 2 pixels.
SLICES = (2, 2, 3, 3, 3)
WIDTHS = (64, 128, 256, 512, 512)
#: Images of smaller sides have no features in the last slice.
SMALLEST = 16
# Means and deviations of ImageNet's channels, in the units of images in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPS = 1e-10


def load(path: str | pathlib.Path | None = None) -> PyTree:
    """The parameters that `jdiff prepare lpips` writes: {"conv0": {"kernel", "bias"}, ..., "lin0"}.

    Raises:
      UserError: they are not prepared.
    """
    from safetensors import safe_open

    from jdiff.data import prepare

    path = pathlib.Path(path or prepare.location("lpips"))
    if not path.is_file():
        raise UserError(f"no LPIPS weights at {path}: run `jdiff prepare lpips`.")
    params: PyTree = {}
    with safe_open(path, "numpy") as file:
        get = lambda name: jnp.asarray(file.get_tensor(f"vgg16/{name}"))
        for i in range(sum(SLICES)):
            params[f"conv{i}"] = {k: get(f"VGG16_0/Conv_{i}/{k}") for k in ("kernel", "bias")}
        for k in range(len(SLICES)):
            params[f"lin{k}"] = get(f"NetLinLayer_{k}/Conv_0/kernel")[0, 0, :, 0]
    return params


def shapes() -> PyTree:
    """The shapes of the parameters, for plans: nothing is read."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params, before = {}, 3
    widths = [width for width, count in zip(WIDTHS, SLICES) for _ in range(count)]
    for i, width in enumerate(widths):
        params[f"conv{i}"] = {"kernel": array(3, 3, before, width), "bias": array(width)}
        before = width
    return params | {f"lin{k}": array(width) for k, width in enumerate(WIDTHS)}


def distance(params: PyTree, images: Array, truth: Array) -> Array:
    """LPIPS [B] of images [B, H, W, 1 or 3] and truth, both floats in [-1, 1]; 0 if they are equal.

    Raises:
      UserError: images that are too small, or not both of one shape.
    """
    if images.shape != truth.shape or images.shape[-1] not in (1, 3):
        raise UserError(
            f"LPIPS of images {list(images.shape)} and {list(truth.shape)}: both have to be "
            "[B, H, W, 3], or grey."
        )
    if min(images.shape[1:3]) < SMALLEST:
        raise UserError(
            f"LPIPS of images of {images.shape[1]} x {images.shape[2]} pixels: it takes "
            f"{SMALLEST} x {SMALLEST} or more."
        )
    total = jnp.zeros(len(images), images.dtype)
    for k, (a, b) in enumerate(zip(features(params, images), features(params, truth))):
        gap = jnp.square(_unit(a) - _unit(b))
        total = total + (gap @ params[f"lin{k}"]).mean((1, 2))
    return total


def features(params: PyTree, images: Array) -> list[Array]:
    """The rectified features [B, H / 2^k, W / 2^k, C] that end the five slices."""
    x = jnp.broadcast_to(images, (*images.shape[:-1], 3))
    x = (x - jnp.asarray(_SHIFT, x.dtype)) / jnp.asarray(_SCALE, x.dtype)
    found, i = [], 0
    for k, count in enumerate(SLICES):
        if k:
            x = _halved(x)
        for _ in range(count):
            x = jax.nn.relu(_conv(x, **params[f"conv{i}"]))
            i += 1
        found.append(x)
    return found


def _conv(x: Array, kernel: Array, bias: Array) -> Array:
    y = lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + bias.astype(x.dtype)


def _halved(x: Array) -> Array:
    """The maximum of 2 x 2 pixels; an odd last row or column is left out."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


def _unit(x: Array) -> Array:
    """Every pixel's features with length 1; where all are 0 they stay so, with gradient 0."""
    squares = jnp.square(x).sum(-1, keepdims=True)
    length = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
    return jnp.where(squares > 0, x / (length + _EPS), 0.0)
