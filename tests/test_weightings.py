"""Weightings against the papers' losses, written in the papers' own spaces, and against integrals.

`errors` turns one error in x0 into the errors in eps, v, velocity and score by evaluating what they
mean at a true and a wrong pair of endpoints of the same x_t; the weights are then compared through
those squared errors, never through a ratio of theirs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import CONTINUOUS, SCHEDULES, VARIANCE_PRESERVING, at, x64

from jdiff import UserError, distributions, schedules, weightings

RATIO = np.array([0.05, 0.4, 1.0, 2.5, 8.0])  # sigma / alpha
GAMMA, K, BIAS, SD = 3.0, 0.7, -1.5, 0.6


def errors(s, t):
    """Squared errors by space, numpy float64 `[n]`, and the numbers that the papers use."""
    alpha, sigma = (np.asarray(f(t), float) for f in (s.alpha, s.sigma))
    d_alpha, d_sigma = (np.asarray(r, float) for r in s.rates(t))
    x0, wrong = 0.8, -0.3
    eps = 0.4
    x = alpha * x0 + sigma * eps
    eps_wrong = (x - alpha * wrong) / sigma
    spread = np.sqrt(sigma**2 + alpha**2 * SD**2)
    c_skip = lambda r: SD**2 / (r**2 + SD**2)  # of x / alpha at noise level r = sigma / alpha
    c_out = lambda r: r * SD / np.sqrt(r**2 + SD**2)
    r = sigma / alpha
    f = lambda x0: (x0 - c_skip(r) * x / alpha) / c_out(r)
    square = {
        "x0": (x0 - wrong) ** 2,
        "eps": (eps - eps_wrong) ** 2,
        "v": ((alpha * eps - sigma * x0) - (alpha * eps_wrong - sigma * wrong)) ** 2,
        "velocity": (d_alpha * (x0 - wrong) + d_sigma * (eps - eps_wrong)) ** 2,
        "score": (eps / sigma - eps_wrong / sigma) ** 2,
        "f": (f(x0) - f(wrong)) ** 2,
    }
    # dL/dt from the forward SDE: f = d log alpha, g^2 = d sigma^2 - 2 f sigma^2.
    g2 = 2 * sigma * d_sigma - 2 * d_alpha / alpha * sigma**2
    numbers = dict(
        snr=alpha**2 / sigma**2, L=2 * np.log(alpha / sigma), g2=g2, dL=-g2 / sigma**2,
        alpha=alpha, sigma=sigma, r=r, spread=spread, t=np.asarray(t, float),
        length=float(s.t_max) - float(s.t_min),
    )  # fmt: skip
    return square, numbers


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


# The weighting, and the loss as its paper writes it.
PAPERS = {
    "eps, L_simple": (weightings.eps(), lambda e, n: e["eps"]),
    "v": (weightings.v(), lambda e, n: e["v"]),
    "velocity": (weightings.velocity(), lambda e, n: e["velocity"]),
    "edm, 1 on F": (weightings.edm(SD), lambda e, n: e["f"]),
    "truncated SNR": (weightings.truncated_snr(), lambda e, n: np.maximum(e["x0"], e["eps"])),
    "min-SNR on eps": (
        weightings.min_snr(GAMMA), lambda e, n: np.minimum(n["snr"], GAMMA) / n["snr"] * e["eps"],
    ),
    "soft-min-SNR on F": (  # k-diffusion's weight, gamma = 1 / sigma_data^2
        weightings.soft_min_snr(1 / SD**2),
        lambda e, n: (n["r"] * SD) ** 2 / (n["r"] ** 2 + SD**2) ** 2 * e["f"],
    ),
    "P2 on eps": (weightings.p2(GAMMA, K), lambda e, n: e["eps"] / (K + n["snr"]) ** GAMMA),
    "VDM on eps": (weightings.elbo(), lambda e, n: -0.5 * n["dL"] * e["eps"] * n["length"]),
    "Song on the score": (
        weightings.likelihood(), lambda e, n: 0.5 * n["g2"] * e["score"] * n["length"],
    ),
    "VDM++ on eps": (
        weightings.sigmoid(BIAS),
        lambda e, n: -0.5 * n["dL"] * _sigmoid(BIAS - n["L"]) * e["eps"] * n["length"],
    ),
    "SiD2 on x0": (
        weightings.sigmoid(BIAS),
        lambda e, n: -0.5 * n["dL"] * np.exp(BIAS) * _sigmoid(n["L"] - BIAS) * e["x0"]
        * n["length"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_weighting_is_the_papers_loss_in_the_papers_space(name):
    s = SCHEDULES[name]()
    t = at(s, RATIO)
    square, numbers = errors(s, t)
    made = jax.jit(lambda t: {k: w(s, t) for k, (w, _) in PAPERS.items()})(t)
    for case, (_, loss) in PAPERS.items():
        np.testing.assert_allclose(
            made[case] * square["x0"], loss(square, numbers), rtol=2e-4, err_msg=case
        )


@pytest.mark.parametrize("name", VARIANCE_PRESERVING[:2])
def test_where_the_variance_is_kept_min_snr_and_v_have_their_known_forms(name):
    """Hang et al.'s min(SNR, gamma) / (SNR + 1) on v, and Salimans and Ho's SNR + 1 on x0."""
    s = SCHEDULES[name]()
    t = at(s, RATIO)
    square, n = errors(s, t)
    made = weightings.min_snr(GAMMA)(s, t) * square["x0"]
    on_v = np.minimum(n["snr"], GAMMA) / (n["snr"] + 1) * square["v"]
    np.testing.assert_allclose(made, on_v, rtol=2e-4)
    np.testing.assert_allclose(square["v"], (n["snr"] + 1) * square["x0"], rtol=1e-4)


def test_sd3_is_its_equation_in_eps_and_in_the_velocity():
    s, pi = schedules.rectified_flow(), distributions.logit_normal(0.3, 0.8)
    t = at(s, RATIO)
    square, n = errors(s, t)
    z = np.log(n["t"] / (1 - n["t"]))
    density = np.exp(-0.5 * ((z - 0.3) / 0.8) ** 2) / (
        0.8 * np.sqrt(2 * np.pi) * n["t"] * (1 - n["t"])
    )
    made = weightings.sd3(pi)(s, t) * square["x0"]
    on_eps = -0.5 * n["dL"] * n["t"] / (1 - n["t"]) * density * square["eps"]
    np.testing.assert_allclose(made, on_eps, rtol=2e-4)
    np.testing.assert_allclose(made, density * square["velocity"], rtol=2e-4)


# The data N(0, V): E[(x0 - E[x0 | x])^2] is V / (1 + V SNR), and half its integral over the SNR is
# log(1 + V SNR) / 2 between the ends.
V = 0.3


def _mmse(s, t):
    return V / (1 + V * jnp.exp(s.logsnr(t)))


def _information(s):
    low, high = (float(jnp.exp(s.logsnr(jnp.asarray(t)))) for t in (s.t_max, s.t_min))
    return 0.5 * np.log((1 + V * high) / (1 + V * low))


# Domains within which 32768 times resolve the integrand, about 1 / t at small t.
BOUNDED = {
    "edm": schedules.edm,
    "vp_linear": schedules.vp_linear,
    "cosine": lambda: schedules.cosine(-10.0, 10.0),
    "cosine_shifted": lambda: schedules.cosine(-8.0, 9.0, shift=0.5),
    "rectified_flow": lambda: schedules.RectifiedFlow(0.02, 0.97),
}
OTHERS = {
    "uniform": distributions.uniform(stratified=True),
    "lognormal": distributions.lognormal(0.5, 3.0, stratified=True),
    "laplace": distributions.logsnr_laplace(0.0, 5.0, stratified=True),
    "cosmap": distributions.cosmap(stratified=True),
    "shifted": distributions.shifted(distributions.mode(-0.5, stratified=True), 2.0),
}


@pytest.mark.parametrize("name", BOUNDED)
@x64
def test_the_bound_of_gaussian_data_is_its_mutual_information_from_any_times(name):
    """I-MMSE (Guo et al. 2005), by averages over the stratified times of each distribution."""
    s = BOUNDED[name]()

    @jax.jit
    def estimates(key):
        out = {}
        for other, law in OTHERS.items():
            t = law(key, 1 << 15, s)
            weight = weightings.importance(weightings.elbo(), law)
            out[other] = jnp.mean(weight(s, t) * _mmse(s, t))
        return out

    expected = _information(s)
    for other, value in estimates(jax.random.key(0)).items():
        if name == "edm" and other in ("uniform", "cosmap", "shifted"):
            continue  # uniform sigmas miss the small ones, where the whole integral lies
        assert float(value) == pytest.approx(expected, rel=0.02), other


def test_on_a_table_the_bound_is_the_discrete_sum():
    """Kingma et al. 2021, equation 13, and the Gaussian decoder for step 1."""
    s = schedules.ddpm_linear(T=50)
    t = jnp.arange(1.0, 51.0)
    snr = np.exp(np.asarray(s.logsnr(t), float))
    drops = np.append(snr[0], snr[:-1] - snr[1:])
    np.testing.assert_allclose(weightings.elbo()(s, t) / 50, 0.5 * drops, rtol=1e-4)
    mode = distributions.mode(1.0)
    weight = weightings.importance(weightings.elbo(), mode)(s, t)
    mmse = np.asarray(_mmse(s, t))
    total = float(jnp.sum(mode.density(s, t) * weight * mmse))
    assert total == pytest.approx(float(np.sum(0.5 * drops * mmse)), rel=1e-4)


def test_importance_is_nothing_where_the_distributions_agree_and_0_off_the_domain():
    s, law = schedules.vp_linear(), distributions.uniform()
    t = jnp.asarray([1e-4, 0.2, 0.9, 1.3])
    made = weightings.importance(weightings.eps(), law)(s, t)
    np.testing.assert_allclose(made[1:3], weightings.eps()(s, t)[1:3], rtol=1e-5)
    assert made[0] == made[3] == 0.0
    outside = distributions.logsnr_normal(0.0, 20.0)
    assert np.isfinite(weightings.importance(weightings.elbo(), outside)(s, jnp.asarray(0.0)))


def test_a_step_to_no_signal_at_all_has_a_finite_weight():
    class Blind(schedules.Schedule):
        t_min, t_max, T = 1.0, 3.0, 3
        logsnr = staticmethod(lambda t: jnp.asarray([4.0, 1.0, -jnp.inf])[t.astype(int) - 1])

    t = jnp.asarray([1.0, 2.0, 3.0])
    snr = np.exp([4.0, 1.0, -np.inf])
    drops = [snr[0], snr[0] - snr[1], snr[1] - snr[2]]
    np.testing.assert_allclose(weightings.elbo()(Blind(), t), 1.5 * np.asarray(drops), rtol=1e-5)
    for make in (weightings.min_snr, weightings.soft_min_snr, weightings.p2, weightings.sigmoid):
        assert np.isfinite(make()(Blind(), t)).all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: weightings.soft_min_snr(0.0), "soft_min_snr: gamma=0.0 given"),
        (lambda: weightings.p2(k=-1.0), "p2: k=-1.0 given"),
        (lambda: weightings.importance(weightings.x0(), lambda k, n, s: 0), "has no density"),
        (
            lambda: weightings.importance(weightings.elbo(), distributions.lognormal())(
                schedules.ddpm_linear(10), jnp.ones(2)
            ),
            "ByLogSNR, whose times lie between",
        ),
    ],
)
def test_a_weighting_that_cannot_be_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()
