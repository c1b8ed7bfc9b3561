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
X = np.linspace(-6.0, 6.0, 15)  # x / alpha at the start
LABEL, NULL, MOST = 0, 2, 1024
SOLVERS = {
    "euler": (solvers.euler, 1),
    "ddim": (solvers.ddim, 1),
    "heun": (solvers.heun, 2),
    "edm": (solvers.edm, 2),
    "dpmpp_2m": (solvers.dpmpp_2m, 2),
    "dpm_solver_2": (lambda: solvers.dpm_solver(2, r1=0.4), 2),
    "dpm_solver_3": (solvers.dpm_solver, 3),
    "dpm_solver_2m": (solvers.dpm_solver_2m, 2),
    "dpmpp_2s": (lambda: solvers.dpmpp_2s(0.7), 2),
    "dpmpp_3m": (solvers.dpmpp_3m, 3),
    "dpmpp_3m_published": (solvers.dpmpp_3m_published, 2),
    "deis_2": (lambda: solvers.deis(2), 2),
    "deis_3": (solvers.deis, 3),
    "unipc_1": (lambda: solvers.unipc(1), 2),
    "unipc_1_bh1": (lambda: solvers.unipc(1, "bh1"), 2),
    "unipc_2": (solvers.unipc, 3),
    "unipc_2_bh1": (lambda: solvers.unipc(2, "bh1"), 3),
    "unipc_3": (lambda: solvers.unipc(3), 4),
    "res_multistep": (solvers.res_multistep, 2),
    "res_singlestep": (solvers.res_singlestep, 2),
    "exp_heun": (solvers.exp_heun, 2),
    "midpoint": (solvers.midpoint, 2),
    "ralston": (lambda: solvers.heun(2 / 3), 2),
    "kutta": (lambda: solvers.runge_kutta([[0.5], [-1, 2]], [1 / 6, 2 / 3, 1 / 6], 3), 3),
    "rk4": (solvers.rk4, 4),
    "lms_in_t": (lambda: solvers.lms(4, "t", "runge_kutta"), 4),
    "heun_in_sigma": (lambda: solvers.heun(variable="sigma"), 2),
    "dpm_2": (solvers.dpm_2, 2),
    "rk4_in_sigma": (lambda: solvers.rk4("sigma"), 4),
    "lms": (solvers.lms, 4),
    "lms_3": (lambda: solvers.lms(3), 3),
    "lms_started": (lambda: solvers.lms(start="runge_kutta"), 4),
    "plms": (solvers.plms, 2),
    "pndm": (solvers.pndm, 2),
    "ipndm": (solvers.ipndm, 2),
    "gradient_estimation": (solvers.gradient_estimation, 1),
}
#: These see a schedule through alpha, sigma / alpha and its inverse alone: a table is enough.
IN_SIGMA = (
    "heun_in_sigma", "dpm_2", "rk4_in_sigma", "lms", "lms_3", "lms_started", "plms", "pndm",
    "ipndm",
)  # fmt: skip
#: Weights of even steps have their order on smooth grids; a Runge-Kutta start keeps it there.
EVEN = ("plms", "pndm", "ipndm", "lms_started")
#: Those of Heun's kind, for which one schedule is enough.
IN_T = ("midpoint", "ralston", "kutta", "rk4", "lms_in_t")
#: Exponential integrators see a schedule through alpha, sigma and log SNR alone: two of them do.
EXPONENTIAL = tuple(
    n for n in SOLVERS if n.startswith(("dpm_s", "dpmpp", "deis", "unipc", "res", "exp_"))
)
#: Euler and Heun use d alpha / dt, which on a table is one-sided at its steps: not an ODE in t.
CASES = [
    (solver, schedule)
    for solver in SOLVERS
    for schedule in ("edm", "vp_linear", "cosine", "rectified_flow", "ddpm_linear")
    if (schedule != "ddpm_linear" or solver in ("ddim", "dpmpp_2m", *IN_SIGMA))
    and (schedule in ("rectified_flow", "vp_linear", "ddpm_linear") or solver not in EXPONENTIAL)
    and (schedule == "ddpm_linear" or solver not in IN_SIGMA)
    and (schedule == "rectified_flow" or solver not in (*IN_T, "gradient_estimation"))
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


def _grid(n, uneven=True):
    """sigma / alpha of n steps: alternately short and long, and growing from the first one on.

    A formula that is right for even steps alone loses its order. A multistep method starts with
    first-order steps, and a first step of length h costs it h^2 whatever follows: here it is h^2
    long, and the next ones each up to twice the one before.
    """
    if not uneven:
        return np.geomspace(START, END, n + 1)
    i = np.arange(n)
    steps = np.where(i % 2, 1.4, 0.6) * np.minimum(1.0, 2.0**i / n)
    return START * (END / START) ** np.append(0.0, np.cumsum(steps) / steps.sum())


@jax.jit
def _march(solver, denoise, schedule, x, times, n):
    """n of the grid's steps, n traced: one program for all grids of a solver on a schedule."""
    noise = Fresh(jax.random.split(jax.random.key(0), len(x)))
    cond = {"label": jnp.full(len(x), LABEL)}

    def step(i, carry):
        x, memory = carry
        return solver.step(denoise, schedule, x, memory, times[i], times[i + 1], noise, cond)[:2]

    return jax.lax.fori_loop(0, n, step, (x, solver.init(x, times)))[0]


def _errors(solver, schedule, scale, numbers_of_steps, uneven=True):
    denoise, _ = mixture_1d(schedule, labels=True)
    denoise = guidance.cfg(denoise, jnp.asarray(scale), null={"label": NULL})
    found = []
    for n in numbers_of_steps:
        sigmas = _grid(n, uneven)
        times = jnp.pad(at(schedule, sigmas), (0, MOST - n))
        np.testing.assert_allclose(schedule.sigma_ratio(times[: n + 1]), sigmas, rtol=1e-9)
        x = jnp.asarray(X)[:, None] * schedule.alpha(times[0])
        end = _march(solver, denoise, schedule, x, times, n) / schedule.alpha(times[n])
        print(f"n {n}: {x[:, 0]} -> {end[:, 0]}, reference {_reference(scale)}")
        found.append(np.abs(np.asarray(end)[:, 0] - _reference(scale)).mean())
    return np.array(found)


@pytest.mark.parametrize(("solver", "schedule"), CASES)
@x64
def test_the_error_falls_with_the_stated_order_unguided_and_guided(solver, schedule):
    make, order = SOLVERS[solver]
    assert make().order == order
    # The last ones' leading term is small beside the next.
    far = order > 2 or solver in ("dpmpp_3m_published", "gradient_estimation", *EVEN)
    steps = np.array([256, 512, 1024] if far else [64, 128, 256])
    for scale in (0.0, 1.0, 2.5):
        errors = _errors(make(), SCHEDULES[schedule](), scale, steps, solver not in EVEN)
        measured = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
        print(f"{solver} {schedule} scale {scale}: order {measured:.2f}, error {errors[-1]:.1e}")
        assert measured == pytest.approx(order, abs=0.15 if order < 4 else 0.2)


@x64
def test_a_first_step_as_long_as_the_others_costs_3m_its_third_order():
    """What `multistep` says of starts: on an even grid DDIM's h^2 is left in the end."""
    schedule, steps = SCHEDULES["rectified_flow"](), np.array([256, 512, 1024])
    errors = _errors(solvers.dpmpp_3m(), schedule, 0.0, steps, uneven=False)
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(2.0, abs=0.15)
