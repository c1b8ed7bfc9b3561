"""Distributions of the training time against scipy, independent and stratified."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from closed_forms import SCHEDULES

from jdiff import UserError, distributions, schedules

N = 4096


def _to_unit(s, t):
    return (t - float(s.t_min)) / float(s.t_max - s.t_min)


CASES = {
    "uniform_vp": ("vp_linear", distributions.uniform, _to_unit, "uniform", ()),
    "uniform_cosine": ("cosine", distributions.uniform, _to_unit, "uniform", ()),
    "lognormal_edm": ("edm", distributions.lognormal, lambda s, t: np.log(t), "norm", (-1.2, 1.2)),
    "lognormal_vp": ("vp_linear", lambda **k: distributions.lognormal(0.4, 1.0, **k),
                     lambda s, t: np.log(np.asarray(s.sigma(t) / s.alpha(t))), "norm", (0.4, 1.0)),
    "logit_normal": ("rectified_flow", lambda **k: distributions.logit_normal(0.5, 0.6, **k),
                     lambda s, t: np.log(t) - np.log1p(-t), "norm", (0.5, 0.6)),
}  # fmt: skip


def _draw(case, stratified, seed=0, n=N):
    name, make, to, law, parameters = CASES[case]
    s = SCHEDULES[name]()
    t = make(stratified=stratified)(jax.random.key(seed), n, s)
    return np.asarray(to(s, np.asarray(t, np.float64).astype(np.float32))), law, parameters


@pytest.mark.parametrize("case", CASES)
def test_the_times_follow_their_law(case):
    values, law, parameters = _draw(case, stratified=False)
    assert scipy.stats.kstest(values, getattr(scipy.stats, law)(*parameters).cdf).pvalue > 0.01


@pytest.mark.parametrize("case", CASES)
def test_stratified_times_follow_the_same_law_within_one_stratum(case):
    values, law, parameters = _draw(case, stratified=True)
    assert (
        scipy.stats.kstest(values, getattr(scipy.stats, law)(*parameters).cdf).statistic < 1.2 / N
    )


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
    ],
)
def test_a_law_without_width_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()
