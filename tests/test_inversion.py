"""Inversion: exact where it should be, and back again with an error of known order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import at, mixture_1d, x64

from jdiff import denoisers, guidance, sample, schedules, solvers
from jdiff.inversion import invert
from jdiff.predictions import from_x0

KEY = jax.random.key(0)
X = np.array([[-0.9], [0.1], [0.7], [1.3]])


def _denoiser(s, means, variances):
    """Three components of two labels, guided."""
    denoise = denoisers.mixture(
        jnp.asarray(means)[:, None], jnp.asarray(variances), s, labels=np.array([0, 1, 0])
    )
    return guidance.cfg(denoise, 1.5, null={"label": 2})


COND = {"label": np.array([0, 1, 0, 1])}


@pytest.mark.parametrize(
    ("name", "order", "back_order"),
    [("euler", 1, 1), ("heun", 2, 3)],
)
@x64
def test_the_noise_is_the_odes_to_the_solvers_order_and_so_is_the_way_back(name, order, back_order):
    """On the way back a step of even order undoes its error; one order is gained.

    The noise is known for Gaussian data (three components in one place): there (x - alpha m) /
    sqrt(alpha^2 v + sigma^2) is constant along the ODE.
    """
    s, mean, variance = schedules.vp_linear(), 0.4, 0.3
    gaussian = _denoiser(s, [mean] * 3, [variance] * 3)
    mixture = _denoiser(s, [-1.0, 0.3, 1.2], [0.2, 0.1, 0.3])
    solver, steps, errors, gaps = solvers.BY_NAME[name](), (80, 160), [], []
    for n in steps:
        times = at(s, np.geomspace(0.1, 8.0, n + 1))
        found = invert(gaussian, X, times=times, cond=COND, solver=solver)
        (a, b), (a_end, b_end) = (
            (float(s.alpha(t)), float(s.sigma(t))) for t in (times[0], times[-1])
        )
        unit = (X - a * mean) / np.sqrt(a**2 * variance + b**2)
        expected = a_end * mean + unit * np.sqrt(a_end**2 * variance + b_end**2)
        errors.append(float(jnp.abs(found - expected).max()))
        noise = invert(mixture, X, times=times, cond=COND, solver=solver)
        back = sample(KEY, mixture, x=noise, times=times[::-1], cond=COND, solver=solver)
        gaps.append(float(jnp.abs(back - X).max()))
    up, there_and_back = (np.log2(e[0] / e[1]) for e in (errors, gaps))
    print(f"{name}: noise {errors}, order {up:.2f}; back {gaps}, order {there_and_back:.2f}")
    assert up == pytest.approx(order, abs=0.15)
    assert there_and_back == pytest.approx(back_order, abs=0.25)


@x64
def test_ddims_fixed_point_is_its_inverse_from_the_data_to_pure_noise():
    """At coarse steps, from sigma = 0 to alpha = 0, where one iteration is far off."""
    s = schedules.rectified_flow()
    denoise = denoisers.mixture(jnp.asarray([[-0.5], [0.8]]), 0.6, s)
    times = jnp.asarray([0.0, 0.05, 0.15, 0.3, 0.5, 0.7, 0.9, 1.0])
    gaps = []
    for iterations in (1, 10, 100):
        noise = invert(denoise, X, times=times, iterations=iterations)
        back = sample(KEY, denoise, x=noise, times=times[::-1], solver=solvers.ddim())
        gaps.append(float(jnp.abs(back - X).max()))
    print(gaps)
    assert gaps[0] > 0.1 and gaps[0] / 5 > gaps[1] > 1e-6 and gaps[2] < 1e-9


@x64
def test_a_solver_leaves_the_data_by_the_equation_and_then_takes_its_own_steps():
    s = schedules.edm()
    denoise, _ = mixture_1d(s)
    found = invert(denoise, X, times=[0.0, 0.5, 2.0], solver=solvers.euler())
    first = X + 0.5 * denoise(X, jnp.full(4, 0.5)).eps
    second = first + 1.5 * denoise(first, jnp.full(4, 0.5)).eps
    np.testing.assert_allclose(found, second, rtol=1e-12)


def test_trees_and_plain_functions_are_served():
    s = {"a": schedules.edm(), "b": schedules.rectified_flow()}

    def denoise(x, t, cond):
        return from_x0(s, x, jax.tree.map(lambda a: 0.5 * a, x), t)

    x = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 2))}
    noise = invert(denoise, x, times=[0.0, 0.2, 0.9], schedule=s, solver=solvers.ddim())
    assert jax.tree.map(jnp.shape, noise) == jax.tree.map(jnp.shape, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(noise))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(times=[1.0, 0.5, 0.0]), r"times must rise.*times\[0\]=1 is followed by times\[1\]"),
        (dict(times=[0.0, 2.0]), "run from 2 to 0; VPLinear allows 1 down to 0"),
        (dict(solver=solvers.ddim(0.5)), "invert: the solver draws noise"),
        (dict(solver=solvers.ddpm()), "invert: the solver draws noise"),
        (dict(iterations=0), "invert: iterations=0 given"),
        (dict(cond={"label": jnp.zeros(3)}), r"cond\['label'\] has shape \(3,\); one entry for"),
    ],
)
def test_what_cannot_be_inverted_is_refused(given, said):
    denoise, _ = mixture_1d(schedules.vp_linear())
    with pytest.raises(ValueError, match=said):
        invert(denoise, X, **{"times": [0.0, 0.5, 1.0], **given})


def test_it_needs_a_schedule():
    with pytest.raises(ValueError, match="invert: the denoiser carries no schedule"):
        invert(lambda x, t, cond: x, X, times=[0.0, 1.0])
