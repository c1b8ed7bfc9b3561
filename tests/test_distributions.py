"""Distributions of the training time against scipy, independent and stratified."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from closed_forms import SCHEDULES, x64

from jdiff import UserError, distributions, schedules

N = 4096


def _to_unit(s, t):
    return (t - float(s.t_min)) / float(s.t_max - s.t_min)


def _log_ratio(s, t):
    return np.log(np.asarray(s.sigma(t) / s.alpha(t)))


def _logsnr(s, t):
    return np.asarray(s.logsnr(t))


class _Mode:
    """SD3's equation 20 as the paper writes it, whose f falls: P(t <= x) = P(u >= f^-1(x))."""

    def __init__(self, scale):
        self.scale = scale

    def cdf(self, x):
        u = np.linspace(0, 1, 200_001)
        f = 1 - u - self.scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
        return 1 - np.interp(x, f[::-1], u[::-1])


class _Law:
    def __init__(self, cdf):
        self.cdf = cdf


COSMAP = _Law(lambda x: 2 / np.pi * np.arctan(x / (1 - x)))
SHIFTED = _Law(lambda x: COSMAP.cdf(x / (3 - 2 * x)))
TENT = _Law(lambda x: np.interp(x, [-6.0, -1.0, 4.0], [0.0, 0.6, 1.0]))
_with = lambda make, *given: lambda **k: make(*given, **k)

#: schedule, distribution, what of the times follows which law
CASES = {
    "uniform_vp": ("vp_linear", distributions.uniform, _to_unit, scipy.stats.uniform()),
    "uniform_cosine": ("cosine", distributions.uniform, _to_unit, scipy.stats.uniform()),
    "lognormal_edm": (
        "edm", distributions.lognormal, _log_ratio, scipy.stats.norm(-1.2, 1.2),
    ),
    "lognormal_vp": (
        "vp_linear", _with(distributions.lognormal, 0.4, 1.0), _log_ratio,
        scipy.stats.norm(0.4, 1.0),
    ),
    "logit_normal": (
        "rectified_flow", _with(distributions.logit_normal, 0.5, 0.6),
        lambda s, t: scipy.special.logit(t), scipy.stats.norm(0.5, 0.6),
    ),
    "logit_normal_vp": (
        "vp_linear", _with(distributions.logit_normal, 0.5, 0.6),
        lambda s, t: scipy.special.logit(_to_unit(s, t)), scipy.stats.norm(0.5, 0.6),
    ),
    "mode": ("rectified_flow", distributions.mode, _to_unit, _Mode(1.29)),
    "mode_ends": ("rectified_flow", _with(distributions.mode, -0.7), _to_unit, _Mode(-0.7)),
    "cosmap": ("rectified_flow", distributions.cosmap, _to_unit, COSMAP),
    "shifted": (
        "rectified_flow",
        lambda stratified: distributions.shifted(distributions.cosmap(stratified), 3.0),
        _to_unit, SHIFTED,
    ),
    "logsnr_normal": (
        "cosine", _with(distributions.logsnr_normal, 1.0, 2.0), _logsnr, scipy.stats.norm(1.0, 2.0),
    ),
    "logsnr_laplace": (
        "rectified_flow", _with(distributions.logsnr_laplace, -1.0, 1.5), _logsnr,
        scipy.stats.laplace(-1.0, 1.5),
    ),
    "logsnr_uniform": (
        "vp_linear", _with(distributions.logsnr_uniform, -5.0, 9.0), _logsnr,
        scipy.stats.uniform(-5.0, 14.0),
    ),
    "logsnr_table": (  # mean heights 3 and 2 over two widths of 5
        "edm", _with(distributions.logsnr_table, [-6.0, -1.0, 4.0], [3.0, 3.0, 1.0]), _logsnr, TENT,
    ),
}  # fmt: skip


def _draw(case, stratified, seed=0, n=N):
    name, make, to, law = CASES[case]
    s = SCHEDULES[name]()
    t = make(stratified=stratified)(jax.random.key(seed), n, s)
    return np.asarray(to(s, np.asarray(t, np.float64).astype(np.float32))), law


@pytest.mark.parametrize("case", CASES)
def test_the_times_follow_their_law(case):
    values, law = _draw(case, stratified=False)
    assert scipy.stats.kstest(values, law.cdf).pvalue > 0.001


@pytest.mark.parametrize("case", CASES)
def test_stratified_times_follow_the_same_law_within_one_stratum(case):
    values, law = _draw(case, stratified=True)
    assert scipy.stats.kstest(values, law.cdf).statistic < 1.2 / N


@pytest.mark.parametrize("case", CASES)
@x64
def test_the_density_is_the_derivative_of_the_law_and_sums_to_1(case):
    name, make, to, law = CASES[case]
    s, made = SCHEDULES[name](), make(stratified=False)
    probability = lambda t: np.asarray(law.cdf(to(s, t)))
    t = made(jax.random.key(3), 40, s)
    t = t[jnp.argsort(t)][2:-2]
    h = 1e-4 * np.asarray(t) if case.startswith("mode") else 1e-6 * np.asarray(t)
    slope = np.abs(probability(t + h) - probability(t - h)) / (2 * h)
    np.testing.assert_allclose(made.density(s, t), slope, rtol=1e-3)


@pytest.mark.parametrize(
    "make", [distributions.logit_normal, distributions.mode, distributions.cosmap]
)
def test_on_a_table_the_steps_have_the_probabilities_of_the_density(make):
    """Times of a table are its steps, so the density is a sum of 1 over them."""
    s, n = schedules.ddpm_linear(T=12), 1 << 14
    t = np.asarray(make(stratified=True)(jax.random.key(0), n, s))
    shares = np.asarray([(t == i).mean() for i in range(1, 13)])
    density = make().density(s, jnp.arange(1.0, 13.0))
    assert set(np.unique(t)) <= set(range(1, 13))
    assert float(density.sum()) == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(shares, density, atol=2 / n)


@pytest.mark.parametrize("case", ["uniform_vp", "lognormal_edm"])
def test_stratified_times_are_each_unbiased_and_their_mean_varies_less(case):
    means = {}
    for stratified in (False, True):
        draws = np.stack([_draw(case, stratified, seed, 16)[0] for seed in range(60)])
        means[stratified] = draws.mean(1)
    assert means[True].std() < 0.5 * means[False].std()
    off = abs(means[True].mean() - means[False].mean())
    assert off < 4 * means[False].std() / np.sqrt(60)


@pytest.mark.parametrize("stratified", [False, True])
def test_on_a_table_every_step_from_1_to_T_is_equally_likely(stratified):
    s = schedules.ddpm_linear(T=10)
    t = np.asarray(distributions.uniform(stratified)(jax.random.key(1), 10_000, s))
    steps, counts = np.unique(t, return_counts=True)
    assert steps.tolist() == list(range(1, 11))
    if stratified:
        assert np.ptp(counts) <= 1
    else:
        assert scipy.stats.chisquare(counts).pvalue > 0.01


def test_uniform_times_never_touch_rectified_flows_ends():
    """float32 uniforms hit 0 once in 2^23 draws: there eps and the weights are infinite."""
    draw = jax.jit(lambda key: distributions.uniform()(key, 2**24, schedules.rectified_flow()))
    t = draw(jax.random.key(0))
    assert float(jax.random.uniform(jax.random.key(0), (2**24,)).min()) == 0.0
    assert float(t.min()) > 0.0
    assert float(t.max()) < 1.0


def test_normal_times_stay_finite_where_the_uniform_is_0_or_1(monkeypatch):
    monkeypatch.setattr(distributions, "unit", lambda key, n, stratified: jnp.asarray([0.0, 1.0]))
    t = distributions.lognormal()(None, 2, schedules.edm())
    z = scipy.stats.norm.ppf(2.0**-24)
    np.testing.assert_allclose(np.log(t), [-1.2 + 1.2 * z, -1.2 - 1.2 * z], rtol=1e-3)
    t = distributions.logit_normal()(None, 2, schedules.rectified_flow())
    assert 0.0 < float(t[0]) < float(t[1]) < 1.0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: distributions.lognormal(std=0.0), "lognormal: std=0.0 given; it must be positive"),
        (lambda: distributions.logit_normal(std=-1.0), "logit_normal: std=-1.0 given"),
        (lambda: distributions.mode(1.8), "mode: scale=1.8 given; allowed are -1 to"),
        (lambda: distributions.shifted(shift=0.0), "shifted: shift=0.0 given"),
        (lambda: distributions.shifted(distributions.lognormal()), "unit interval is needed"),
        (lambda: distributions.logsnr_table([1.0, 0.0], [1.0, 1.0]), "logsnr must rise"),
        (lambda: distributions.logsnr_table([0.0, 1.0], [0.0, 0.0]), "none above 0"),
        (lambda: distributions.logsnr_table([0.0], [1.0]), "K at least 2"),
    ],
)
def test_a_law_that_cannot_be_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()
