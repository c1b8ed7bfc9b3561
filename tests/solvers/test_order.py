"""Measured order of convergence: each solver on a mixture's probability-flow ODE, in float64.

The reference is scipy's, on the ODE in EDM's variables, d(x / alpha) / d(sigma / alpha) = eps, with
the score written out in numpy: it shares no line with the solvers, the schedules or the guidance.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import SCHEDULES, at, mixture_1d, mixture_score, x64
from scipy.integrate import solve_ivp

from jdiff import guidance, solvers
from jdiff.noise import Fresh

START, END = 5.0, 0.2  # sigma / alpha: an interval where nothing is degenerate
X = np.array([-4.0, -0.5, 1.0, 6.0])  # x / alpha at the start
LABEL, NULL, MOST = 0, 2, 256
SOLVERS = {
    "euler": (solvers.euler, 1),
    "ddim": (solvers.ddim, 1),
    "heun": (solvers.heun, 2),
    "edm": (solvers.edm, 2),
    "dpmpp_2m": (solvers.dpmpp_2m, 2),
}
#: Euler and Heun use d alpha / dt, which on a table is one-sided at its steps: not an ODE in t.
CASES = [
    (solver, schedule)
    for solver in SOLVERS
    for schedule in ("edm", "vp_linear", "cosine", "rectified_flow", "ddpm_linear")
    if schedule != "ddpm_linear" or solver in ("ddim", "dpmpp_2m")
]


@functools.cache
def _reference(scale: float) -> np.ndarray:
    """x / alpha at END, to 1e-12; scale 0 is the null label, 1 the label, others extrapolate."""
    numbers = mixture_1d(None)[1]

    def slope(log_sigma, x):
        sigma = np.exp(log_sigma)
        null = mixture_score(x, sigma, numbers)
        score = null + scale * (mixture_score(x, sigma, numbers, LABEL) - null)
        return sigma * (-sigma * score)  # d sigma eps

    span = np.log([START, END])
    return solve_ivp(slope, span, X, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]


@jax.jit
def _march(solver, denoise, schedule, x, times, n):
    """n of the grid's steps, n traced: one program for all grids of a solver on a schedule."""
    noise = Fresh(jax.random.split(jax.random.key(0), len(x)))
    cond = {"label": jnp.full(len(x), LABEL)}

    def step(i, carry):
        x, memory = carry
        return solver.step(denoise, schedule, x, memory, times[i], times[i + 1], noise, cond)[:2]

    return jax.lax.fori_loop(0, n, step, (x, solver.init(x, times)))[0]


def _errors(solver, schedule, scale, numbers_of_steps):
    denoise, _ = mixture_1d(schedule, labels=True)
    denoise = guidance.cfg(denoise, jnp.asarray(scale), null={"label": NULL})
    found = []
    for n in numbers_of_steps:
        sigmas = np.geomspace(START, END, n + 1)
        times = jnp.pad(at(schedule, sigmas), (0, MOST - n))
        np.testing.assert_allclose(schedule.sigma_ratio(times[: n + 1]), sigmas, rtol=1e-9)
        x = jnp.asarray(X)[:, None] * schedule.alpha(times[0])
        end = _march(solver, denoise, schedule, x, times, n) / schedule.alpha(times[n])
        print(f"n {n}: {x[:, 0]} -> {end[:, 0]}, reference {_reference(scale)}")
        found.append(np.abs(np.asarray(end)[:, 0] - _reference(scale)).max())
    return np.array(found)


@pytest.mark.parametrize(("solver", "schedule"), CASES)
@x64
def test_the_error_falls_with_the_stated_order_unguided_and_guided(solver, schedule):
    make, order = SOLVERS[solver]
    assert make().order == order
    steps = np.array([64, 128, MOST])
    for scale in (0.0, 1.0, 2.5):
        errors = _errors(make(), SCHEDULES[schedule](), scale, steps)
        measured = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
        print(f"{solver} {schedule} scale {scale}: order {measured:.2f}, error {errors[-1]:.1e}")
        assert measured == pytest.approx(order, abs=0.15)
