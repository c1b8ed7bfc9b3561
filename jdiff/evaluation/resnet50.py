"""Keras' ImageNet ResNet50 (v1), as pure functions on a dict of parameters.

A second feature space, and a head of 1000 classes, under its own name: distances in it are not FIDs
and its class score is not the Inception Score. Images are resized to 224 x 224 bilinearly (without
antialiasing), turned to BGR and centered by the ImageNet means, as the network was trained; strides
sit in the first 1x1 convolution of a stage and batch normalization has epsilon 1e-3. The latter is
folded into the convolutions in float64.
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdiff.evaluation import inception

SIZE = 224
DIM = 2048
CLASSES = 1000
_MEANS = (103.939, 116.779, 123.68)  # of ImageNet, in the order blue, green, red
_STAGES = {"2": "abc", "3": "abcd", "4": "abcdef", "5": "abc"}


def fold(raw: dict[str, np.ndarray]) -> dict[str, dict]:
    """Parameters for `features` from the tensors under Keras' names, `<layer>/<field>`."""
    params = {"fc1000": {k: np.asarray(raw[f"fc1000/{k}"]) for k in ("kernel", "bias")}}
    for name in raw:
        layer, field = name.split("/")
        if field != "kernel" or layer == "fc1000":
            continue
        norm = "bn_conv1" if layer == "conv1" else layer.replace("res", "bn", 1)
        gamma, beta, mean, variance = (
            np.asarray(raw[f"{norm}/{f}"], np.float64)
            for f in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        scale = gamma / np.sqrt(variance + 1e-3)
        params[layer] = {
            "kernel": (raw[name] * scale).astype(np.float32),
            "bias": ((raw[f"{layer}/bias"] - mean) * scale + beta).astype(np.float32),
        }
    return params


def load(path: str | pathlib.Path) -> dict[str, dict]:
    """Folded parameters from the safetensors file that `jdiff prepare resnet50` writes."""
    from safetensors.numpy import load_file

    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no ResNet50 weights at {path}: run `jdiff prepare resnet50`")
    return jax.tree.map(jnp.asarray, fold(load_file(path)))


def features(params: dict[str, dict], images: jax.Array) -> jax.Array:
    """Mean activations of the last stage `[B, 2048]` of uint8 images `[B, H, W, 1 or 3]`."""
    x = preprocess(images)
    x = jax.nn.relu(_conv(params["conv1"], x, 2, ((3, 3), (3, 3))))
    x = lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    )
    for stage, blocks in _STAGES.items():
        for block in blocks:
            x = _block(params, f"res{stage}{block}", x, 2 if block == "a" and stage != "2" else 1)
    return x.mean((1, 2))


def probabilities(params: dict[str, dict], features: jax.Array) -> jax.Array:
    """Probabilities of the 1000 ImageNet classes `[B, 1000]` from `features`."""
    head = params["fc1000"]
    logits = jnp.matmul(features, head["kernel"], precision=lax.Precision.HIGHEST)
    return jax.nn.softmax(logits + head["bias"])


def preprocess(images: jax.Array) -> jax.Array:
    """Images uint8 `[B, H, W, 1 or 3]` as float32 BGR `[B, 224, 224, 3]`, centered, in 0..255."""
    x = images.astype(jnp.float32)
    if x.shape[-1] == 1:
        x = jnp.repeat(x, 3, axis=-1)
    return inception.resize(x, SIZE)[..., ::-1] - jnp.asarray(_MEANS, jnp.float32)


def _block(params: dict, name: str, x: jax.Array, stride: int) -> jax.Array:
    y = jax.nn.relu(_conv(params[f"{name}_branch2a"], x, stride))
    y = jax.nn.relu(_conv(params[f"{name}_branch2b"], y))
    y = _conv(params[f"{name}_branch2c"], y)
    if f"{name}_branch1" in params:
        x = _conv(params[f"{name}_branch1"], x, stride)
    return jax.nn.relu(x + y)


def _conv(p: dict, x: jax.Array, stride: int = 1, padding="SAME") -> jax.Array:
    if p["kernel"].shape[:2] == (1, 1):
        x = x[:, ::stride, ::stride]
        return jnp.matmul(x, p["kernel"][0, 0], precision=lax.Precision.HIGHEST) + p["bias"]
    y = lax.conv_general_dilated(
        x,
        p["kernel"],
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )
    return y + p["bias"]
