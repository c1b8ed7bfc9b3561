"""The InceptionV3 of the Frechet Inception Distance, as pure functions on a dict of parameters.

This is the network of the TensorFlow graph of 2015-12-05, on which every published FID rests. It
differs from later InceptionV3s: batch normalization has no scale and epsilon 1e-3, average pools
leave the padding out of the mean, and the pool of the last block takes the maximum. Images are
resized to 299 x 299 by bilinear interpolation (half-pixel centers, no antialiasing) and scaled to
(x - 128) / 128; the features are the 2048 means over the final 8 x 8 map.

Written for speed where it costs no accuracy: batch normalization is folded into the convolutions
in float64; 1x1 convolutions that read the same input are one matrix product; and, since an average
pool commutes with a 1x1 convolution, pooled branches join that product and are pooled after it.
"""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SIZE = 299
DIM = 2048

# Branches of each mixed block that begin with a 1x1 convolution of the block's input. The ones in
# the second group follow an average pool.
_A = (("conv", "tower.conv", "tower_1.conv"), ("tower_2.conv",))
_B = (("tower.conv",), ())
_D = (("tower.conv", "tower_1.conv"), ())
_E9 = (("conv", "tower_conv", "tower_1_conv"), ("tower_2_conv",))
_E10 = (("conv", "tower_conv", "tower_1_conv"), ())
_ENTRIES = {"mixed": _A, "mixed_3": _B, "mixed_8": _D, "mixed_9": _E9, "mixed_10": _E10}
_ENTRIES |= {f"mixed_{i}": _A for i in (1, 2, 4, 5, 6, 7)}


def fold(raw: dict[str, np.ndarray]) -> dict[str, dict]:
    """Parameters for `features` from the raw tensors `<layer>.{kernel,beta,mean,var}`.

    Batch normalization goes into kernel and bias in float64. Layers of a block that share its input
    become one entry kernel `[in, sum(out)]`; `features` splits its output by the bias sizes.
    """
    folded = {}
    for layer in {name.rpartition(".")[0] for name in raw}:
        kernel, beta, mean, var = (
            np.asarray(raw[f"{layer}.{field}"], np.float64)
            for field in ("kernel", "beta", "mean", "var")
        )
        scale = 1 / np.sqrt(var + 1e-3)
        folded[layer] = {
            "kernel": (kernel * scale).astype(np.float32),
            "bias": (beta - mean * scale).astype(np.float32),
        }
    params = {layer: folded[layer] for layer in folded if not layer.startswith("mixed")}
    for block, groups in _ENTRIES.items():
        inner = {
            k.removeprefix(block + "."): v for k, v in folded.items() if k.startswith(block + ".")
        }
        entries = [inner.pop(name) for group in groups for name in group]
        inner["entry"] = {
            "kernel": np.concatenate([e["kernel"][0, 0] for e in entries], axis=-1),
            "biases": [e["bias"] for e in entries],
        }
        params[block] = inner
    return params


def load(path: str | pathlib.Path) -> dict[str, dict]:
    """Folded parameters from the safetensors file that `jdiff prepare fid` writes."""
    from safetensors.numpy import load_file

    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no Inception weights at {path}: run `jdiff prepare fid`")
    return jax.tree.map(jnp.asarray, fold(load_file(path)))


def features(params: dict[str, dict], images: jax.Array, *, group: int | None = None) -> jax.Array:
    """Features `[B, 2048]`, float32, of uint8 images `[B, H, W, C]` with 1 or 3 channels.

    `group` images at a time pass the first, memory-bound layers; it has to divide B. None takes one
    on CPU, where a single image stays in cache, and all elsewhere.
    """
    if group is None:
        group = 1 if jax.default_backend() == "cpu" else images.shape[0]
    stem = functools.partial(_stem, params)
    if group < images.shape[0]:
        grouped = images.reshape(-1, group, *images.shape[1:])
        x = lax.map(stem, grouped)
        x = x.reshape(-1, *x.shape[2:])
    else:
        x = stem(images)
    return _body(params, x)


def preprocess(images: jax.Array) -> jax.Array:
    """Images uint8 `[B, H, W, 1 or 3]` as float32 `[B, 299, 299, 3]` in [-1, 1)."""
    x = (images.astype(jnp.float32) - 128) / 128
    if x.shape[-1] == 1:
        x = jnp.repeat(x, 3, axis=-1)
    return resize(x, SIZE)


def resize(x: jax.Array, size: int) -> jax.Array:
    """Bilinear resize of `[B, H, W, C]` to `[B, size, size, C]`: half-pixel centers, no filter."""
    rows = jnp.asarray(_interpolation(x.shape[1], size))
    columns = jnp.asarray(_interpolation(x.shape[2], size))
    x = jnp.einsum("oh,bhwc->bowc", rows, x, precision=lax.Precision.HIGHEST)
    return jnp.einsum("pw,bowc->bopc", columns, x, precision=lax.Precision.HIGHEST)


def _interpolation(source: int, target: int) -> np.ndarray:
    """The matrix `[target, source]` of one-dimensional linear interpolation."""
    at = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    low = np.minimum(np.floor(at).astype(int), source - 1)
    high = np.minimum(low + 1, source - 1)
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target), low), 1 - (at - low))
    np.add.at(matrix, (np.arange(target), high), at - low)
    return matrix.astype(np.float32)


def _stem(params: dict, images: jax.Array) -> jax.Array:
    x = preprocess(images)
    x = _conv(params["conv"], x, stride=2, padding="VALID")
    x = _conv(params["conv_1"], x, padding="VALID")
    x = _conv(params["conv_2"], x)
    x = _max_pool(x, stride=2)
    x = _conv(params["conv_3"], x)
    x = _conv(params["conv_4"], x, padding="VALID")
    return _max_pool(x, stride=2)


def _body(params: dict, x: jax.Array) -> jax.Array:
    for block in ("mixed", "mixed_1", "mixed_2"):
        x = _block_a(params[block], x)
    x = _block_b(params["mixed_3"], x)
    for block in ("mixed_4", "mixed_5", "mixed_6", "mixed_7"):
        x = _block_a(params[block], x)
    x = _block_d(params["mixed_8"], x)
    x = _block_e(params["mixed_9"], x)
    x = _block_e(params["mixed_10"], x)
    return x.mean((1, 2))


def _block_a(p: dict, x: jax.Array) -> jax.Array:
    direct, tower, tower_1, pooled = _entry(p["entry"], x, pooled=1)
    return _concat(direct, _chain(p, "tower", tower), _chain(p, "tower_1", tower_1), pooled)


def _block_b(p: dict, x: jax.Array) -> jax.Array:
    (tower,) = _entry(p["entry"], x)
    tower = _conv(p["tower.conv_1"], tower)
    tower = _conv(p["tower.conv_2"], tower, stride=2, padding="VALID")
    direct = _conv(p["conv"], x, stride=2, padding="VALID")
    return _concat(direct, tower, _max_pool(x, stride=2))


def _block_d(p: dict, x: jax.Array) -> jax.Array:
    tower, tower_1 = _entry(p["entry"], x)
    tower = _conv(p["tower.conv_1"], tower, stride=2, padding="VALID")
    tower_1 = _conv(p["tower_1.conv_2"], _conv(p["tower_1.conv_1"], tower_1))
    tower_1 = _conv(p["tower_1.conv_3"], tower_1, stride=2, padding="VALID")
    return _concat(tower, tower_1, _max_pool(x, stride=2))


def _block_e(p: dict, x: jax.Array) -> jax.Array:
    if "tower_2_conv" in p:  # the last block: a maximum does not commute with the convolution
        direct, tower, tower_1 = _entry(p["entry"], x)
        pooled = _conv(p["tower_2_conv"], _max_pool(x, stride=1))
    else:
        direct, tower, tower_1, pooled = _entry(p["entry"], x, pooled=1)
    tower_1 = _conv(p["tower_1_conv_1"], tower_1)
    return _concat(
        direct,
        _conv(p["tower_mixed_conv"], tower),
        _conv(p["tower_mixed_conv_1"], tower),
        _conv(p["tower_1_mixed_conv"], tower_1),
        _conv(p["tower_1_mixed_conv_1"], tower_1),
        pooled,
    )


def _entry(p: dict, x: jax.Array, pooled: int = 0) -> list[jax.Array]:
    """All 1x1 convolutions of `x` as one product; the last `pooled` ones see its average pool."""
    y = jnp.matmul(x, p["kernel"], precision=lax.Precision.HIGHEST)
    cuts = np.cumsum([b.shape[0] for b in p["biases"]])[:-1]
    parts = jnp.split(y, cuts, axis=-1)
    for i in range(len(parts) - pooled, len(parts)):
        parts[i] = _average_pool(parts[i])
    return [jax.nn.relu(part + bias) for part, bias in zip(parts, p["biases"])]


def _chain(p: dict, tower: str, x: jax.Array) -> jax.Array:
    i = 1
    while f"{tower}.conv_{i}" in p:
        x = _conv(p[f"{tower}.conv_{i}"], x)
        i += 1
    return x


def _conv(p: dict, x: jax.Array, stride: int = 1, padding: str = "SAME") -> jax.Array:
    y = lax.conv_general_dilated(
        x,
        p["kernel"],
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )
    return jax.nn.relu(y + p["bias"])


def _max_pool(x: jax.Array, stride: int) -> jax.Array:
    """3x3 maxima, as shifted slices: on CPU several times faster than a window reduction."""
    if stride == 1:
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    for axis in (1, 2):
        size = (x.shape[axis] - 3) // stride * stride + 1
        shifts = (lax.slice_in_dim(x, i, i + size, stride, axis) for i in range(3))
        x = functools.reduce(jnp.maximum, shifts)
    return x


def _average_pool(x: jax.Array) -> jax.Array:
    """3x3 means over the pixels that exist: the padding is not counted."""
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    x = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    count = np.outer(_neighbours(height), _neighbours(width))[..., None]
    return x / count.astype(np.float32)


def _neighbours(n: int) -> np.ndarray:
    """How many of i - 1, i, i + 1 are among 0..n-1, for each i of them."""
    return np.array([min(i + 1, n - 1) - max(i - 1, 0) + 1 for i in range(n)])


def _concat(*parts: jax.Array) -> jax.Array:
    return jnp.concatenate(parts, axis=-1)
