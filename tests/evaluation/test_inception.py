"""The FID network: its blocks and its resize against NumPy and SciPy, and the real weights.

The whole network was compared once with the TorchScript file that the weights come from (64 test
images of CIFAR-10, PyTorch 2.13): the largest difference was 1.8e-5, on features up to 6.9.
"""

import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from jdiff.evaluation import inception

# The layers of the graph, (name, kernel, inputs, outputs), as in Szegedy et al. 2015, figures 5-7.
STEM = [
    ("conv", (3, 3), 3, 32),
    ("conv_1", (3, 3), 32, 32),
    ("conv_2", (3, 3), 32, 64),
    ("conv_3", (1, 1), 64, 80),
    ("conv_4", (3, 3), 80, 192),
]


def block_a(inputs, pooled):
    return [
        ("conv", (1, 1), inputs, 64),
        ("tower.conv", (1, 1), inputs, 48),
        ("tower.conv_1", (5, 5), 48, 64),
        ("tower_1.conv", (1, 1), inputs, 64),
        ("tower_1.conv_1", (3, 3), 64, 96),
        ("tower_1.conv_2", (3, 3), 96, 96),
        ("tower_2.conv", (1, 1), inputs, pooled),
    ]


def block_c(width):
    row, column = (1, 7), (7, 1)
    return [
        ("conv", (1, 1), 768, 192),
        ("tower.conv", (1, 1), 768, width),
        ("tower.conv_1", row, width, width),
        ("tower.conv_2", column, width, 192),
        ("tower_1.conv", (1, 1), 768, width),
        ("tower_1.conv_1", column, width, width),
        ("tower_1.conv_2", row, width, width),
        ("tower_1.conv_3", column, width, width),
        ("tower_1.conv_4", row, width, 192),
        ("tower_2.conv", (1, 1), 768, 192),
    ]


def block_e(inputs):
    return [
        ("conv", (1, 1), inputs, 320),
        ("tower_conv", (1, 1), inputs, 384),
        ("tower_mixed_conv", (1, 3), 384, 384),
        ("tower_mixed_conv_1", (3, 1), 384, 384),
        ("tower_1_conv", (1, 1), inputs, 448),
        ("tower_1_conv_1", (3, 3), 448, 384),
        ("tower_1_mixed_conv", (1, 3), 384, 384),
        ("tower_1_mixed_conv_1", (3, 1), 384, 384),
        ("tower_2_conv", (1, 1), inputs, 192),
    ]


BLOCKS = {
    "mixed": block_a(192, 32),
    "mixed_1": block_a(256, 64),
    "mixed_2": block_a(288, 64),
    "mixed_3": [
        ("conv", (3, 3), 288, 384),
        ("tower.conv", (1, 1), 288, 64),
        ("tower.conv_1", (3, 3), 64, 96),
        ("tower.conv_2", (3, 3), 96, 96),
    ],
    "mixed_4": block_c(128),
    "mixed_5": block_c(160),
    "mixed_6": block_c(160),
    "mixed_7": block_c(192),
    "mixed_8": [
        ("tower.conv", (1, 1), 768, 192),
        ("tower.conv_1", (3, 3), 192, 320),
        ("tower_1.conv", (1, 1), 768, 192),
        ("tower_1.conv_1", (1, 7), 192, 192),
        ("tower_1.conv_2", (7, 1), 192, 192),
        ("tower_1.conv_3", (3, 3), 192, 192),
    ],
    "mixed_9": block_e(1280),
    "mixed_10": block_e(2048),
}


@pytest.fixture(scope="module")
def raw():
    """Random tensors in the shapes of the real ones."""
    rng = np.random.default_rng(0)
    layers = STEM + [(f"{b}.{n}", *rest) for b, ls in BLOCKS.items() for n, *rest in ls]
    tensors = {}
    for name, kernel, inputs, outputs in layers:
        spread = np.sqrt(2 / (np.prod(kernel) * inputs))
        tensors[f"{name}.kernel"] = rng.normal(0, spread, (*kernel, inputs, outputs))
        tensors[f"{name}.beta"] = rng.normal(0, 0.3, outputs)
        tensors[f"{name}.mean"] = rng.normal(0, 0.3, outputs)
        tensors[f"{name}.var"] = rng.uniform(0.5, 2, outputs)
    return {name: value.astype(np.float32) for name, value in tensors.items()}


@pytest.fixture(scope="module")
def params(raw):
    return inception.fold(raw)


class Reference:
    """One image `[H, W, C]` through unmerged, unfolded layers, by NumPy in float64."""

    def __init__(self, raw, block):
        self.raw = {k.removeprefix(block + "."): v.astype(float) for k, v in raw.items()}

    def conv(self, x, name, stride=1, mode="same"):
        kernel = self.raw[f"{name}.kernel"]
        if mode == "same":
            rows, columns = (n // 2 for n in kernel.shape[:2])
            x = np.pad(x, ((rows, rows), (columns, columns), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], (0, 1))
        y = np.tensordot(windows[::stride, ::stride], kernel, ([2, 3, 4], [2, 0, 1]))
        normal = (y - self.raw[f"{name}.mean"]) / np.sqrt(self.raw[f"{name}.var"] + 1e-3)
        return np.maximum(normal + self.raw[f"{name}.beta"], 0)


def average_pool(x):
    """Means over the existing pixels of each 3 x 3 window."""
    out = np.empty_like(x)
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            out[r, c] = x[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2].mean((0, 1))
    return out


def max_pool(x, stride):
    pooled = scipy.ndimage.maximum_filter(x, (3, 3, 1), mode="constant", cval=-np.inf)
    return pooled if stride == 1 else pooled[1:-1:2, 1:-1:2]


def check(got, expected):
    assert got.shape == (1, *expected.shape)
    np.testing.assert_allclose(got[0], expected, atol=2e-4 * np.abs(expected).max())


def chain(ref, x, tower, count):
    for i in range(count):
        x = ref.conv(x, f"{tower}.conv" + (f"_{i}" if i else ""))
    return x


@pytest.mark.parametrize(("block", "lengths"), [("mixed", (2, 3)), ("mixed_4", (3, 5))])
def test_blocks_with_an_average_pool(raw, params, block, lengths):
    # The pool joins the shared 1x1 product in `inception`; here it comes first, as in the graph.
    size, channels = (4, 192) if block == "mixed" else (3, 768)
    x = np.random.default_rng(1).uniform(size=(size, size + 1, channels))
    ref = Reference(raw, block)
    expected = [ref.conv(x, "conv")]
    expected += [chain(ref, x, t, n) for t, n in zip(("tower", "tower_1"), lengths)]
    expected += [ref.conv(average_pool(x), "tower_2.conv")]
    got = inception._block_a(params[block], jnp.asarray(x[None], jnp.float32))
    check(np.asarray(got), np.concatenate(expected, -1))


def test_the_first_reduction_block(raw, params):
    x = np.random.default_rng(2).uniform(size=(7, 5, 288))
    ref = Reference(raw, "mixed_3")
    tower = ref.conv(chain(ref, x, "tower", 2), "tower.conv_2", 2, "valid")
    direct = ref.conv(x, "conv", 2, "valid")
    got = inception._block_b(params["mixed_3"], jnp.asarray(x[None], jnp.float32))
    check(np.asarray(got), np.concatenate([direct, tower, max_pool(x, 2)], -1))


def test_the_second_reduction_block(raw, params):
    x = np.random.default_rng(3).uniform(size=(5, 5, 768))
    ref = Reference(raw, "mixed_8")
    tower = ref.conv(ref.conv(x, "tower.conv"), "tower.conv_1", 2, "valid")
    tower_1 = ref.conv(chain(ref, x, "tower_1", 3), "tower_1.conv_3", 2, "valid")
    got = inception._block_d(params["mixed_8"], jnp.asarray(x[None], jnp.float32))
    check(np.asarray(got), np.concatenate([tower, tower_1, max_pool(x, 2)], -1))


@pytest.mark.parametrize("block", ["mixed_9", "mixed_10"])
def test_the_last_blocks_pool_by_mean_and_by_maximum(raw, params, block):
    x = np.random.default_rng(4).uniform(size=(2, 3, 1280 if block == "mixed_9" else 2048))
    ref = Reference(raw, block)
    a, b = ref.conv(x, "tower_conv"), ref.conv(ref.conv(x, "tower_1_conv"), "tower_1_conv_1")
    pooled = average_pool(x) if block == "mixed_9" else max_pool(x, 1)
    expected = [
        ref.conv(x, "conv"),
        ref.conv(a, "tower_mixed_conv"),
        ref.conv(a, "tower_mixed_conv_1"),
        ref.conv(b, "tower_1_mixed_conv"),
        ref.conv(b, "tower_1_mixed_conv_1"),
        ref.conv(pooled, "tower_2_conv"),
    ]
    got = inception._block_e(params[block], jnp.asarray(x[None], jnp.float32))
    check(np.asarray(got), np.concatenate(expected, -1))


@pytest.mark.parametrize("shape", [(8, 8), (32, 20), (299, 299), (310, 400)])
def test_resize_is_bilinear_between_pixel_centers(shape):
    image = np.random.default_rng(5).uniform(-1, 1, (*shape, 2))
    got = np.asarray(inception.resize(jnp.asarray(image[None], jnp.float32), 299))[0]
    rows, columns = ((np.arange(299) + 0.5) * n / 299 - 0.5 for n in shape)
    at = np.meshgrid(rows, columns, indexing="ij")
    for channel in range(2):
        expected = scipy.ndimage.map_coordinates(image[..., channel], at, order=1, mode="nearest")
        np.testing.assert_allclose(got[..., channel], expected, atol=2e-6)


def test_preprocessing_centers_at_128():
    images = np.stack([np.full((4, 4, 1), v, np.uint8) for v in (0, 128, 255)])
    got = np.asarray(inception.preprocess(jnp.asarray(images)))
    assert got.shape == (3, 299, 299, 3)
    np.testing.assert_allclose(got[:, 7, 9, 1], [-1, 0, 127 / 128], atol=1e-6)


def test_the_whole_network_has_2048_features_at_8_by_8():
    shapes = {}
    layers = STEM + [(f"{b}.{n}", *rest) for b, ls in BLOCKS.items() for n, *rest in ls]
    for name, kernel, inputs, outputs in layers:
        shapes[f"{name}.kernel"] = np.zeros((*kernel, inputs, outputs), np.float32)
        for field in ("beta", "mean", "var"):
            shapes[f"{name}.{field}"] = np.zeros(outputs, np.float32)
    assert sum(v.size for v in shapes.values()) == 21_802_784  # as the published network
    params = jax.eval_shape(lambda: inception.fold(shapes))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), "uint8")
    stem = jax.eval_shape(inception._stem, params, images)
    assert stem.shape == (2, 35, 35, 192)
    assert jax.eval_shape(inception.features, params, images).shape == (2, 2048)
    for group in (1, 2):
        got = jax.eval_shape(
            lambda p, x, g=group: inception.features(p, x, group=g), params, images
        )
        assert got.shape == (2, 2048)


def prepared(name):
    root = pathlib.Path(os.environ.get("JDIFF_CACHE", "~/.cache/jdiff")).expanduser()
    path = root / "weights" / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"NOT TESTED: no weights at {path}; run `jdiff prepare {name}`")
    return path


def test_the_real_weights_have_the_published_layers():
    from safetensors.numpy import load_file

    raw = load_file(prepared("fid"))
    layers = STEM + [(f"{b}.{n}", *rest) for b, ls in BLOCKS.items() for n, *rest in ls]
    expected = {f"{name}.kernel": (*k, i, o) for name, k, i, o in layers}
    assert {n: v.shape for n, v in raw.items() if n.endswith("kernel")} == expected


def test_missing_weights_name_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("jdiff prepare fid")):
        inception.load(tmp_path / "fid.safetensors")
