"""SDE solvers on Gaussian data, where each is affine in the start and in every draw of noise.

So its law is known without sampling: a batch whose row r is fed the r-th unit draw alone reads off
the gain of each, and mean and variance at the end are theirs to rounding. They are compared with
those of the reverse SDE that exchanges noise at the rate eta,

    dx = (v - eta g^2 / 2 score) dt + sqrt(eta) g dw,    score = -(x - alpha m) / v_t:

    gain = (v_s / v_t)^(1/2) ((alpha_t / alpha_s) (v_s / v_t)^(1/2))^eta,

with v_t = alpha^2 v + sigma^2. For eta = 1 that is the regression of x_s on x_t. The noise has the
variance v_s - gain^2 v_t.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import SCHEDULES, at, x64
from scipy.integrate import quad

from jdiff import denoisers, schedules, solvers
from jdiff.noise import Fresh, Noise
from jdiff.predictions import Prediction
from jdiff.pytree import struct

MEAN, VARIANCE = 0.7, 0.3
START, END = 5.0, 0.2  # sigma / alpha
MOST, PARTS = 512, 3


@struct
class Unit(Noise):
    """Row 2 + r of the batch gets a 1 at draw r, counted over steps and parts, and 0 elsewhere."""

    number: jax.Array | int = 0

    def between(self, x, t, s, part=0):
        """The unit draws of this step's part."""
        return (jnp.arange(len(x)) == 2 + PARTS * self.number + part).astype(x.dtype)[:, None]


@jax.jit
def _march(solver, denoise, schedule, times, n):
    """n steps, n traced: [MOST] ends of the starts 0 and 1 without noise, then 0 with each draw."""
    x = jnp.zeros((2 + PARTS * MOST, 1)).at[1].set(1.0)

    def step(i, carry):
        x, memory = carry
        end = times[i], times[i + 1], Unit(i), {}
        return solver.step(denoise, schedule, x, memory, *end)[:2]

    return jax.lax.fori_loop(0, n, step, (x, solver.init(x, times)))[0][:, 0]


def _ends(solver, n, variance=VARIANCE, schedule="vp_linear", sigmas=(START, END)):
    s = SCHEDULES[schedule]()
    times = jnp.pad(at(s, np.geomspace(*sigmas, n + 1)), (0, MOST - n))
    denoise = denoisers.mixture(jnp.asarray([[MEAN]]), variance, s)
    levels = [(float(s.alpha(t)), float(s.sigma(t))) for t in (times[0], times[n])]
    return np.asarray(_march(solver, denoise, s, times, n)), levels


def _law(ends):
    """(gain, variance of the noise, mean from 0)."""
    return ends[1] - ends[0], np.sum((ends[2:] - ends[0]) ** 2), ends[0]


def _errors(solver, n, rate):
    """Of gain, noise and mean; without a rate, of the marginal of x_s when that of x_t is right."""
    ends, ((a_t, b_t), (a_s, b_s)) = _ends(solver, n)
    gain, noise, mean = _law(ends)
    v_t, v_s = (a**2 * VARIANCE + b**2 for a, b in ((a_t, b_t), (a_s, b_s)))
    if rate is None:
        return np.abs([gain**2 * v_t + noise - v_s, mean + gain * a_t * MEAN - a_s * MEAN])
    root = np.sqrt(v_s / v_t)
    exact = root * (a_t / a_s * root) ** rate
    return np.abs([gain - exact, noise - (v_s - exact**2 * v_t), mean - (a_s - exact * a_t) * MEAN])


#: name: (solver, the rate of exchange, the weak order).
WEAK = {
    "ddpm": (solvers.ddpm(), 1.0, 1),
    "euler_ancestral": (solvers.euler_ancestral(), 1.0, 1),
    "euler_ancestral_half": (solvers.euler_ancestral(0.5), 0.25, 1),
    "dpm_2_ancestral": (solvers.dpm_2_ancestral(), 1.0, 1),
    "dpmpp_2s_ancestral": (solvers.dpmpp_2s_ancestral(), 1.0, 1),
    "res_multistep_ancestral": (solvers.res_multistep_ancestral(), 1.0, 1),
    "reverse_diffusion": (solvers.reverse_diffusion(), 1.0, 1),
    "dpmpp_sde": (solvers.dpmpp_sde(), 1.0, 2),
    "dpmpp_sde_half": (solvers.dpmpp_sde(0.5), 0.25, 1),
    "dpmpp_2m_sde": (solvers.dpmpp_2m_sde(), 1.0, 2),
    "dpmpp_2m_sde_heun_half": (solvers.dpmpp_2m_sde(0.5, kind="heun"), 0.5, 2),
    "dpmpp_3m_sde_half": (solvers.dpmpp_3m_sde(0.5), 0.5, 2),
    "dpmpp_3m_sde_published": (solvers.dpmpp_3m_sde(kind="published"), 1.0, 2),
    "seeds_1": (solvers.seeds_1(), 1.0, 1),
    "seeds_2": (solvers.seeds_2(), 1.0, 2),
    "seeds_2_half": (solvers.seeds_2(0.5), 0.5, 2),
    "seeds_2_eps_half": (solvers.seeds_2(0.5, predict="eps"), 0.5, 2),
    "seeds_3_half": (solvers.seeds_3(0.5), 0.5, 2),
    "seeds_3_eps": (solvers.seeds_3(predict="eps"), 1.0, 2),
    "er_sde_1": (solvers.er_sde(1, "er_sde_5"), None, 1),
    "er_sde_2": (solvers.er_sde(2, "er_sde_2"), 0.5, 2),
    "er_sde_3": (solvers.er_sde(3, "er_sde_3"), 1.5, 2),
    "sa_solver": (solvers.sa_solver(), 1.0, 2),
    "sa_solver_pece_half": (solvers.sa_solver(np.sqrt(0.5), mode="pece"), 0.5, 2),
    "euler_maruyama": (solvers.euler_maruyama("sbdm"), 1.0, 1),
    "euler_maruyama_half": (solvers.euler_maruyama("sbdm", 0.5), 0.5, 1),
    "sigma": (solvers.euler_maruyama("sigma"), None, 1),
    "custom": (solvers.euler_maruyama(lambda schedule, t: 3.0 * t**2), None, 1),
}


@pytest.mark.parametrize("name", WEAK)
@x64
def test_mean_and_variance_converge_to_those_of_the_sde_with_the_stated_weak_order(name):
    solver, rate, order = WEAK[name]
    assert solver.order == order or name == "dpmpp_sde_half"
    few, many = (_errors(solver, n, rate).max() for n in (MOST // 4, MOST))
    measured = np.log(few / many) / np.log(4.0)
    print(f"{name}: weak order {measured:.2f}, error {many:.1e} at {MOST} steps")
    assert measured == pytest.approx(order, abs=0.2)


#: SiT's code, its t = 1 - ours on rectified flow, its D = w / 2.
SIT = {
    "zero": lambda t: 0.0,
    "constant": lambda t: 1.0,
    "sbdm": lambda t: (1 - t) ** 2 / t + (1 - t),  # (alpha' / alpha) sigma^2 - sigma sigma'
    "sigma": lambda t: 1 - t,
    "linear": lambda t: 1 - t,
    "decreasing": lambda t: 0.25 * (np.cos(np.pi * t) + 1) ** 2,
    "increasing_decreasing": lambda t: np.sin(np.pi * t) ** 2,
}


@pytest.mark.parametrize("form", SIT)
@x64
def test_the_diffusion_coefficients_are_sits(form):
    """Without drift, one step of length 0.1 adds noise of the variance 2 D 0.1."""
    s, t, z = schedules.rectified_flow(), jnp.asarray(0.7), jnp.zeros((1, 1))
    solver = solvers.euler_maruyama(form, 0.5)
    still = lambda x, t, cond: Prediction(z, z)
    noise = Unit(0), Unit(5)
    x = jnp.zeros((3, 1))
    moved, unmoved = (solver.step(still, s, x, (), t, t - 0.1, n, {})[0][2, 0] for n in noise)
    np.testing.assert_allclose((moved - unmoved) ** 2, 2 * 0.5 * SIT[form](0.3) * 0.1, rtol=1e-9)


@pytest.mark.parametrize("form", ["constant", "linear", "decreasing", "increasing_decreasing"])
@x64
def test_on_a_table_the_whole_way_adds_as_much_noise_as_on_the_unit_interval(form):
    """100 of 1000 steps are a length of 0.1: not a thousand times the diffusion."""
    s, z = schedules.ddpm_linear(), jnp.zeros((1, 1))
    solver, still = solvers.euler_maruyama(form, 0.5), lambda x, t, cond: Prediction(z, z)
    step = lambda n: solver.step(
        still, s, jnp.zeros((3, 1)), (), jnp.asarray(700.0), jnp.asarray(600.0), n, {}
    )[0][2, 0]
    added = (step(Unit(0)) - step(Unit(5))) ** 2
    np.testing.assert_allclose(added, 2 * 0.5 * SIT[form](0.3) * 0.1, rtol=1e-9)


EXACT = [name for name in WEAK if WEAK[name][1] is None and name.startswith("er")]
EXACT += [
    name for name in WEAK
    if name not in EXACT and WEAK[name][1] is not None
    and not any(word in name for word in ("maruyama", "reverse", "eps", "seeds_1"))
]  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
@x64
def test_around_one_data_point_any_grid_has_exact_marginals(name):
    """Chapman-Kolmogorov: what a step keeps and what it renews add up to sigma_s^2."""
    for n in (1, 3):
        ends, ((a_t, b_t), (a_s, b_s)) = _ends(WEAK[name][0], n, variance=0.0, sigmas=(3.0, 0.4))
        gain, noise, mean = _law(ends)
        np.testing.assert_allclose(gain**2 * b_t**2 + noise, b_s**2, rtol=1e-9)
        np.testing.assert_allclose(mean + gain * a_t * MEAN, a_s * MEAN, rtol=1e-9)


@x64
def test_the_noise_factor_scales_the_noise_alone():
    for name in ("euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "seeds_2", "er_sde_2"):
        solver = WEAK[name][0]
        quiet = type(solver)(**{**vars(solver), "s_noise": 0.5})
        (gain, noise, mean), (gain_q, noise_q, mean_q) = (
            _law(_ends(v, 3)[0]) for v in (solver, quiet)
        )
        np.testing.assert_allclose([gain_q, noise_q, mean_q], [gain, noise / 4, mean], rtol=1e-9)


#: Pairs that are one method: stochastic solvers without noise, and names that coincide.
SAME = {
    "euler_ancestral": (solvers.euler_ancestral(0.0), solvers.ddim()),
    "dpm_2_ancestral": (solvers.dpm_2_ancestral(0.0), solvers.dpm_2()),
    "dpmpp_sde": (solvers.dpmpp_sde(0.0), solvers.dpmpp_2s()),
    "dpmpp_2m_sde": (solvers.dpmpp_2m_sde(0.0), solvers.dpmpp_2m()),
    "dpmpp_2m_sde_heun": (solvers.dpmpp_2m_sde(0.0, kind="heun"), solvers.res_multistep()),
    "dpmpp_3m_sde": (solvers.dpmpp_3m_sde(0.0), solvers.dpmpp_3m()),
    "seeds_2": (solvers.seeds_2(0.0), solvers.dpmpp_2s()),
    "seeds_2_eps": (solvers.seeds_2(0.0, predict="eps"), solvers.dpm_solver(2)),
    "sa_solver": (
        solvers.sa_solver(0.0, predictor=2, corrector=3, variant="bh1"),
        solvers.unipc(2, "bh1"),
    ),
    "seeds_2 is dpmpp_sde": (solvers.seeds_2(), solvers.dpmpp_sde()),
    "seeds_1 is ddpm": (solvers.seeds_1(predict="x0"), solvers.ddpm()),
    "er_sde 1 is ddpm": (solvers.er_sde(1, "sde"), solvers.ddpm()),
    "er_sde 1 is ddim": (solvers.er_sde(1, "ode"), solvers.ddim()),
    "sa predicts as 3m": (solvers.sa_solver(corrector=0), solvers.dpmpp_3m_sde()),
    "ancestral of ddim is ddpm": (solvers.euler_ancestral(), solvers.ddpm()),
}


@pytest.mark.parametrize("pair", SAME)
@x64
def test_two_names_of_one_method_agree_draw_by_draw(pair):
    one, other = (_ends(solver, 12)[0] for solver in SAME[pair])
    np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-11)


@x64
def test_sa_solvers_tau_applies_in_its_range_alone():
    """Two steps, from 5 to 1 and on to 0.2: noise in the one that starts inside."""
    above, below, both = (
        np.count_nonzero(np.abs(ends[2:] - ends[0]) > 1e-9)
        for ends in (
            _ends(solvers.sa_solver(1.0, *range_), 2)[0]
            for range_ in ((2.0, np.inf), (0.0, 2.0), (0.0, np.inf))
        )
    )
    assert (above, below, both) == (1, 1, 2)


@pytest.mark.parametrize("scale", ["ode", "er_sde_1", "er_sde_4", "er_sde_5"])
@x64
def test_er_sde_is_exact_where_x0_is_a_parabola_in_the_noise_level(scale):
    """phi_s int phi' / phi^2 x0 dr by adaptive quadrature, with phi as printed in the paper."""
    phi = {
        "ode": lambda r: r,
        "er_sde_1": lambda r: r * (np.exp(-1 / r) + 10),
        "er_sde_4": lambda r: r**0.9 * np.log10(1 + 100 * r**1.5),
        "er_sde_5": lambda r: r * (np.exp(r**0.3) + 10),
    }[scale]
    parabola = lambda r: 0.3 - 0.8 * r + 0.5 * r**2
    s = schedules.edm()
    denoise = jax.tree_util.Partial(
        lambda x, t, cond: Prediction(
            jnp.broadcast_to(parabola(t)[:, None], x.shape), (x - parabola(t)[:, None]) / t[:, None]
        )
    )
    rs = [3.0, 2.2, 1.5, 0.8]
    times = jnp.pad(jnp.asarray(rs), (0, MOST - 3))
    ends = [np.asarray(_march(solvers.er_sde(3, scale), denoise, s, times, n)) for n in (2, 3)]
    r_t, r_s = rs[2:]
    slope = lambda r: (phi(r * (1 + 1e-6)) - phi(r * (1 - 1e-6))) / (2e-6 * r)
    pull = quad(lambda r: slope(r) / phi(r) ** 2 * parabola(r), r_s, r_t, epsabs=1e-13)[0]
    expected = phi(r_s) / phi(r_t) * ends[0][0] + phi(r_s) * pull
    np.testing.assert_allclose(ends[1][0], expected, rtol=1e-8)
    published = np.asarray(
        _march(solvers.er_sde(3, scale, slope="published"), denoise, s, times, 3)
    )
    assert abs(published[0] - expected) > 1e-3  # its difference quotient is half a step late


@x64
def test_the_step_to_the_data_is_tweedies_the_drifts_mean_or_the_odes():
    """Rectified flow: v = eps - x0, so the ODE's Euler step ends in x0 as well."""
    s, t = schedules.rectified_flow(), jnp.asarray(0.04)
    x0, eps = jnp.asarray([[0.4]]), jnp.asarray([[1.5]])
    ends = {
        last: solvers.euler_maruyama("constant", 0.5, last).step(
            lambda x, t, cond: Prediction(x0, eps), s, 0.96 * x0 + 0.04 * eps, (), t, 0.0 * t,
            Fresh(jax.random.split(jax.random.key(0), 1)), {},
        )[0].item()
        for last in ("tweedie", "mean", "euler")
    }  # fmt: skip
    assert ends["tweedie"] == 0.4
    assert ends["euler"] == 0.4
    # x - t (v + w eps / (2 sigma)) with w = 2 * 0.5
    np.testing.assert_allclose(ends["mean"], 0.4 - 0.04 * 0.5 * 1.5 / 0.04, rtol=1e-9)


def test_a_last_step_of_infinite_length_is_not_followed():
    s = schedules.ve()
    times = jnp.asarray([1.0, 0.0, s.t_data])
    for last in ("mean", "euler"):
        with pytest.raises(ValueError, match=r"last='\w+' follows .* -inf; use last='tweedie'"):
            solvers.euler_maruyama(last=last).check(s, times)
    solvers.euler_maruyama().check(s, times)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: solvers.euler_ancestral(-0.1), "eta=-0.1 given; it must not be negative"),
        (lambda: solvers.dpmpp_sde(r=1.5), r"dpmpp_sde: r=1.5 given; it lies in \(0, 1\]"),
        (lambda: solvers.dpmpp_2m_sde(kind="midpiont"), "Did you mean 'midpoint'"),
        (lambda: solvers.dpmpp_3m_sde(s_noise=-1.0), "dpmpp_3m_sde: s_noise=-1.0 given"),
        (lambda: solvers.seeds_3(r1=0.7), r"seeds_3: nodes \(0.7, 0.66.*rise inside \(0, 1\)"),
        (lambda: solvers.seeds_2(predict="x"), "seeds_2 predict 'x' is not known"),
        (lambda: solvers.er_sde(4), "er_sde: terms=4 given; allowed are 1, 2, 3"),
        (lambda: solvers.er_sde(scale="er_sde5"), "Did you mean 'er_sde_5'"),
        (lambda: solvers.sa_solver(predictor=5), "sa_solver: predictor=5 given; allowed are 1 to"),
        (lambda: solvers.sa_solver(mode="pece", corrector=0), "corrector=0 has none"),
        (lambda: solvers.euler_maruyama("sigmma"), "Did you mean 'sigma'"),
        (lambda: solvers.euler_maruyama(last="middle"), "euler_maruyama last 'middle'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, said):
    with pytest.raises(ValueError, match=said):
        make()
