"""A cascade: what a sample depends on, what is returned, what recompiles, and what is refused."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jdiff
from jdiff import UserError, cascades, grids, guidance, sample, schedules, solvers
from jdiff.cascades import augmentations, cascade, low_res, stage
from jdiff.predictions import from_x0
from jdiff.pytree import expand, struct

KEY = jax.random.key(0)
EDM = schedules.edm()
TIMES = grids.karras(EDM, 4)
NOISE = augmentations.gaussian(EDM, high=2.0)
LOW = low_res(2, NOISE)
SOLVER = solvers.ddim(eta=1.0)
LABEL = {"label": jnp.arange(7.0) % 3}
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}  # XLA computes the end of an array otherwise


@struct
class Around:
    """Exact for N(m, spread^2), with m the enlarged input and a tenth of the label."""

    spread: float = 0.5
    schedule: schedules.Schedule = EDM

    def __call__(self, x, t, cond):
        mean = 0.1 * expand(cond["label"], x)
        if "low_res" in cond:
            sees = 1.0 / (1.0 + expand(cond["aug_level"], x))
            mean = mean + sees * jnp.repeat(jnp.repeat(cond["low_res"], 2, 1), 2, 2)
        v, t = self.spread**2, expand(t, x)
        return from_x0(self.schedule, x, (v * x + t**2 * mean) / (v + t**2), t[:, 0, 0, 0])


@functools.cache
def _stages():
    """2 x 2, 4 x 4 and 8 x 8."""
    rest = {"times": TIMES, "solver": SOLVER}
    return (
        stage(Around(), shape=(2, 2, 1), **rest),
        stage(Around(), shape=(4, 4, 1), low_res=LOW, level=0.5, **rest),
        stage(Around(), shape=(8, 8, 1), low_res=LOW, level=0.2, **rest),
    )


@functools.cache
def _seven():
    return cascade(*_stages()).sample(KEY, LABEL, intermediate=True)


def test_it_returns_the_last_stage_or_every_one():
    assert [a.shape for a in _seven()] == [(7, 2, 2, 1), (7, 4, 4, 1), (7, 8, 8, 1)]
    np.testing.assert_array_equal(cascade(*_stages()).sample(KEY, LABEL), _seven()[2])
    assert np.isfinite(_seven()[2]).all()


@pytest.mark.parametrize("stages", [1, 2])
def test_a_stage_does_not_depend_on_those_that_follow(stages):
    shorter = cascade(*_stages()[:stages])
    np.testing.assert_array_equal(shorter.sample(KEY, LABEL), _seven()[stages - 1])


def test_each_stage_is_sample_with_its_own_key():
    base = _stages()[0]
    alone = sample(
        jax.random.fold_in(KEY, 0), base.denoiser, times=TIMES, shape=(2, 2, 1), cond=LABEL,
        solver=base.solver,
    )  # fmt: skip
    np.testing.assert_allclose(alone, _seven()[0], **ROUNDING)


@pytest.mark.parametrize("k", [1, 2])
def test_upsampling_what_a_stage_made_is_the_next_stage(k):
    again = cascade(*_stages()).upsample(KEY, k, _seven()[k - 1], LABEL)
    np.testing.assert_array_equal(again, _seven()[k])


def test_samples_do_not_depend_on_the_batch():
    c = cascade(*_stages())
    for one, other in zip(c.sample(KEY, LABEL, batch=3, intermediate=True), _seven()):
        np.testing.assert_allclose(one, other, **ROUNDING)
    picked = c.sample(KEY, {"label": LABEL["label"][np.array([5, 2, 5])]}, ids=np.array([5, 2, 5]))
    np.testing.assert_allclose(picked, _seven()[2][np.array([5, 2, 5])], **ROUNDING)
    small = c.upsample(KEY, 2, _seven()[1], LABEL, batch=3)
    np.testing.assert_allclose(small, _seven()[2], **ROUNDING)


def test_a_stream_has_a_batch_at_a_time_and_a_stage_fewer():
    c = cascade(*[dataclasses.replace(s, batch=b) for s, b in zip(_stages(), (None, None, 3))])
    (part,) = c.stream(KEY, LABEL, batch=7)
    np.testing.assert_allclose(part, _seven()[2], **ROUNDING)
    assert [len(p) for p in c.stream(KEY, LABEL)] == [3, 3, 1]


def test_a_batch_over_four_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    over = NamedSharding(mesh, PartitionSpec("data"))
    images = cascade(*_stages()[:2]).sample(KEY, LABEL, sharding=over)
    np.testing.assert_allclose(images, _seven()[1], **ROUNDING)
    eight = {"label": jnp.arange(8.0) % 3}
    part = next(cascade(*_stages()[:2]).stream(KEY, eight, sharding=over))
    assert part.sharding.is_equivalent_to(over, 4)


def test_every_stage_is_told_the_condition_and_guided_by_itself():
    """Guidance of scale 2 away from label 0 is twice the label, of the guided stage alone."""
    base, middle, last = _stages()
    guided = guidance.cfg(last.denoiser, 2.0, {"label": 0.0})
    images = cascade(base, middle, dataclasses.replace(last, denoiser=guided)).sample(KEY, LABEL)
    twice = {"label": 2.0 * LABEL["label"]}
    c = cascade(base, middle, last)
    wanted = c.upsample(KEY, 2, _seven()[1], twice)
    np.testing.assert_allclose(images, wanted, **ROUNDING)
    assert np.abs(wanted - _seven()[2])[1:3].min() > 0.0
    assert np.abs(c.sample(KEY, twice) - wanted)[1:3].max() > 0.1  # the others were told it once


def test_stopping_early_is_the_beginning_of_the_same_samples():
    """A level on the grid: the state handed over is that of the whole run at this time."""
    base, middle, _ = _stages()
    low = low_res(2, augmentations.gaussian(EDM))
    late = dataclasses.replace(middle, low_res=low, level=float(TIMES[2]), truncate=True)
    state, images = cascade(base, late).sample(KEY, LABEL, intermediate=True)
    _, path = sample(
        jax.random.fold_in(KEY, 0), base.denoiser, times=TIMES, shape=(2, 2, 1), cond=LABEL,
        solver=base.solver, observe=lambda x, t, prediction: x,
    )  # fmt: skip
    np.testing.assert_allclose(state, path[2], **ROUNDING)
    assert np.isfinite(images).all()
    clean = dataclasses.replace(late, level=0.0)
    np.testing.assert_array_equal(
        cascade(base, clean).sample(KEY, LABEL, intermediate=True)[0], _seven()[0]
    )


def test_schedules_that_agree_at_the_level_may_be_called_differently():
    """The default of `gaussian` is the cosine without its limits: the same alpha and sigma."""
    cosine = schedules.cosine()
    base = stage(Around(0.5, cosine), times=grids.uniform(cosine, 4), shape=(4, 4, 1))
    low = low_res(2, augmentations.gaussian())
    assert cascade(base, _up(low_res=low, truncate=True)).stages[1].truncate


def test_numbers_do_not_recompile_and_stages_compile_once():
    program = sys.modules["jdiff.cascades.cascade"]._draw
    base, middle, last = _stages()
    cascade(base, middle, last).sample(KEY, LABEL, batch=3)
    before = program._cache_size()
    numbers = {
        "denoiser": Around(1.0), "solver": solvers.ddim(eta=0.5),
        "times": grids.karras(EDM, 4, rho=5.0),
    }  # fmt: skip
    last = dataclasses.replace(last, level=0.7)
    others = [dataclasses.replace(s, **numbers) for s in (base, middle, last)]
    cascade(*others).sample(jax.random.key(3), {"label": jnp.zeros(12)}, batch=3)
    assert program._cache_size() == before


def test_a_cascade_is_a_pytree():
    c = cascade(*_stages()[:2])
    levels = jnp.asarray([0.5, 1.5])
    at = lambda level: cascade(c.stages[0], dataclasses.replace(c.stages[1], level=level))
    swept = jax.jit(jax.vmap(lambda level: at(level).sample(KEY, LABEL)))(levels)
    np.testing.assert_allclose(swept[0], _seven()[1], **ROUNDING)
    assert np.abs(swept[1] - swept[0]).max() > 0.1


IMAGES = jnp.zeros((2, 8, 8, 1))


def _up(**options):
    """The last stage, with other options."""
    given = {"times": TIMES, "shape": (8, 8, 1), "low_res": LOW, "level": 0.2} | options
    return stage(Around(), **given)


def _over(*stages):
    return lambda: cascade(_stages()[0], *[s() for s in stages])


REFUSED = {
    "no stages": (cascade, "cascade no stages"),
    "no stage": (lambda: cascade(_stages()[0], lambda x: x), "stage 1 function stage(...)"),
    "a first with input": (lambda: cascade(_up()), "stage 0 8 x 8 low_res None"),
    "a second without": (lambda: cascade(_stages()[0], _stages()[0]), "stage 1 2 x 2 low_res"),
    "another resolution": (_over(_up), "stage 1 8 x 8 low_res.factor=2 4 x 4 stage 0 2 x 2"),
    "other channels": (
        lambda: cascade(*_stages()[:2], _up(shape=(8, 8, 3))),
        "stage 2 8 x 8 shape 3 channels stage 1 4 x 4 1",
    ),
    "a factor": (lambda: _up(shape=(9, 9, 1)), "stage 9 x 9 factor=2"),
    "no level": (lambda: _up(level=None), "stage 8 x 8 gaussian level"),
    "a level out of range": (lambda: _up(level=3.0), "stage 8 x 8 gaussian level=3"),
    "a level of nothing": (
        lambda: _up(low_res=low_res(2), level=0.3), "stage 8 x 8 none level=0.3",
    ),
    "a level of the base": (lambda: _up(low_res=None), "stage 8 x 8 level low_res="),
    "a truncated base": (
        lambda: _up(low_res=None, level=None, truncate=True), "stage 8 x 8 truncate low_res=",
    ),
    "truncated, no noise": (
        lambda: _up(low_res=low_res(2, augmentations.blur()), level=0.5, truncate=True),
        "stage 8 x 8 truncate blur gaussian",
    ),
    "truncated, another schedule": (
        lambda: cascade(*_stages()[:2], _up(
            low_res=low_res(2, augmentations.gaussian()), truncate=True)),
        "stage 2 8 x 8 truncate schedule",
    ),
    "truncated above the start": (
        lambda: cascade(*[dataclasses.replace(s, times=TIMES[2:]) for s in _stages()[:2]],
                        _up(level=1.9, truncate=True)),
        "stage 2 8 x 8 truncate level=1.9 times",
    ),
    "truncated residual": (
        lambda: cascade(
            _stages()[0],
            dataclasses.replace(_stages()[1], low_res=low_res(2, NOISE, residual=True)),
            _up(truncate=True)),
        "stage 2 truncate residual",
    ),
    "the input's class": (lambda: _up(low_res=low_res), "stage 8 x 8 low_res=low_res"),
    "a solver's name": (lambda: _up(solver=solvers.heun), "stage 8 x 8 solver=heun call"),
    "a solver and its times": (
        lambda: stage(Around(), times=TIMES[::-1], shape=(2, 2, 1)),
        "stage 2 x 2 times fall",
    ),
    "a flat shape": (lambda: _up(shape=(64,)), "stage shape=(64,) height"),
    "a batch of none": (lambda: _up(batch=0), "stage 8 x 8 batch=0"),
    "upsampling the base": (
        lambda: cascade(*_stages()).upsample(KEY, 0, IMAGES), "upsample k=0 1 to 2",
    ),
    "large images": (
        lambda: cascade(*_stages()).upsample(KEY, 2, IMAGES), "upsample stage 2 4, 4, 1",
    ),
    "bytes": (
        lambda: cascade(*_stages()).upsample(KEY, 2, jnp.zeros((1, 4, 4, 1), jnp.uint8)),
        "upsample uint8 floats",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_runs(case):
    make, words = REFUSED[case]
    with pytest.raises(UserError) as error:
        make()
    for word in words.split():
        assert word in str(error.value)


def test_a_level_that_decides_on_steps_must_be_known():
    last = _up(truncate=True)
    with pytest.raises(UserError, match="truncated"):
        jax.jit(lambda level: cascade(
            *_stages()[:2], dataclasses.replace(last, level=level)).sample(KEY))(0.2)  # fmt: skip


def test_it_is_exported():
    assert jdiff.cascades is cascades and "cascades" in jdiff.__all__
