"""Averages of the weights against their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff.errors import UserError
from jdiff.training import ema


def run(average: ema.Average, values: np.ndarray, start: float = 0.0) -> float:
    """The average after the weights took `values`, one a step."""
    averages = {"a": average}
    state = {"a": {"w": jnp.float32(start)}}
    for step, value in enumerate(values, 1):
        state = ema.update(averages, state, {"w": jnp.float32(value)}, jnp.int32(step))
    return float(state["a"]["w"])


@pytest.mark.parametrize(("steps", "left"), [(1000, 0.905), (10_000, 0.368), (50_000, 0.0067)])
def test_a_constant_decay_forgets_the_start_geometrically(steps, left):
    average = ema.constant(decay=0.9999)

    def body(value, step):
        moved = ema.update({"a": average}, {"a": value}, jnp.zeros(()), step)
        return moved["a"], None

    value, _ = jax.lax.scan(body, jnp.ones(()), jnp.arange(1, steps + 1))
    assert float(value) == pytest.approx(left, rel=5e-3)


def test_a_half_life_in_images_halves_the_start_after_that_many():
    average = ema.constant(halflife_images=640.0, batch_size=64)
    assert run(average, np.zeros(10), start=1.0) == pytest.approx(0.5, rel=1e-5)
    edm = ema.constant(halflife_images=500_000.0, batch_size=512)
    assert edm.rate == pytest.approx(0.99929, abs=1e-5)


def test_the_warm_up_bounds_the_half_life_by_a_share_of_the_images_so_far():
    average = ema.constant(decay=0.9999, warmup=0.05)
    # After 200 steps the half-life is 0.05 * 200 = 10 steps, as EDM's training loop has it.
    assert float(average.decay(jnp.int32(201))) == pytest.approx(2.0 ** (-1 / 10), rel=1e-5)
    assert float(average.decay(jnp.int32(1))) == 0.0
    assert float(average.decay(jnp.int32(10**8))) == pytest.approx(0.9999)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_gamma_of_the_power_function_is_the_published_one(sigma_rel, gamma):
    assert ema.power(sigma_rel).gamma == pytest.approx(gamma, abs=0.01)


def test_the_power_function_weighs_step_t_by_t_to_the_gamma():
    # Equation 119 of Karras et al. 2024: the integral of t^gamma theta(t), normalised. With
    # theta(t) = t / N it is (gamma + 1) / (gamma + 2); the sum agrees to O(1 / N).
    average, n = ema.power(0.10), 2000
    values = jnp.arange(1, n + 1) / n

    def body(value, step_and_theta):
        step, theta = step_and_theta
        return ema.update({"a": average}, {"a": value}, theta, step)["a"], None

    value, _ = jax.lax.scan(body, jnp.float32(99.0), (jnp.arange(1, n + 1), values))
    gamma = average.gamma
    assert float(value) == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3)


def test_averages_are_float32_and_own_their_buffers():
    params = {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2)}
    started = ema.start({"a": ema.constant(decay=0.9), "b": ema.power(0.1)}, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(started)} == {jnp.dtype("float32")}
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, started))}
    assert len(pointers) == 6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ema.constant(), "one of decay and halflife_images"),
        (lambda: ema.constant(decay=1.0), r"decay=1.0 given; it lies in \[0, 1\)"),
        (lambda: ema.power(0.5), "sigma_rel=0.5 given"),
        (lambda: ema.build({"slow": {"kind": "powr"}}, 1), "Did you mean 'power'"),
        (lambda: ema.build({"params": {"kind": "power"}}, 1), "'params' is the weights"),
    ],
)
def test_a_wrong_average_is_named(make, words):
    with pytest.raises(UserError, match=words):
        make()
