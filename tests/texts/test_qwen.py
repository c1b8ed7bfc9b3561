"""Qwen's towers apart from any checkpoint: causal, and the same split over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import models, parallel
from jdiff.parallel.layout import layout
from jdiff.texts.qwen import QwenText

FIELDS = {"vocab": 20, "width": 8, "depth": 2, "heads": 4, "kv_heads": 2, "head_width": 4}
BUILD = functools.partial(QwenText, **FIELDS, hidden=12, bias=True, scan=True)
OVER = {"fsdp": 2, "tensor": 2}


def test_a_tower_is_causal_and_the_same_split_over_devices():
    """By heads, of which queries share those of keys and values, and by hidden units."""
    build = lambda rngs: BUILD(rngs=rngs)
    apply, empty = models.abstract(build)
    over = layout(parallel.make(OVER, jax.devices()[:4]), QwenText.rules)
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda leaf: draw(size=leaf.shape).astype(np.float32), empty)
    ids = jnp.arange(20).reshape(4, 5)
    ids = ids.at[1].set(ids[0].at[-1].set(19))  # the first text with another end
    seen = ids % 5 != 2  # but for a token in the middle
    one = jax.jit(apply.method("read"))(params, ids, seen).last
    np.testing.assert_array_equal(one[0, :-1], one[1, :-1])
    assert not np.array_equal(one[0, -1], one[1, -1])

    where = jax.tree.map(
        lambda leaf, names: over.sharding(names, leaf.shape), empty, models.axes(build)
    )
    split = jax.device_put(params, where)
    assert split["blocks"]["k"]["kernel"].sharding.spec == jax.P(None, "fsdp", "tensor")
    two = jax.jit(apply.with_layout(over).method("read"))(split, ids, seen).last
    np.testing.assert_allclose(two, one, atol=1e-5)
