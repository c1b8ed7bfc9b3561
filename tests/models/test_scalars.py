"""Further scalar conditions: embedded like t, added, and absent unless asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import models

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 1)), jnp.float32)
T, S = jnp.array([0.75, 0.5]), jnp.array([0.25, 0.125])
NETWORKS = {
    "dit": (models.DiT, {"in_channels": 1, "width": 16, "depth": 1, "heads": 2}, 16, 256),
    "unet": (
        models.UNet,
        {"image_size": 4, "in_channels": 1, "channels": 8, "multipliers": (1,), "blocks": 1},
        32, 8,
    ),
}  # fmt: skip


@functools.cache
def network(name, scalars):
    """`(jitted apply, params)`, no weight zero."""
    cls, fields, _, _ = NETWORKS[name]
    apply, params = models.init(
        lambda rngs: cls(**fields, scalars=scalars, time_scale=10.0, rngs=rngs), KEY
    )
    random = np.random.default_rng(1)
    noise = lambda w: jnp.asarray(w + 0.2 * random.standard_normal(w.shape), w.dtype)
    return jax.jit(apply), jax.tree.map(noise, params)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_scalar_costs_two_layers_and_none_costs_nothing(name):
    cls, fields, width, waves = NETWORKS[name]
    count = lambda scalars: models.count(
        models.abstract(lambda rngs: cls(**fields, scalars=scalars, rngs=rngs))[1]
    )
    layers = (waves + 1) * width + (width + 1) * width
    assert count(("s",)) - count(()) == layers
    assert count(("t-s", "w")) - count(()) == 2 * layers


@pytest.mark.parametrize("name", NETWORKS)
def test_a_scalar_with_the_weights_of_t_counts_as_another_t(name):
    """Embeddings are summed: with equal weights, (t, s) and (s, t) are one input in a DiT."""
    apply, params = network(name, ("s",))
    assert jnp.abs(apply(params, X, T, {"s": S}) - apply(params, X, T, {"s": T})).max() > 1e-3
    one, two = params["scalars"]["layers"]["0"]["0"], params["scalars"]["layers"]["0"]["1"]
    if name == "dit":
        params = params | {"time1": one, "time2": two}
        swapped = apply(params, X, S, {"s": T})
        np.testing.assert_allclose(apply(params, X, T, {"s": S}), swapped, rtol=1e-4, atol=1e-5)


def test_t_minus_s_is_told_as_the_difference():
    plain, params = network("dit", ("s",))
    gap, _ = network("dit", ("t-s",))
    np.testing.assert_allclose(
        gap(params, X, T, {"s": S}), plain(params, X, T, {"s": T - S}), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("cond", "words"),
    [({"label": S}, r"needs cond\['s'\].*cond has \['label'\].*flow_map"),
     ({"s": S[:1]}, r"cond\['s'\] has shape \[1\], not \[B\] = \[2\]")],
)  # fmt: skip
def test_a_scalar_that_is_missing_is_named(cond, words):
    apply, params = network("dit", ("t-s",))
    with pytest.raises(ValueError, match=words):
        apply(params, X, T, cond)
