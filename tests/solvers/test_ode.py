"""Runge-Kutta by tableau and Adams-Bashforth's weights: classical numbers, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import mixture_1d, x64

from jdiff import schedules, solvers
from jdiff.solvers.linear_multistep import adams_weights


@x64
def test_a_step_of_each_tableau_is_the_textbooks():
    """On dx/dt = f(x, t), written out; EDM's schedule, where t is sigma."""
    s = schedules.edm()
    denoise, _ = mixture_1d(s)
    x, t, u = jnp.asarray([[0.7], [-2.0]]), jnp.asarray(2.0), jnp.asarray(1.2)
    h = u - t
    f = lambda x, t: denoise(x, jnp.full(2, t)).eps
    k1 = f(x, t)
    k2, k2_end = f(x + h / 2 * k1, t + h / 2), f(x + h * k1, u)
    k3 = f(x + h / 2 * k2, t + h / 2)
    k4 = f(x + h * k3, u)
    k2_third = f(x + h * 2 / 3 * k1, t + h * 2 / 3)
    middle = np.sqrt(2.4)
    expected = {
        solvers.euler(): k1,
        solvers.heun(): (k1 + k2_end) / 2,
        solvers.midpoint(): k2,
        solvers.heun(2 / 3): k1 / 4 + 3 * k2_third / 4,
        solvers.rk4(): (k1 + 2 * k2 + 2 * k3 + k4) / 6,
        solvers.dpm_2(): f(x + (middle - 2.0) * k1, middle),
    }
    for solver, slope in expected.items():
        made, _, prediction = solver.step(denoise, s, x, (), t, u, None, {})
        np.testing.assert_allclose(made, x + h * slope, rtol=1e-12)
        np.testing.assert_array_equal(prediction.eps, k1)


@x64
def test_adams_weights_are_the_classical_ones_on_even_steps():
    published = {2: [3, -1], 3: [23, -16, 5], 4: [55, -59, 37, -9]}
    for order, numbers in published.items():
        weights = adams_weights(1.0, [-1.0, -2.0, -3.0], [k < order - 1 for k in range(3)])
        exact = np.array(numbers[1:]) / sum(numbers)
        np.testing.assert_allclose(weights[: order - 1], exact, rtol=1e-12)
        np.testing.assert_array_equal(weights[order - 1 :], 0.0)


@x64
def test_adams_weights_integrate_cubics_over_uneven_steps():
    """numpy's polynomial through four slopes, and what is left of it with fewer."""
    h, nodes = -0.7, np.array([1.1, 1.3, 4.0])
    values = np.array([0.3, -2.0, 1.0, 0.5])
    for known in (0, 1, 2, 3):
        weights = adams_weights(h, list(nodes), [k < known for k in range(3)])
        mean = values[0] + sum(w * (v - values[0]) for w, v in zip(weights, values[1:]))
        places = np.append(0.0, nodes[:known])
        area = np.polyint(np.polyfit(places, values[: known + 1], known))
        np.testing.assert_allclose(mean, np.polyval(area, h) / h, rtol=1e-9)


REFUSED = [
    (lambda: solvers.euler("time"), "solver variable 'time' is not known. Allowed: sigma, t"),
    (lambda: solvers.rk4(nodes="evn"), "solver nodes 'evn' is not known. Did you mean 'even'"),
    (lambda: solvers.heun(0.0), "heun: alpha=0.0 given; allowed are 0 < alpha <= 1"),
    (lambda: solvers.runge_kutta([[0.5, 0.5]], [0, 1], 2), r"a\[0\] has 2 entries, 1 are needed"),
    (lambda: solvers.runge_kutta([[0.0]], [0, 1], 2), r"a\[0\]=\(0.0,\) sums to 0"),
    (lambda: solvers.runge_kutta([[0.5]], [1], 2), "b has 1 entries for 2 stages"),
    (lambda: solvers.runge_kutta([[0.5]], [1, 1], 2), "sums to 2; it must sum to 1"),
    (lambda: solvers.lms(5), "lms: order=5 given; allowed are 1, 2, 3 and 4"),
    (lambda: solvers.lms(start="rk"), "lms: start 'rk' is not known"),
    (lambda: solvers.ipndm(0), "ipndm: order=0 given"),
    (lambda: solvers.gradient_estimation(0.0), "gradient_estimation: gamma=0.0 given; it must be"),
]


@pytest.mark.parametrize(("make", "said"), REFUSED)
def test_what_is_no_method_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_stage_inside_a_step_in_sigma_needs_one_schedule():
    tree = {"image": schedules.edm(), "sound": schedules.vp_linear()}
    times = jnp.asarray([0.9, 0.1])
    for solver in (solvers.dpm_2(), solvers.lms(start="runge_kutta")):
        with pytest.raises(ValueError, match="leaves of x have schedules of their own"):
            solver.check(tree, times)
    for solver in (solvers.rk4(), solvers.heun(variable="sigma"), solvers.plms(), solvers.pndm()):
        solver.check(tree, times)
    solvers.dpm_2().check({"image": schedules.edm()}, times)


@pytest.mark.parametrize(
    "make",
    [
        solvers.euler, solvers.heun, lambda: solvers.lms(variable="t"), solvers.edm,
        solvers.euler_maruyama,
    ],
)  # fmt: skip
def test_an_infinite_velocity_at_the_start_is_refused_in_t(make):
    """alpha = sqrt(1 - t) leaves t = 1 at infinite speed; in sigma there is none."""
    tree = {"image": schedules.edm(), "sound": schedules.linear_gamma()}
    with pytest.raises(ValueError, match=r"of PowerVP is infinite at times\[0\]=1; start below"):
        make().check(tree, jnp.asarray([1.0, 0.5, 0.0]))
    make().check(tree, jnp.asarray([0.99, 0.5, 0.0]))
    solvers.heun(variable="sigma").check(tree, jnp.asarray([1.0, 0.5, 0.0]))


@x64
def test_gradient_estimation_weighs_two_estimates():
    """x + (s - t) (gamma eps + (1 - gamma) eps_before), and DDIM in the first step."""
    s = schedules.edm()
    denoise, _ = mixture_1d(s)
    x, times = jnp.asarray([[0.7], [-2.0]]), jnp.asarray([3.0, 2.0, 1.2])
    solver = solvers.gradient_estimation(1.8)
    x1, memory, first = solver.step(denoise, s, x, solver.init(x, times), *times[:2], None, {})
    np.testing.assert_allclose(x1, x - first.eps, rtol=1e-12)
    x2, _, second = solver.step(denoise, s, x1, memory, *times[1:], None, {})
    np.testing.assert_allclose(x2, x1 - 0.8 * (1.8 * second.eps - 0.8 * first.eps), rtol=1e-12)
