"""Exponential integrators: their weights against quadrature, what each is exact for, their starts.

The reference is the integral of the variation of constants (`phi`'s docstring), by scipy.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import at, x64
from scipy.integrate import quad

from jdiff import schedules, solvers
from jdiff.noise import Fresh
from jdiff.predictions import Prediction, from_x0
from jdiff.pytree import expand
from jdiff.schedules import schedule_map
from jdiff.solvers import phi
from jdiff.solvers.multistep import History

ZS = np.array([-60.0, -7.0, -1.001, -0.999, -0.1, -1e-3, -1e-9, 0.0, 1e-12, 1e-4, 0.7, 1.2, 6.0])


def _integral(fn, z):
    """int_0^1 exp(z (1 - u)) fn(u) du."""
    return quad(lambda u: math.exp(z * (1.0 - u)) * fn(u), 0, 1, epsabs=0, epsrel=1e-13, limit=200)[
        0
    ]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@x64
def test_phi_is_its_integral_on_both_sides_of_the_series(dtype):
    z = ZS.astype(dtype)
    found = np.array(jax.jit(lambda z: phi.phis(z, 4))(z))
    assert found.dtype == dtype
    wanted = [
        [_integral(lambda u, k=k: u**k / math.factorial(k), float(v)) for v in z] for k in range(4)
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-13 if dtype == "float64" else 3e-6)
    np.testing.assert_array_equal(phi.phis(jnp.asarray(-np.inf), 4), np.zeros(4))


@x64
def test_phi_has_a_gradient_everywhere():
    """phi_1' = phi_1 - phi_2, from (exp(z) - 1) / z; at 0 it is 1 / 2."""
    z = jnp.asarray(ZS[2:])
    slope = jax.vmap(jax.grad(lambda z: phi.phis(z, 1)[0]))(z)
    np.testing.assert_allclose(slope, phi.phis(z, 1)[0] - phi.phis(z, 2)[1], rtol=1e-10)


@pytest.mark.parametrize("nodes", [(-0.6,), (1.0,), (-0.6, -2.1), (1.0, -0.7, -1.9)])
@pytest.mark.parametrize("z", [-0.8, 1.5])
@x64
def test_adams_weights_integrate_polynomials_of_as_many_powers_as_nodes(nodes, z):
    weights = phi.adams(jnp.asarray(z), [jnp.asarray(u) for u in nodes])
    for power in range(1, len(nodes) + 1):
        found = sum(float(w) * u**power for w, u in zip(weights, nodes))
        assert found == pytest.approx(_integral(lambda u, p=power: u**p, z), rel=1e-11)
    beyond = sum(float(w) * u ** (len(nodes) + 1) for w, u in zip(weights, nodes))
    assert beyond != pytest.approx(_integral(lambda u: u ** (len(nodes) + 1), z), rel=1e-3)


POLYNOMIAL = np.array([0.7, -0.4, 0.15])  # of lambda


def _along_lambda(of, degree):
    """A denoiser whose x0 (or eps) is a polynomial of lambda, whatever x; a function of a tree."""
    powers = POLYNOMIAL * (np.arange(3) <= degree)

    def denoise(schedule, x, t, cond):
        def value(s, x):
            lam = 0.5 * s.logsnr(t)
            return jnp.zeros_like(x) + expand(sum(p * lam**i for i, p in enumerate(powers)), x)

        y = schedule_map(value, schedule, x)
        if of == "x0":
            return from_x0(schedule, x, y, t)
        clean = schedule_map(
            lambda s, x, e: (x - expand(s.sigma(t), x) * e) / expand(s.alpha(t), x), schedule, x, y
        )
        return Prediction(clean, y)

    return denoise, lambda lam: float(np.polyval(powers[::-1], lam))


@partial(jax.jit, static_argnames="denoise")
def _step(solver, schedule, denoise, x, t, s, memory):
    """One step with a denoiser that is told its schedule."""
    noise = Fresh(jax.random.split(jax.random.key(0), 2))
    fn = lambda x, t, cond: denoise(schedule, x, t, cond)
    return solver.step(fn, schedule, x, memory, t, s, noise, {})[0]


def _truth(of, polynomial, sched, x, t, s):
    alpha_t, alpha_s = float(sched.alpha(t)), float(sched.alpha(s))
    sigma_t, sigma_s = float(sched.sigma(t)), float(sched.sigma(s))
    lam, h = 0.5 * float(sched.logsnr(t)), 0.5 * float(sched.logsnr(s) - sched.logsnr(t))
    y = lambda u: polynomial(lam + u * h)
    if of == "x0":
        return sigma_s / sigma_t * x + alpha_s * h * _integral(y, -h)
    return alpha_s / alpha_t * x - sigma_s * h * _integral(y, h)


EXACT = {  # maker, in what, for which degree
    "res_multistep": (solvers.res_multistep, "x0", 1),
    "res_singlestep": (lambda: solvers.res_singlestep(0.3), "x0", 1),
    "exp_heun": (solvers.exp_heun, "x0", 1),
    "dpmpp_3m": (solvers.dpmpp_3m, "x0", 2),
    "deis_2": (lambda: solvers.deis(2), "eps", 1),
    "deis_3": (solvers.deis, "eps", 2),
    "dpm_solver_3": (solvers.dpm_solver, "eps", 1),
}


@pytest.mark.parametrize("name", EXACT)
@x64
def test_a_step_is_exact_for_the_polynomials_of_its_method_up_and_down(name):
    """Uneven steps; to less noise, and to more."""
    make, of, degree = EXACT[name]
    solver, sched, x = make(), schedules.vp_linear(), np.array([[0.4], [-1.3]])
    denoise, polynomial = _along_lambda(of, degree)
    for sigmas in ([7.0, 3.0, 2.0, 0.8], [0.2, 0.5, 0.6, 1.9]):
        before, middle, t, s = (jnp.asarray(v) for v in at(sched, sigmas))
        memory = ()
        if hasattr(solver, "length"):
            value = lambda t: jnp.full((2, 1), polynomial(0.5 * float(sched.logsnr(t))))
            memory = History(
                tuple(value(v) for v in (middle, before))[: solver.length],
                (middle, before)[: solver.length],
                jnp.asarray(2),
            )
        found = _step(solver, sched, denoise, jnp.asarray(x), t, s, memory)
        np.testing.assert_allclose(found, _truth(of, polynomial, sched, x, t, s), rtol=1e-11)


@x64
def test_the_published_3m_misses_half_of_the_second_derivative():
    """The error for x0 a parabola in lambda is alpha_s h phi_3 h^2 x0'' / 2, to the digit."""
    sched, x = schedules.vp_linear(), np.array([[0.4], [-1.3]])
    denoise, polynomial = _along_lambda("x0", 2)
    before, middle, t, s = (jnp.asarray(v) for v in at(sched, [7.0, 3.0, 2.0, 0.8]))
    values = [jnp.full((2, 1), polynomial(0.5 * float(sched.logsnr(v)))) for v in (middle, before)]
    memory = History(tuple(values), (middle, before), jnp.asarray(2))
    found = _step(solvers.dpmpp_3m_published(), sched, denoise, jnp.asarray(x), t, s, memory)
    h = 0.5 * float(sched.logsnr(s) - sched.logsnr(t))
    missing = float(sched.alpha(s)) * h**3 * float(phi.phis(jnp.asarray(-h), 3)[2]) * POLYNOMIAL[2]
    truth = _truth("x0", polynomial, sched, x, t, s)
    np.testing.assert_allclose(truth - found, np.full((2, 1), missing), rtol=1e-9)


@pytest.mark.parametrize("make", [solvers.res_singlestep, solvers.exp_heun])
@x64
def test_every_leaf_of_a_tree_takes_the_stage_from_its_own_schedule(make):
    """Half-way for one leaf is not half-way for another, and both are exact for straight lines."""
    tree = {"image": schedules.edm(), "sound": schedules.vp_linear()}
    denoise, polynomial = _along_lambda("x0", 1)
    x = {"image": jnp.asarray([[0.4], [2.0]]), "sound": jnp.asarray([[-0.7], [0.1]])}
    t, s = jnp.asarray(0.9), jnp.asarray(0.2)
    found = _step(make(), tree, denoise, x, t, s, ())
    for name, sched in tree.items():
        wanted = _truth("x0", polynomial, sched, np.asarray(x[name]), t, s)
        np.testing.assert_allclose(found[name], wanted, rtol=1e-11)


MULTISTEP = {
    "dpmpp_2m": solvers.dpmpp_2m,
    "dpmpp_3m": solvers.dpmpp_3m,
    "deis": solvers.deis,
    "unipc": lambda: solvers.unipc(3),
}


@pytest.mark.parametrize("name", MULTISTEP)
@x64
def test_without_history_next_to_alpha_0_and_after_no_length_a_step_is_ddims(name):
    """x0 and eps need not belong together (CFG++): the step is alpha_s x0 + sigma_s eps."""
    solver, sched = MULTISTEP[name](), schedules.rectified_flow()
    denoise = lambda schedule, x, t, cond: Prediction(x + 1.0, jnp.sin(x))
    x, times = jnp.asarray([[0.4], [-1.3]]), jnp.asarray([1.0, 0.9, 0.6, 0.3])
    history = lambda times, count: History(
        tuple(jnp.asarray([[v], [9.0]]) for v in range(solver.length)),
        tuple(jnp.asarray(t) for t in times[: solver.length]),
        jnp.asarray(count),
    )
    ddim = lambda s: float(sched.alpha(s)) * (x + 1.0) + float(sched.sigma(s)) * np.sin(x)
    cases = {
        "start": (history(times[:3], 0), 0.6, 0.3),
        "from alpha 0": (history([1.0, 1.0, 1.0], 0), 1.0, 0.9),
        "after alpha 0": (history([1.0, 1.0, 1.0], 1), 0.9, 0.6),
        "after no length": (history([0.6, 0.9, 0.95], 3), 0.6, 0.3),
        "to the data": (history([0.6, 0.9, 0.95], 3), 0.3, 0.0),
    }
    for case, (memory, t, s) in cases.items():
        found = _step(solver, sched, denoise, x, jnp.asarray(t), jnp.asarray(s), memory)
        np.testing.assert_allclose(found, ddim(s), rtol=1e-12, err_msg=case)
    found = _step(
        solver, sched, denoise, x, jnp.asarray(0.3), jnp.asarray(0.1), history([0.6, 0.9, 0.95], 3)
    )
    assert np.abs(found - ddim(0.1)).min() > 1e-3  # a whole step is not


@pytest.mark.parametrize("name", ["dpmpp_3m", "unipc"])
def test_tiny_steps_keep_float32s_digits(name):
    """h = 1e-5: the corrections are small differences times weights that must not blow up."""
    solver, results = MULTISTEP[name](), []
    sigmas = 1.3 * np.exp(-1e-5 * np.arange(5))
    for x64_on, dtype in ((True, "float64"), (False, "float32")):
        with jax.enable_x64(x64_on):
            sched = schedules.edm()
            *earlier, t, s = (jnp.asarray(v, dtype) for v in sigmas)
            values = tuple(jnp.full((2, 1), np.sin(v), dtype) for v in earlier[::-1])
            memory = History(
                values[: solver.length], tuple(earlier[::-1])[: solver.length], jnp.asarray(3)
            )
            denoise = lambda schedule, x, t, cond: from_x0(
                schedule, x, 0.0 * x + jnp.sin(t)[:, None], t
            )
            x = jnp.asarray([[0.4], [-1.3]], dtype)
            results.append(np.asarray(_step(solver, sched, denoise, x, t, s, memory)))
    np.testing.assert_allclose(results[1], results[0], rtol=3e-6)


@pytest.mark.parametrize(("nfe", "orders"), [(None, [3, 2, 1]), (7, [3, 3, 1]), (8, [3, 3, 2])])
@x64
def test_dpm_solver_fast_is_made_of_the_three_orders(nfe, orders):
    sched = schedules.edm()
    denoise, _ = _along_lambda("x0", 2)
    times = jnp.asarray(np.geomspace(4.0, 0.3, 4))
    solver, x = solvers.dpm_solver_fast(nfe), jnp.asarray([[0.4], [-1.3]])
    fn = lambda x, t, cond: denoise(sched, x, t, cond)
    memory, other = solver.init(x, times), x
    for t, s, order in zip(times, times[1:], orders):
        noise = Fresh(jax.random.split(jax.random.key(0), 2))
        x, memory, _ = solver.step(fn, sched, x, memory, t, s, noise, {})
        other, _, _ = solvers.dpm_solver(order).step(fn, sched, other, (), t, s, noise, {})
        np.testing.assert_allclose(x, other, rtol=1e-12)


def test_the_fast_solvers_counts():
    """The last step ends at the data: one evaluation, whatever its order."""
    assert [solvers.dpm_solver_fast().count(n) for n in (1, 2, 3, 6)] == [1, 3, 6, 15]
    assert solvers.dpm_solver_fast(10).count(4) == 10
    solvers.dpm_solver_fast(10).check(schedules.edm(), np.arange(5))


def test_exp_heun_is_res_with_its_stage_at_the_end_and_the_two_nodes_of_2m_and_res_differ():
    assert solvers.exp_heun().r == 1.0
    z, nodes = jnp.asarray(-0.5), [jnp.asarray(-1.0)]
    assert float(phi.adams(z, nodes)[0]) != pytest.approx(
        float(phi.midpoint(z, nodes)[0]), rel=1e-2
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: solvers.dpm_solver(4), r"dpm_solver: order=4 given; allowed are 1, 2, 3"),
        (lambda: solvers.dpm_solver(2, r2=0.5), r"r2=0.5 given; order 2 has no such stage"),
        (
            lambda: solvers.dpm_solver(3, r1=0.9),
            r"r1=0.9 and r2=0.666\S+ given; r1 must be below r2",
        ),
        (lambda: solvers.dpm_solver(2, r1=0.0), r"r1=0.0 given; it lies in \(0, 1\]"),
        (lambda: solvers.dpm_solver_fast(0), r"nfe=0 given; at least 1"),
        (
            lambda: solvers.dpm_solver_fast(9).check(None, np.arange(4)),
            r"a grid of 3 steps; it takes 4",
        ),
        (lambda: solvers.dpmpp_2s(1.5), r"dpmpp_2s: r=1.5 given; it lies in \(0, 1\]"),
        (lambda: solvers.res_singlestep(0), r"res_singlestep: c2=0 given"),
        (lambda: solvers.deis(4), r"deis: order=4 given; allowed are 1, 2, 3"),
        (lambda: solvers.unipc(0), r"unipc: order=0 given; allowed are 1, 2, 3"),
        (lambda: solvers.unipc(2, "bh3"), r"unipc variant 'bh3' is not known"),
    ],
)
def test_what_a_solver_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
