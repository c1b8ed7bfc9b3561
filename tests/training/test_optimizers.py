"""The optimiser that a config describes."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdiff.errors import UserError
from jdiff.experiment import defaults
from jdiff.training import optimizers


def config(**changes):
    c = defaults().optimizer
    c.update({"learning_rate": 0.5, **changes})
    return c


def test_warm_up_is_linear_and_reaches_the_peak():
    rate = optimizers.learning_rate(config(warmup=10), 100)
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(99)], [0.0, 0.25, 0.5, 0.5])


def test_cosine_and_linear_end_at_zero_with_the_run():
    for name, half in (("cosine", 0.25), ("linear", 0.25)):
        rate = optimizers.learning_rate(config(schedule=name, warmup=20), 120)
        np.testing.assert_allclose([rate(20), rate(70), rate(120)], [0.5, half, 0.0], atol=1e-7)


def test_rsqrt_falls_with_the_square_root_of_the_steps():
    rate = optimizers.learning_rate(config(schedule="rsqrt", decay_from=100), 10_000)
    np.testing.assert_allclose([rate(50), rate(100), rate(400)], [0.5, 0.5, 0.25], rtol=1e-6)


def test_clipping_bounds_the_norm_over_the_whole_tree():
    optimizer, _ = optimizers.build(config(name="sgd", clip=1.0), 10)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.5)  # rate 0.5 x clipped norm 1
    np.testing.assert_allclose(updates["a"], [-0.3, 0.0], rtol=1e-6)


def test_arguments_reach_the_optimiser():
    # Adam's first update is the sign of the gradient, whatever b2; its second is not.
    def second(b2):
        optimizer, _ = optimizers.build(config(arguments={"b2": b2}), 10)
        state, p = optimizer.init(jnp.zeros(1)), jnp.zeros(1)
        _, state = optimizer.update(jnp.ones(1), state, p)
        return float(optimizer.update(3 * jnp.ones(1), state, p)[0][0])

    def adam(b2, b1=0.9):  # Kingma and Ba 2015, algorithm 1, gradients 1 and 3
        m = (b1 * (1 - b1) * 1 + (1 - b1) * 3) / (1 - b1**2)
        v = (b2 * (1 - b2) * 1 + (1 - b2) * 9) / (1 - b2**2)
        return -0.5 * m / (v**0.5 + 1e-8)

    assert second(0.999) == pytest.approx(adam(0.999), rel=1e-4)
    assert second(0.5) == pytest.approx(adam(0.5), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "adamm"}, "config.optimizer 'adamm' is not known. Did you mean 'adam'"),
        ({"arguments": {"beta2": 0.9}}, "argument 'beta2' is not known"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"clip": -1.0}, "clip=-1.0"),
        ({"warmup": 11}, r"warmup=11 must lie in 0..10"),
        ({"schedule": "rsqrt"}, "decay_from must be larger"),
    ],
)
def test_a_wrong_field_is_named(changes, words):
    with pytest.raises(UserError, match=words):
        optimizers.build(config(**changes), 10)
