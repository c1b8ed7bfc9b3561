"""Adaptive steps: on Gaussian data, where the ODE's solution is known, each sample by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import SCHEDULES, at, mixture_1d, x64

from jdiff import denoisers, guidance, sample, schedules, solvers
from jdiff.predictions import from_x0
from jdiff.solvers import adaptive, adaptive_count

pytest.importorskip("diffrax", reason="the extra `solvers`")
KEY = jax.random.key(0)
MEAN, VARIANCE = 0.4, 0.3


def _spread(schedule, t):
    """The standard deviation of x_t; (x - alpha mean) over it is constant along the ODE."""
    return np.sqrt(float(schedule.alpha(t)) ** 2 * VARIANCE + float(schedule.sigma(t)) ** 2)


@pytest.mark.parametrize(
    ("name", "method", "variable"),
    [("rectified_flow", "tsit5", "t"), ("ddpm_linear", "dopri5", "sigma")],
)
@x64
def test_the_error_is_that_of_the_tolerance(name, method, variable):
    """From a grid of two values; on a table too, where d alpha / dt has kinks."""
    s = SCHEDULES[name]()
    denoise = denoisers.mixture(jnp.asarray([[MEAN]]), VARIANCE, s)
    times, x = at(s, [20.0, 0.01]), jnp.asarray([[-30.0], [0.1], [12.0]]) * 0.05
    unit = (x - float(s.alpha(times[0])) * MEAN) / _spread(s, times[0])
    expected = float(s.alpha(times[1])) * MEAN + unit * _spread(s, times[1])
    errors = []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        solver = adaptive(method, tolerance, tolerance, variable)
        found = sample(KEY, denoise, x=x, times=times, solver=solver)
        errors.append(float(jnp.abs(found - expected).max()))
    print(name, method, variable, errors)
    assert all(e < 20 * tol for e, tol in zip(errors, (1e-3, 1e-5, 1e-7, 1e-9)))
    assert errors[0] > 1e4 * errors[3]


@jax.jit
def _step(solver, denoise, x, t, s, cond):
    """-> x at s, evaluations."""
    return solver.step(
        denoise, denoise.schedule, x, solver.init(x, jnp.stack([t, s])), t, s, None, cond
    )[:2]


@x64
def test_a_sample_takes_its_own_steps_whoever_else_is_there():
    """Guided by a scale for each sample, which is a leaf `[B]` of the denoiser."""
    denoise, _ = mixture_1d(schedules.vp_linear(), labels=True)
    scales, x = jnp.asarray([0.0, 1.0, 6.0]), jnp.asarray([[0.3], [-1.0], [2.5]])
    t, s, cond = jnp.asarray(1.0), jnp.asarray(1e-3), {"label": jnp.asarray([0, 0, 1])}
    guide = lambda scale: guidance.cfg(denoise, scale, null={"label": 2})
    together, counts = _step(adaptive(), guide(scales), x, t, s, cond)
    print("evaluations", counts)
    assert len(set(counts.tolist())) > 1
    for i in range(3):
        part = slice(i, i + 1)
        own = {"label": cond["label"][part]}
        alone, count = _step(adaptive(), guide(scales[part]), x[part], t, s, own)
        np.testing.assert_allclose(alone, together[part], rtol=1e-9)
        assert count.tolist() == counts[part].tolist()


@pytest.mark.parametrize("method", ["heun", "tsit5"])
def test_the_count_is_that_of_the_calls_and_none_is_at_the_data(method):
    s, seen = schedules.edm(), []

    def denoise(x, t, cond):
        jax.debug.callback(lambda t: seen.append(float(t[0])), t)
        return from_x0(s, x, jnp.tanh(x) / (1.0 + t[:, None]), t)

    times = jnp.asarray([80.0, 5.0, 5.0, 0.002, 0.0])  # an interval of no length among them
    count = adaptive_count(denoise, jnp.ones((1, 1)), times, schedule=s, solver=adaptive(method))
    jax.effects_barrier()
    assert count.tolist() == [len(seen)]
    assert min(seen) > 0.0019
    assert adaptive(method).count(4) is None


def test_the_last_step_is_exact_and_too_many_steps_are_no_number():
    s = schedules.edm()
    image = jnp.asarray([0.123, -0.7])

    def denoise(x, t, cond):
        """A point for the first sample, a wild field for the second."""
        wild = jnp.arange(2)[:, None] == 1
        x0 = {"a": jnp.where(wild, 20.0 * jnp.sin(20.0 * x["a"]), image), "b": 0.5 * x["b"]}
        return from_x0({"a": s, "b": s}, x, x0, t)

    x = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 3))}
    made = sample(KEY, denoise, schedule=s, x=x, times=[3.0, 0.1, 0.0], solver=adaptive(most=40))
    np.testing.assert_array_equal(made["a"][0], image)
    assert np.isfinite(made["b"][0]).all() and np.isnan(made["b"][1]).all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: adaptive("tsit"), "adaptive: method 'tsit' is not known. Did you mean 'tsit5'"),
        (lambda: adaptive(variable="s"), "solver variable 's' is not known"),
        (lambda: adaptive(rtol=0.0), "adaptive: rtol=0.0 given; it must be positive"),
        (lambda: adaptive(atol=-1e-3), "adaptive: atol=-0.001 given; it must be positive"),
    ],
)
def test_what_is_out_of_range_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_sigma_is_refused_where_it_is_infinite_or_not_one():
    flow, solver = schedules.rectified_flow(), adaptive(variable="sigma")
    with pytest.raises(ValueError, match=r"infinite at times\[0\]=1"):
        sample(KEY, mixture_1d(flow)[0], shape=(1,), times=[1.0, 0.1, 0.0], solver=solver)
    with pytest.raises(ValueError, match="schedules of their own. Use variable='t'"):
        solver.check({"a": schedules.edm(), "b": flow}, jnp.asarray([0.9, 0.1]))
    assert solvers.BY_NAME["adaptive"] is adaptive


def test_without_diffrax_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffrax", None)
    with pytest.raises(ValueError, match=r"needs diffrax; pip install 'jdiff\[solvers\]'"):
        adaptive().check(schedules.edm(), jnp.asarray([1.0, 0.1]))
