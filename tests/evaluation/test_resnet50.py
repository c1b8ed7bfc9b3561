"""Keras' ResNet50 in JAX: its preprocessing, its folding, and the real weights on real photographs.

The labels of the photographs were not produced by this code: they are what they show.
"""

import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff.evaluation import resnet50

DAISY, PALACE = 985, 698


def test_preprocessing_is_bgr_minus_the_imagenet_means():
    images = np.zeros((1, 6, 6, 3), np.uint8)
    images[..., 0] = 200  # red
    got = np.asarray(resnet50.preprocess(jnp.asarray(images)))
    assert got.shape == (1, 224, 224, 3)
    np.testing.assert_allclose(got[0, 9, 9], [-103.939, -116.779, 200 - 123.68], atol=1e-4)


def test_folding_equals_convolution_then_normalization():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (1, 1, 6, 4), "bias": (4,)}
    raw = {f"res9a_branch2a/{k}": rng.normal(size=s) for k, s in shapes.items()}
    raw |= {f"bn9a_branch2a/{k}": rng.normal(size=4) for k in ("gamma", "beta", "moving_mean")}
    raw["bn9a_branch2a/moving_variance"] = rng.uniform(0.5, 2, 4)
    raw |= {"fc1000/kernel": rng.normal(size=(3, 2)), "fc1000/bias": rng.normal(size=2)}
    folded = resnet50.fold({k: v.astype(np.float32) for k, v in raw.items()})["res9a_branch2a"]
    x = rng.normal(size=(1, 5, 5, 6))
    y = x @ raw["res9a_branch2a/kernel"][0, 0] + raw["res9a_branch2a/bias"]
    y = (y - raw["bn9a_branch2a/moving_mean"]) / np.sqrt(
        raw["bn9a_branch2a/moving_variance"] + 1e-3
    )
    y = y * raw["bn9a_branch2a/gamma"] + raw["bn9a_branch2a/beta"]
    got = resnet50._conv(folded, jnp.asarray(x, jnp.float32), stride=2)
    np.testing.assert_allclose(got, y[:, ::2, ::2], atol=1e-5)


def test_missing_weights_name_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("jdiff prepare resnet50")):
        resnet50.load(tmp_path / "none")


def test_photographs_are_recognised():
    from sklearn.datasets import load_sample_image

    root = pathlib.Path(os.environ.get("JDIFF_CACHE", "~/.cache/jdiff")).expanduser()
    path = root / "weights" / "resnet50.safetensors"
    if not path.is_file():
        pytest.skip(f"NOT TESTED: no weights at {path}; run `jdiff prepare resnet50`")
    params = resnet50.load(path)
    crops = np.stack([load_sample_image(n)[:424, 108:532] for n in ("china.jpg", "flower.jpg")])
    features = jax.jit(resnet50.features)(params, crops)
    assert features.shape == (2, resnet50.DIM)
    probabilities = np.asarray(resnet50.probabilities(params, features))
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    best = np.argsort(-probabilities, axis=1)[:, :5]
    assert PALACE in best[0]
    assert DAISY in best[1]
