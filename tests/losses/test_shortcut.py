"""Shortcut models: two exact half steps are the exact step, and who learns what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import x64
from exact_flow import average_velocity, flow_map, network

from jdiff import denoisers, losses, schedules
from jdiff.errors import UserError
from jdiff.losses.shortcut import half_steps
from jdiff.predictions import parameterization

KEY = jax.random.key(0)
FLOW = schedules.rectified_flow()


@x64
def test_two_half_steps_of_the_exact_flow_are_its_whole_step():
    t = jnp.arange(8, 17) / 16  # in float32 too, as the network is told it
    size, x = t / 2, jax.random.normal(KEY, (9, 1))
    small = jnp.arange(9) % 2 == 1
    found = jax.jit(half_steps)(flow_map(), x, t, t - size / 2, t - size, {}, small)
    exact = average_velocity(x, t, t - size)
    v = average_velocity(x, t, t)
    middle = x - (size / 2)[:, None] * v
    euler = 0.5 * (v + average_velocity(middle, t - size / 2, t - size / 2))
    np.testing.assert_allclose(found, jnp.where(small[:, None], euler, exact), rtol=1e-10)


@x64
def test_one_sample_in_four_agrees_with_itself_and_the_others_learn_the_velocity():
    x0, eps = jax.random.normal(KEY, (2, 64, 1))
    at = lambda key, n, schedule: jnp.full(n, 0.625)

    @jax.jit
    def loss(target):  # 2^-20 of the way: Euler is exact enough
        return losses.shortcut(
            KEY, flow_map(), x0, target=target, eps=eps, levels=20, distribution=at
        )

    found = loss(flow_map())
    x, t = 0.375 * x0 + 0.625 * eps, jnp.full(64, 0.625)
    error = jnp.mean((average_velocity(x, t, t) - (eps - x0)) ** 2, 1)
    itself = np.arange(64) % 4 == 0
    assert found[itself].max() < 1e-10
    np.testing.assert_allclose(found[~itself], error[~itself], rtol=1e-9)
    other = loss(flow_map(0.5))
    assert other[itself].min() > 1e-4  # its target is the other network's
    np.testing.assert_array_equal(other[~itself], found[~itself])


def test_no_gradient_flows_into_the_target():
    x0 = jax.random.normal(KEY, (8, 1))
    loss = lambda b: losses.shortcut(KEY, flow_map(), x0, target=flow_map(b), every=2).sum()
    assert jax.jit(jax.grad(loss))(0.3) == 0.0


def test_steps_start_on_the_grid_of_their_size_and_every_size_occurs():
    """Sizes 1, 1/2, 1/4 of the way; the smallest half steps ask for the velocity."""
    seen = []

    def spy(params, x, t, cond):
        jax.debug.callback(lambda *a: seen.append(a), t, cond["s"], ordered=True)
        return x

    answer = network(spy, FLOW, "velocity")
    x0 = jnp.zeros((400, 1))
    jax.jit(lambda: losses.shortcut(KEY, answer, x0, target=answer, every=2, levels=3))()
    jax.effects_barrier()
    (t, first_end), (middle, second_end), (all_t, all_s) = seen
    end = all_s[::2]
    np.testing.assert_array_equal(all_t[::2], t)
    np.testing.assert_array_equal(all_t[1::2], all_s[1::2])  # the others learn the velocity
    size = t - end
    assert set(size.tolist()) == {1.0, 0.5, 0.25}
    counts = np.array([(size == s).sum() for s in (1.0, 0.5, 0.25)])
    assert counts.min() > 40  # 200 draws of 3 equal chances
    np.testing.assert_array_equal(t % size, 0.0)
    assert end.min() == 0.0
    assert t.max() == 1.0
    np.testing.assert_allclose(middle, (t + end) / 2)
    smallest = size == 0.25
    np.testing.assert_array_equal(first_end, np.where(smallest, t, middle))
    np.testing.assert_array_equal(second_end, np.where(smallest, middle, end))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"every=4 .* the batch \(6\)"):
        losses.shortcut(KEY, flow_map(), jnp.zeros((6, 1)), target=flow_map())


def test_data_at_no_finite_time_is_refused():
    s = schedules.ve()
    student = denoisers.network(lambda w, x, *rest: w * x, 1.0, s, parameterization("x0"))
    with pytest.raises(UserError, match="shortcut: VE has its data at t = -inf"):
        losses.shortcut(jax.random.key(0), student, jnp.ones((4, 2)), target=student)
