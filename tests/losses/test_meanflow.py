"""MeanFlow: the identity holds for the exact average velocity, and for no other tangent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import x64
from exact_flow import average_velocity, denoiser, flow_map, network, to

from jdiff import losses, schedules
from jdiff.errors import UserError
from jdiff.losses.meanflow import identity

KEY = jax.random.key(0)
FLOW = schedules.rectified_flow()


def points(n=64):
    keys = jax.random.split(KEY, 3)
    t = jax.random.uniform(keys[1], (n,), minval=0.2)
    return 2.0 * jax.random.normal(keys[0], (n, 1)), t, t * jax.random.uniform(keys[2], (n,))


def times(*values):
    """A distribution of times that gives these in turn, to the whole batch."""
    given = iter(values)
    return lambda key, n, schedule: jnp.full(n, next(given))


@x64
def test_the_closed_form_is_the_mean_velocity_of_the_flow():
    x, t, s = points()
    expected = (x - to(FLOW, x, t, s)) / (t - s)[:, None]
    np.testing.assert_allclose(average_velocity(x, t, s), expected, rtol=1e-9, atol=1e-10)


@x64
def test_the_exact_average_velocity_is_its_own_target_and_no_other_tangent_says_so():
    x, t, s = points()
    v = average_velocity(x, t, t)
    u, target = identity(average_velocity, x, t, s, v)
    np.testing.assert_allclose(u, average_velocity(x, t, s), rtol=1e-12)
    np.testing.assert_allclose(target, u, rtol=1e-10)
    one, zero = jnp.ones_like(t), jnp.zeros_like(t)
    # The paper's table 1b, in the order (x, t, s): its (v, 0, 0), (v, 1, 0) and (v, 1, 1).
    for tangent in [(v, zero, zero), (v, zero, one), (v, one, one)]:
        rate = jax.jvp(average_velocity, (x, t, s), tangent)[1]
        assert jnp.abs(v - (t - s)[:, None] * rate - u).mean() > 0.05


@x64
def test_the_loss_of_the_exact_flow_is_zero_and_so_is_its_gradient():
    x0, eps = jax.random.normal(KEY, (2, 256, 1))

    @jax.jit
    @jax.value_and_grad
    def loss(b, power):
        return losses.meanflow(
            KEY, flow_map(b), x0, eps=eps, share=1.0, power=power, teacher=denoiser(FLOW)
        ).sum()

    for power in (0.0, 1.0):
        value, gradient = loss(0.0, power)
        assert value < 1e-9  # the network is told t in float32
        assert abs(gradient) < 1e-4
        assert loss(0.1, power)[0] > 0.1


@x64
def test_the_target_is_held_fixed_and_the_weight_is_adaptive():
    """For u off by b (1 + x) the error is b ((1 + x) + (t - s) v), of which d/db sees u's part."""
    x0, eps, t, s, b = *jax.random.normal(KEY, (2, 8, 2)), 0.875, 0.25, 0.2
    x, full = (1 - t) * x0 + t * eps, jnp.full(8, t)

    @jax.jit
    def loss(b, power):
        of = lambda b: losses.meanflow(
            KEY, flow_map(b), x0, eps=eps, share=1.0, power=power, floor=0.5,
            distribution=times(s, t), teacher=lambda x, t, cond: _endpoints(x, t),
        )  # fmt: skip
        return jax.jvp(of, (b,), (1.0,))

    v = average_velocity(x, full, full)
    error = b * ((1 + x) + (t - s) * v)
    square = jnp.sum(error**2, 1)
    slope = 2 * jnp.sum(error * (1 + x), 1)
    for power in (0.0, 2.0):
        weight = (square + 0.5) ** -power
        found = loss(b, power)
        np.testing.assert_allclose(found[0], weight * square, rtol=1e-9)
        np.testing.assert_allclose(found[1], weight * slope, rtol=1e-9)


def _endpoints(x, t):
    """The exact denoiser in any dimension: x0 = x - t v, eps = x + (1 - t) v."""
    from jdiff.predictions import Prediction

    v = average_velocity(x, t, t)
    return Prediction(x - t[:, None] * v, x + (1 - t)[:, None] * v)


def test_with_the_paths_own_velocity_the_gradient_vanishes_in_the_mean():
    """u is the regression of the target at (x, t, s), so the noise of v leaves no bias."""
    n = 100_000
    keys = jax.random.split(KEY)
    x0 = 0.7 + 0.3 * jax.random.normal(keys[0], (n, 1))  # M and V of exact_flow

    @jax.jit
    def slopes(b):
        loss = lambda b: losses.meanflow(keys[1], flow_map(b), x0, share=1.0, power=0.0)
        return jax.jvp(loss, (b,), (1.0,))[1]

    def z(b):
        found = np.asarray(slopes(b), np.float64)
        return found.mean() / (found.std() / np.sqrt(n))

    assert abs(z(0.0)) < 4.0
    assert z(0.1) > 20.0
    assert z(-0.1) < -20.0


@pytest.mark.parametrize(
    ("share", "low", "high"), [(0.0, 0, 0), (0.25, 200, 320), (1.0, 1024, 1024)]
)
def test_the_share_of_samples_learns_a_mean_and_t_is_the_later_time(share, low, high):
    seen = []

    def spy(params, x, t, cond):
        jax.debug.callback(lambda *a: seen.append(a), t, cond["s"])
        return x

    answer, x0 = network(spy, FLOW, "velocity"), jnp.zeros((1024, 1))
    jax.jit(lambda share: losses.meanflow(KEY, answer, x0, share=share))(share)
    jax.effects_barrier()
    t, s = (np.asarray(a) for a in seen[-1])
    assert low <= (s < t).sum() <= high
    assert (s <= t).all()


@x64
def test_guidance_mixes_the_networks_own_velocities_into_the_target():
    table = jnp.asarray([0.5, -1.0, 3.0])  # u for label 0, label 1 and the null
    answer = network(lambda p, x, t, cond: table[cond["label"]][:, None] + 0 * x, FLOW, "velocity")
    x0, eps = jax.random.normal(KEY, (2, 3, 1))
    label, omega, mix = jnp.array([0, 1, 2]), 2.0, 0.4
    loss = lambda: losses.meanflow(
        KEY, answer, x0, {"label": label}, eps=eps, share=0.0, power=0.0, guidance=omega, mix=mix,
        null={"label": 2},
    )  # fmt: skip
    found = jax.jit(loss)()
    v, u = (eps - x0)[:, 0], table[label]
    guided = omega * v + mix * u + (1 - omega - mix) * table[2]
    np.testing.assert_allclose(found, (u - jnp.where(label == 2, v, guided)) ** 2, rtol=1e-10)


def test_guidance_without_labels_is_refused():
    with pytest.raises(UserError, match=r"guidance=2.0 and mix=0.0 .* no null condition"):
        losses.meanflow(KEY, flow_map(), jnp.zeros((4, 1)), guidance=2.0)


def test_a_tree_of_two_parts_learns_as_each_part():
    x0, eps = jax.random.normal(KEY, (2, 4, 3))
    one = flow_map(0.3)
    two = dataclasses.replace(one, apply=_each)
    split = lambda a: {"a": a[:, :1], "b": a[:, 1:]}
    loss = jax.jit(lambda net, x0, eps: losses.meanflow(KEY, net, x0, eps=eps, share=1.0))
    whole, parts = loss(one, x0, eps), loss(two, split(x0), split(eps))
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def _each(params, x, t, cond, key):
    one = lambda x: average_velocity(x, t, cond["s"]) + params["b"] * (1.0 + x)
    return jax.tree.map(one, x)
