"""sample(): what a sample depends on, what it returns, what recompiles, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import mixture_1d, same
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jdiff import (
    UserError,
    denoisers,
    grids,
    guidance,
    predictions,
    sample,
    sampling,
    schedules,
    solvers,
    stream,
)
from jdiff.predictions import Prediction, corrupt, from_x0

EDM = schedules.edm()
KEY = jax.random.key(0)
TIMES = grids.karras(EDM, 5)
SHRINK = denoisers.function(lambda x, t, cond: from_x0(EDM, x, x / (1 + t[:, None] ** 2), t), EDM)
MIXTURE, _ = mixture_1d(EDM, labels=True)
STOCHASTIC = solvers.edm(churn=2.0)
draw = functools.partial(sample, KEY, times=TIMES, solver=STOCHASTIC)


@functools.cache
def _eleven():
    return np.asarray(draw(SHRINK, shape=(3,), num=11))


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_a_sample_is_the_same_at_any_batch_size(batch):
    """To rounding: XLA computes the end of an array with other instructions than its middle."""
    together = draw(SHRINK, shape=(3,), num=11, batch=batch)
    np.testing.assert_allclose(together, _eleven(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 4])
def test_an_exact_denoisers_sample_is_the_same_at_any_batch_size(batch):
    label = jnp.arange(11) % 3
    together = draw(MIXTURE, shape=(1,), cond={"label": label})
    apart = draw(MIXTURE, shape=(1,), cond={"label": label}, batch=batch)
    np.testing.assert_allclose(apart, together, rtol=1e-4, atol=1e-5)


def test_a_sample_does_not_depend_on_how_many_are_drawn():
    two = draw(SHRINK, shape=(3,), num=2)
    np.testing.assert_allclose(two, _eleven()[:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ids", [[9, 3, 9], np.array([9, 3, 9]), jnp.asarray([9, 3, 9])])
def test_ids_name_the_samples(ids):
    three = draw(SHRINK, shape=(3,), ids=ids)
    np.testing.assert_allclose(three, _eleven()[[9, 3, 9]], rtol=1e-5, atol=1e-6)


def test_different_ids_and_keys_have_different_noise():
    assert len(np.unique(_eleven())) == 33
    other = sample(jax.random.key(1), SHRINK, times=TIMES, solver=STOCHASTIC, shape=(3,), num=11)
    assert not np.isin(np.asarray(other), _eleven()).any()


def test_every_step_and_leaf_has_fresh_standard_normal_noise():
    """Where x0_hat = 0, DDPM's step is x_s = (s / t)^2 x_t + s sqrt(1 - (s / t)^2) z: find z."""
    none = lambda x, t, cond: from_x0(EDM, x, jax.tree.map(jnp.zeros_like, x), t)
    times = jnp.asarray([3.0, 2.0, 1.2, 0.8, 0.5])
    end, path = sample(
        KEY, none, times=times, solver=solvers.ddpm(), shape={"a": (3,), "b": (3,)}, num=1000,
        schedule=EDM, observe=lambda x, t, p: x,
    )  # fmt: skip
    x = np.stack([np.concatenate([path[k], end[k][None]]) for k in "ab"])  # [2, steps + 1, num, 3]
    ratio = np.asarray(times[1:] / times[:-1])[:, None, None]
    z = x[:, 1:] - ratio**2 * x[:, :-1]
    z /= np.asarray(times[1:])[:, None, None] * np.sqrt(1 - ratio**2)
    noises = np.concatenate([x[:, :1] / 3.0, z], 1).reshape(10, -1)  # the start's, then the steps'
    np.testing.assert_allclose(np.cov(noises), np.eye(10), atol=5 / np.sqrt(3000))


def test_four_devices_draw_the_same_samples_as_one():
    assert len(jax.devices()) == 4  # tests/conftest.py
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    label = jnp.arange(8) % 3
    denoise = guidance.cfg(MIXTURE, 2.0, {"label": 2})
    one = draw(denoise, shape=(1,), cond={"label": label})
    four = draw(denoise, shape=(1,), cond={"label": label}, sharding=sharding)
    assert len(four.sharding.device_set) == 4
    np.testing.assert_allclose(four, one, rtol=1e-4, atol=1e-5)


def test_the_start_is_sigma_times_normal_noise():
    """EDM starts from sigma_max eps, not sqrt(sigma_max^2 + 1) eps; rectified flow from eps."""
    start = lambda x, t, p: x
    for s, sigma in [(EDM, 80.0), (schedules.rectified_flow(), 1.0)]:
        denoise = denoisers.function(lambda x, t, c: Prediction(x, x), s)
        _, path = sample(
            KEY, denoise, times=grids.uniform(s, 1), shape=(20_000,), observe=start,
            solver=solvers.ddim(),
        )  # fmt: skip
        assert float(path[0].std()) == pytest.approx(sigma, rel=4 / np.sqrt(40_000))
        assert float(path[0].mean()) == pytest.approx(0.0, abs=4 * sigma / np.sqrt(20_000))


def test_a_given_start_is_where_the_solver_begins():
    """One Euler step from x by hand: x0_hat + (s / t)(x - x0_hat)."""
    x = jnp.asarray([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]])
    made = sample(KEY, SHRINK, x=x, times=jnp.asarray([2.0, 1.0]), solver=solvers.euler())
    np.testing.assert_allclose(made, x / 5 + 0.5 * (x - x / 5), rtol=1e-5)


def test_a_noised_image_denoises_to_itself_where_the_data_set_is_known():
    images = jnp.asarray([[-0.9, 0.1], [0.8, 0.3], [0.0, -0.7]])
    denoise = denoisers.exact(images, EDM)
    eps = jax.random.normal(KEY, images.shape)
    x = corrupt(EDM, images, eps, 0.05)
    times = grids.karras(EDM, 6, first=0.05)
    np.testing.assert_allclose(sample(KEY, denoise, x=x, times=times), images, atol=1e-3)


def test_the_exact_denoiser_draws_its_own_images_with_the_wanted_labels():
    images = jax.random.uniform(jax.random.key(3), (12, 2, 2, 1), minval=-1, maxval=1)
    labels = jnp.arange(12) % 3
    wanted = jnp.asarray([0, 1, 2, 2, 1, 0, 0, 0])
    denoise = denoisers.exact(images, EDM, labels=labels)
    x = sample(
        KEY, guidance.cfg(denoise, 1.0, {"label": 3}), shape=(2, 2, 1), cond={"label": wanted},
        solver=solvers.heun(), times=grids.karras(EDM, 18),
    )  # fmt: skip
    distance = np.abs(np.asarray(x)[:, None] - np.asarray(images)).max((2, 3, 4))
    assert distance.min(1).max() < 1e-3
    np.testing.assert_array_equal(labels[distance.argmin(1)], wanted)


@pytest.mark.parametrize("batch", [None, 2])
def test_observe_returns_the_state_the_time_and_the_prediction_of_every_step(batch):
    x, (states, times, x0) = sample(
        KEY, SHRINK, shape=(3,), num=5, times=TIMES, solver=solvers.ddim(), batch=batch,
        observe=lambda x, t, p: (x, jnp.broadcast_to(t, (len(x),)), p.x0),
    )  # fmt: skip
    assert states.shape == (5, 5, 3)
    np.testing.assert_allclose(times, np.broadcast_to(TIMES[:-1, None], (5, 5)))
    np.testing.assert_allclose(x0, states / (1 + TIMES[:-1, None, None] ** 2), rtol=1e-5)
    # DDIM's own recursion links the states, and the last x0 is the sample
    ratio = (TIMES[1:-1] / TIMES[:-2])[:, None, None]
    np.testing.assert_allclose(states[1:], x0[:-1] + ratio * (states[:-1] - x0[:-1]), rtol=1e-4)
    np.testing.assert_array_equal(x0[-1], x)


def test_a_shape_may_be_a_tree_with_schedules_of_its_own():
    tree = {"image": EDM, "sound": schedules.cosine()}
    x0 = {"image": 0.25, "sound": [-0.5, 0.75]}
    shape = {"image": (2, 2, 1), "sound": [(3,), ()]}

    def denoise(x, t, cond):
        return from_x0(tree, x, jax.tree.map(lambda a, c: jnp.full_like(a, c), x, x0), t)

    made = sample(
        KEY, denoise, shape=shape, num=3, schedule=tree, times=jnp.asarray([0.9, 0.4, 0.0])
    )
    assert made["image"].shape == (3, 2, 2, 1)
    assert [a.shape for a in made["sound"]] == [(3, 3), (3,)]
    jax.tree.map(lambda a, c: np.testing.assert_array_equal(a, np.full(a.shape, c)), made, x0)


def test_a_plain_function_is_sampled_like_its_pytree():
    x = draw(lambda x, t, cond: SHRINK(x, t, cond), shape=(3,), num=11, schedule=EDM)
    np.testing.assert_allclose(x, _eleven(), rtol=1e-6)


def test_the_given_schedule_comes_before_the_denoisers_own():
    twice = schedules.vp_linear()
    x = sample(KEY, SHRINK, x=jnp.ones((1, 1)), schedule=twice, times=jnp.asarray([0.5, 0.25]),
               solver=solvers.ddim())  # fmt: skip
    x0, eps, _ = SHRINK(jnp.ones((1, 1)), jnp.asarray([0.5]))
    np.testing.assert_allclose(x, twice.alpha(0.25) * x0 + twice.sigma(0.25) * eps, rtol=1e-5)


def test_new_weights_numbers_and_times_do_not_recompile():
    def apply(params, x, c_noise, cond, key):
        return params["w"] * x

    def run(w, churn, first, beta_max, seed):
        s = schedules.vp_linear(beta_max=beta_max)
        network = denoisers.network(apply, {"w": w}, s, predictions.parameterization("v"))
        return sample(
            jax.random.key(seed), network, shape=(2,), num=3, solver=solvers.edm(churn=churn),
            times=grids.uniform(s, 4, first=first),
        )  # fmt: skip

    run(jnp.float32(0.1), 1.0, 1.0, 20.0, 0)
    compiled = sampling._run._cache_size()
    others = [(0.2, 1.0, 1.0, 20.0, 0), (0.1, 2.0, 1.0, 20.0, 0), (0.1, 1.0, 0.9, 20.0, 0),
              (0.1, 1.0, 1.0, 15.0, 0), (0.1, 1.0, 1.0, 20.0, 1)]  # fmt: skip
    made = [float(run(jnp.float32(w), *rest).sum()) for w, *rest in others]
    assert sampling._run._cache_size() == compiled
    assert len(set(made)) == len(others)


def test_the_last_short_batch_is_padded_and_not_compiled_anew():
    before = sampling._run._cache_size()
    draw(SHRINK, shape=(5,), num=7, batch=3)
    assert sampling._run._cache_size() == before + 1


def test_a_vmap_over_keys_churn_or_beta_max_equals_the_loop():
    keys = jax.random.split(KEY, 3)
    one = lambda key: sample(key, SHRINK, shape=(3,), times=TIMES, solver=STOCHASTIC)
    np.testing.assert_allclose(jax.vmap(one)(keys), jnp.stack([one(k) for k in keys]), rtol=1e-5)
    churn = lambda c: draw_with(solvers.edm(churn=c))
    draw_with = lambda solver: sample(KEY, SHRINK, shape=(3,), times=TIMES, solver=solver)
    many = jnp.asarray([0.0, 1.0, 3.0])
    np.testing.assert_allclose(
        jax.vmap(churn)(many), jnp.stack([churn(c) for c in many]), rtol=1e-4, atol=1e-5
    )

    def beta(b):
        s = schedules.vp_linear(0.1, b)
        return sample(KEY, mixture_1d(s)[0], shape=(1,), times=grids.uniform(s, 4))

    many = jnp.asarray([10.0, 20.0])
    np.testing.assert_allclose(
        jax.vmap(beta)(many), jnp.stack([beta(b) for b in many]), rtol=1e-3, atol=1e-4
    )


def test_a_sample_is_differentiable_in_a_schedules_number():
    def mean(b):
        s = schedules.vp_linear(0.1, b)
        times = jnp.asarray([1.0, 0.7, 0.4, 0.0])
        return sample(KEY, mixture_1d(s)[0], shape=(1,), times=times).sum()

    slope, h = jax.jit(jax.grad(mean))(20.0), 0.05
    np.testing.assert_allclose(slope, (mean(20 + h) - mean(20 - h)) / (2 * h), rtol=0.05)


# Not `adaptive`: an ulp decides whether it accepts a step.
@pytest.mark.parametrize("solver", [name for name in solvers.BY_NAME if name != "adaptive"])
def test_compiled_and_eager_agree(solver):
    settings = dict(times=grids.karras(EDM, 3), shape=(2,), num=2, solver=solvers.BY_NAME[solver]())
    compiled = sample(KEY, SHRINK, **settings)
    with jax.disable_jit():
        eager = sample(KEY, SHRINK, **settings)
    np.testing.assert_allclose(eager, compiled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", solvers.BY_NAME)
def test_a_half_precision_state_stays_so_while_the_prediction_is_float32(solver):
    x = jnp.ones((2, 3), jnp.bfloat16)
    denoise = lambda x, t, c: SHRINK(x.astype(jnp.float32), t, c)
    made = sample(
        KEY, denoise, x=x, schedule=EDM, times=jnp.asarray([1.0, 0.5, 0.0]),
        solver=solvers.BY_NAME[solver](),
    )  # fmt: skip
    assert made.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(made, np.float32)).all()


def test_stream_yields_the_batches_that_sample_joins():
    parts = list(stream(KEY, SHRINK, times=TIMES, solver=STOCHASTIC, shape=(3,), num=11, batch=4))
    assert [len(p) for p in parts] == [4, 4, 3]
    np.testing.assert_allclose(np.concatenate(parts), _eleven(), rtol=1e-5, atol=1e-6)


LABEL = {"label": jnp.arange(4)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(), r"sample: give shape="),
        (dict(shape="big"), r"shape must be a tuple of integers .* 'big'"),
        (dict(shape=(8, 2.5)), r"shape must be"),
        (dict(shape=(1,), num=3, cond=LABEL), r"num has 3, cond\['label'\] has 4"),
        (dict(shape=(1,), ids=np.arange(2), cond=LABEL), r"ids has 2, cond\['label'\] has 4"),
        (dict(x=jnp.ones((3, 1)), cond=LABEL), r"x has 3, cond\['label'\] has 4"),
        (dict(shape=(1,), cond={"label": 3}), r"cond\['label'\] is a scalar"),
        (dict(shape=(1,), num=0), r"num=0"),
        (dict(shape=(1,), num=2, batch=0), r"batch=0"),
        (dict(shape=(1,), times=[1.0, 2.0]), r"times must fall"),
        (dict(shape=(1,), times=[90.0, 1.0]), r"times run from 90"),
    ],
)
def test_arguments_that_disagree_are_refused_by_name(arguments, said):
    with pytest.raises(UserError, match=said):
        sample(KEY, SHRINK, **{"times": TIMES, **arguments})


def test_a_function_without_a_schedule_asks_for_one():
    with pytest.raises(UserError, match="no schedule; pass schedule="):
        sample(KEY, lambda x, t, cond: Prediction(x, x), shape=(1,), times=TIMES)


def test_trees_of_one_structure_are_needed():
    with pytest.raises(UserError, match="trees do not match"):
        sample(KEY, SHRINK, shape=(1,), schedule={"a": EDM}, times=TIMES)


def test_the_same_call_gives_the_same_bits():
    same(draw(SHRINK, shape=(3,), num=11), _eleven(), 0, 0)


@pytest.mark.parametrize("schedule", [schedules.cosine(), schedules.ddpm_linear()])
def test_sample_inside_jit_with_times_that_are_known_is_checked_and_the_same(schedule):
    denoise = denoisers.exact(jnp.asarray([[0.3], [-0.8]]), schedule)
    times = grids.uniform(schedule, 4)
    draw = lambda times: sample(KEY, denoise, times=times, shape=(1,), num=2, solver=solvers.ddim())
    np.testing.assert_allclose(jax.jit(lambda: draw(times))(), draw(times), rtol=1e-5)
    rising = times[::-1]
    with pytest.raises(ValueError, match="times must fall"):
        jax.jit(lambda: draw(rising))()


@pytest.mark.parametrize(
    ("flow", "target"),
    [
        (schedules.rectified_flow(), "eps"),
        (schedules.rectified_flow(), "score"),
        (schedules.polynomial(2.0), "velocity"),  # the path comes to rest at the noise
    ],
)
def test_a_network_of_noise_is_not_asked_at_pure_noise(flow, target):
    """Guided or not; just below it is."""
    row = predictions.parameterization(target)
    net = denoisers.network(lambda params, x, t, cond, key: x, {}, flow, row)
    draw = lambda d, **end: sample(
        KEY, d, times=grids.uniform(flow, 3, **end), shape=(1,), solver=solvers.ddim()
    )
    for denoise in (net, guidance.static_threshold(net)):
        said = rf"times\[0\]=1 {type(flow).__name__} is pure noise.*'{target}'"
        with pytest.raises(ValueError, match=said):
            draw(denoise)
        assert np.isfinite(draw(denoise, first=0.999)).all()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"solver": solvers.heun},
            r"solver=heun is not a solver; call one: solver=solvers.heun\(\)",
        ),
        ({"solver": "heun"}, "solver='heun' is not a solver"),
        ({"x": {"a": jnp.zeros((2, 1), int)}}, r"x\['a'\] is int32; floats are needed"),
    ],
)
def test_what_is_no_solver_and_no_float_is_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        sample(KEY, SHRINK, **{"times": grids.karras(EDM, 3), "x": jnp.zeros((2, 1))} | wrong)
