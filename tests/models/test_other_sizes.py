"""Networks at sizes that training did not see: crops in training, whole images in sampling.

Convolutional networks have no positions, and their levels attend or not whatever their resolution:
what they make of an object does not depend on the image around it nor on where in it the object is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import models
from jdiff.models.attention import dot_product

QUICK = {"xla_backend_optimization_level": 0}  # compiles faster
T = np.asarray([0.4], np.float32)
COMMON = {"in_channels": 2, "low_res_channels": 1, "scalars": ("aug_level",)}
NETWORKS = {
    "UNet": {  # for images of 8 x 8
        "image_size": 8, "channels": 8, "multipliers": (1, 2), "blocks": 1,
        "attention_sizes": (4,), "style": "adm",
    },
    "CondUNet": {
        "widths": (8, 16), "blocks": 1, "depths": (0, 1), "heads": (1, 2), "text_width": 4,
        "groups": 4,
    },
    "EfficientUNet": {
        "widths": (8, 16), "blocks": (1, 1), "strides": (2, 2), "self_attention": (False, True),
        "text_attention": (False, True), "heads": 2, "text_width": 4,
    },
}  # fmt: skip
networks = pytest.mark.parametrize("name", NETWORKS)
TEXT = np.random.default_rng(2).standard_normal((1, 3, 4)).astype(np.float32)


def build(name, rngs):
    return getattr(models, name)(**COMMON, **NETWORKS[name], rngs=rngs)


def scene(place, small, width=192):
    """(noisy image, conditions), 8 x `width`: an object at `place`, in "low_res" at `small`."""
    draw = np.random.default_rng(0)
    x, low = np.zeros((1, 8, width, 2), np.float32), np.zeros((1, 4, width // 2, 1), np.float32)
    x[:, :, place : place + 8] = draw.standard_normal((1, 8, 8, 2))
    low[:, :, small // 2 : small // 2 + 4] = draw.standard_normal((1, 4, 4, 1))
    return x, {"low_res": low, "aug_level": 0.5 * T, "text": TEXT}


@networks
def test_an_object_is_the_same_anywhere_in_a_larger_image(name):
    apply, shapes = models.abstract(functools.partial(build, name))
    draw = np.random.default_rng(1)
    params = jax.tree.map(lambda w: 0.2 * draw.standard_normal(w.shape, np.float32), shapes)
    run = jax.jit(apply, compiler_options=QUICK)

    def around(place, small):
        x, cond = scene(place, small)
        return np.asarray(run(params, x, T, cond))[:, :, place - 24 : place + 32]

    y = around(88, 88)
    size = np.abs(y).max()
    for place in (92, 96):  # by whole pixels of the lowest resolution
        np.testing.assert_allclose(around(place, place), y, atol=1e-4 * size)
    # Without its small image the object is not the same.
    assert np.abs(around(92, 88) - y).max() > 1e-3 * size


@networks
def test_levels_attend_whatever_their_resolution(name):
    apply, shapes = models.abstract(functools.partial(build, name))
    looks = []

    def kernel(q, k, v, *, mask=None):
        looks.append(q.size // q.shape[-1] // q.shape[-2])
        return dot_product(q, k, v, mask=mask)

    run = lambda *size: jax.eval_shape(
        apply.with_attention(kernel), shapes, jnp.zeros((1, *size, 2)), T, scene(0, 0, 8)[1]
    )
    assert run(8, 8).shape == (1, 8, 8, 2)
    small, looks[:] = list(looks), []
    assert run(16, 40).shape == (1, 16, 40, 2)
    assert len(small) == len(looks) >= 2
    pixels = [n for n in small if n != 1]  # the pooled text is one query
    assert [n for n in looks if n != 1] == [10 * n for n in pixels]
