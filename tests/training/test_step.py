"""One step of training: what it computes, compiles and keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdiff import parallel
from jdiff.training import ema, step

AVERAGES = {"slow": ema.constant(decay=0.9), "wide": ema.power(0.1)}


def loss(params, key, batch, state):
    """[B]: a linear model's squared error."""
    return jnp.square(batch["x"] @ params["w"] - batch["y"])


def data(n=8):
    x = jax.random.normal(jax.random.key(1), (n, 3))
    return {"x": x, "y": x @ jnp.array([1.0, -2.0, 0.5])}


def fresh(optimizer):
    return step.start({"w": jnp.zeros(3)}, jax.random.key(0), optimizer, AVERAGES)


def test_a_step_is_the_gradient_step_and_moves_every_average():
    optimizer = optax.sgd(0.1)
    state, values = step.make_step(loss, optimizer, AVERAGES)(fresh(optimizer), data())
    x, y = (np.asarray(data()[k], np.float64) for k in "xy")
    grad = 2 * x.T @ (0 - y) / len(y)
    np.testing.assert_allclose(state.params["w"], -0.1 * grad, rtol=1e-5)
    np.testing.assert_allclose(values["loss"], np.mean(y**2), rtol=1e-5)
    np.testing.assert_allclose(values["grad_norm"], np.linalg.norm(grad), rtol=1e-5)
    np.testing.assert_allclose(state.averages["slow"]["w"], -0.01 * grad, rtol=1e-5)
    np.testing.assert_allclose(state.averages["wide"]["w"], state.params["w"], rtol=1e-6)
    assert int(state.step) == 1


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_micro_batches_are_one_big_batch(parts):
    optimizer = optax.adam(0.1)
    whole, a = step.make_step(loss, optimizer, AVERAGES)(fresh(optimizer), data())
    cut, b = step.make_step(loss, optimizer, AVERAGES, parts)(fresh(optimizer), data())
    np.testing.assert_allclose(whole.params["w"], cut.params["w"], rtol=1e-5)
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-5)


def test_each_step_draws_anew_and_a_step_is_a_function_of_its_number():
    noise = lambda params, key, batch, state: jax.random.normal(key, (4,)) + 0 * params["w"][0]
    optimizer = optax.sgd(0.0)
    run = step.make_step(noise, optimizer, {})
    state = step.start({"w": jnp.zeros(1)}, jax.random.key(0), optimizer, {})
    after, first = run(state, None)
    _, second = run(after, None)
    assert float(first["loss"]) != float(second["loss"])
    assert float(run(state, None)[1]["loss"]) == float(first["loss"])


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_the_first_step_that_is_not_finite_is_remembered(bad):
    optimizer = optax.sgd(0.1)
    run = step.make_step(loss, optimizer, AVERAGES)
    state, values = run(fresh(optimizer), data())
    assert int(values["bad_step"]) == -1
    spoiled = {**data(), "y": data()["y"].at[3].set(float(bad))}
    state, values = run(state, spoiled)
    assert int(values["bad_step"]) == 2
    _, values = run(state, data())
    assert int(values["bad_step"]) == 2


def test_the_step_compiles_once_and_gives_its_input_up():
    optimizer = optax.adam(0.1)
    layout = parallel.layout.layout(parallel.make({"data": 4}))
    traces = []

    def counted(params, key, batch, state):
        traces.append(1)
        return loss(params, key, batch, state)

    run = step.compile_step(step.make_step(counted, optimizer, AVERAGES), layout.whole, layout)
    state = jax.device_put(fresh(optimizer), layout.whole)
    before = state.params["w"]
    for _ in range(3):
        state, _ = run(state, layout.put(data(), 8))
    assert len(traces) == 1
    assert before.is_deleted()


def test_four_devices_take_the_step_of_one():
    optimizer = optax.adam(0.1)
    function = step.make_step(loss, optimizer, AVERAGES)
    alone = fresh(optimizer)
    layout = parallel.layout.layout(parallel.make({"data": 4}))
    together = jax.device_put(fresh(optimizer), layout.whole)
    one, four = step.compile_step(function), step.compile_step(function, layout.whole, layout)
    for _ in range(5):
        alone, a = one(alone, data())
        together, b = four(together, layout.put(data(), 8))
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    np.testing.assert_allclose(alone.params["w"], together.params["w"], rtol=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_loss_sees_the_state_before_the_step_and_frozen_weights_stay(parts):
    """Distance to (frozen + average + step): its gradient says what the loss was given."""

    def chase(params, key, batch, state):
        goal = state.frozen["w"] + state.averages["slow"]["w"] + state.step
        return jnp.square(params["w"] - goal)[None] * jnp.ones_like(batch)[:, None]

    optimizer = optax.sgd(1.0)
    run = jax.jit(step.make_step(chase, optimizer, AVERAGES, parts))
    start, frozen = {"w": jnp.array([1.0])}, {"w": jnp.array([10.0])}
    state = step.start(start, jax.random.key(0), optimizer, AVERAGES, frozen)
    w, slow = 1.0, 1.0
    for k in range(3):
        state, _ = run(state, jnp.ones(4))
        w = w - 2 * (w - (10.0 + slow + k))
        slow = slow + 0.1 * (w - slow)
        np.testing.assert_allclose(state.params["w"], [w], rtol=1e-6)
    np.testing.assert_array_equal(state.frozen["w"], frozen["w"])


def test_figures_of_a_loss_stand_beside_it_and_are_means_over_micro_batches():
    optimizer = optax.sgd(0.1)

    def told(params, key, batch, state):
        return loss(params, key, batch, state), {"x": batch["x"].sum(), "one": jnp.asarray(1)}

    plain, _ = step.make_step(loss, optimizer, {})(fresh(optimizer), data())
    for parts in (1, 2):
        state, values = step.make_step(told, optimizer, {}, parts)(fresh(optimizer), data())
        np.testing.assert_allclose(state.params["w"], plain.params["w"], rtol=1e-5)
        np.testing.assert_allclose(values["x"], data()["x"].sum() / parts, rtol=1e-5)
        assert values["one"] == 1
