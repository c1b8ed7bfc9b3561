"""Scales over the noise level: the papers' formulas, the clocks, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import SCHEDULES, inside, mixture_1d, same

from jdiff import UserError, denoisers, guidance, schedules
from jdiff.guidance import scales
from jdiff.predictions import Prediction

EDM = schedules.edm()
NULL = {"label": 2}
X = jnp.asarray([[0.3], [-1.4], [2.0]])
T = jnp.asarray([0.4, 1.0, 3.0])
COND = {"label": jnp.asarray([0, 1, 0])}


def _ones(x, t, cond):
    """1 under a label and 0 under the null: the guided prediction is the scale itself."""
    one = (cond["label"] != 2).astype(jnp.float32)[:, None]
    return Prediction(one, one)


def acted(scale, schedule=EDM, t=T, **cond):
    guided = guidance.cfg(denoisers.function(_ones, schedule), scale, NULL)
    return guided(X[: len(t)], t, {"label": COND["label"][: len(t)], **cond}).x0[:, 0]


@pytest.mark.parametrize("name", ["edm", "vp_linear", "ddpm_linear"])
def test_the_angles_clock_is_one_function_of_log_snr_on_every_schedule(name):
    schedule = SCHEDULES[name]()
    t = inside(schedule)
    ratio = np.exp(-0.5 * np.asarray(schedule.logsnr(t), np.float64))
    wanted = np.arccos(ratio / np.sqrt(1 + ratio**2)) * 2 / np.pi
    np.testing.assert_allclose(scales.progress(schedule, t), wanted, atol=1e-5)


@pytest.mark.parametrize("clock", ["angle", "time"])
def test_both_clocks_run_from_pure_noise_to_the_data(clock):
    flow = schedules.rectified_flow()
    ends = jnp.asarray([1.0, 0.5, 0.0])
    np.testing.assert_allclose(scales.progress(flow, ends, clock), [0, 0.5, 1], atol=1e-6)


def test_the_angles_clock_is_the_cosine_schedules_own_time():
    s = schedules.cosine(-40.0, 40.0)
    t = jnp.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(scales.progress(s, t), 1 - t, atol=1e-4)


def test_ramps_are_the_formulas_of_the_papers_on_their_time():
    """Wang et al. 2024: linear 2 (1 - t / T) w and cosine w (1 + cos(pi t / T)), both of mean w,
    where w is ours minus 1; MDT's power-cosine (1 - cos(pi (1 - t / T)^s)) / 2."""
    flow, t, w, s = schedules.rectified_flow(), np.array([0.9, 0.5, 0.2]), 3.0, 4.0
    at = lambda scale: acted(scale, flow, jnp.asarray(t)) - 1
    np.testing.assert_allclose(at(scales.linear(1, 1 + 2 * w, "time")), 2 * (1 - t) * w, rtol=1e-5)
    cosine = w * (1 + np.cos(np.pi * t))
    np.testing.assert_allclose(at(scales.cosine(1, 1 + 2 * w, 1, "time")), cosine, rtol=1e-5)
    power_cosine = w * (1 - np.cos(np.pi * (1 - t) ** s)) / 2
    np.testing.assert_allclose(at(scales.cosine(1, 1 + w, s, "time")), power_cosine, 1e-4, 1e-6)
    np.testing.assert_allclose(at(scales.power(1, 1 + w, 0.5, "time")), w * (1 - t) ** 0.5, 1e-5)


def test_the_beta_curve_is_nothing_at_the_ends_and_the_scale_on_average():
    flow, t = schedules.rectified_flow(), jnp.linspace(0.0, 1.0, 2001)
    curve = jax.jit(lambda scale: scale.at(flow, t, {}))(scales.beta(4.0, 2.0, 3.0, "time"))
    np.testing.assert_allclose(curve[jnp.asarray([0, -1])], 1.0, atol=1e-5)
    assert float(curve.mean()) == pytest.approx(4.0, abs=2e-3)
    assert float(1 - t[curve.argmax()]) == pytest.approx((2 - 1) / (2 + 3 - 2), abs=1e-3)  # mode


def test_piecewise_linear_in_log_snr_and_constant_outside():
    scale = scales.piecewise_linear([-1.0, 1.0, 2.0], [1.0, 5.0, 3.0])
    t = jnp.exp(-0.5 * jnp.asarray([-9.0, 0.0, 1.5]))
    np.testing.assert_allclose(acted(scale, EDM, t), [1.0, 3.0, 4.0], rtol=1e-5)
    flow = schedules.rectified_flow()
    np.testing.assert_allclose(acted(scale, flow, jnp.ones(1)), [1.0])  # logSNR is -inf


def test_scales_nest_an_interval_of_a_ramp_and_of_a_scale_for_each_sample():
    low, high = -1.0, 1.0  # t = 1 alone is inside
    ramp = scales.linear(3.0, 3.0)
    np.testing.assert_allclose(acted(scales.interval(ramp, low, high)), [1, 3, 1])
    mine = scales.interval(guidance.per_sample("w"), low, high)
    np.testing.assert_allclose(acted(mine, w=jnp.asarray([5.0, 6.0, 7.0])), [1, 6, 1])
    by_cfg = guidance.cfg(denoisers.function(_ones, EDM), 2.0, NULL, interval=(low, high))
    np.testing.assert_allclose(by_cfg(X, T, COND).x0[:, 0], [1, 2, 1])


def test_a_plain_function_is_a_scale():
    np.testing.assert_allclose(acted(lambda s, t: 1 + s.sigma(t)), 1 + np.asarray(T), rtol=1e-6)


def test_the_numbers_of_a_scale_are_leaves_a_sweep_is_one_vmap():
    denoise, _ = mixture_1d(EDM, labels=True)
    draw = lambda end: guidance.cfg(denoise, scales.cosine(1.0, end), NULL)(X, T, COND).x0
    ends = jnp.asarray([1.0, 4.0])
    many = jax.jit(jax.vmap(draw))(ends)
    single = jax.jit(draw)
    same(many, jnp.stack([single(e) for e in ends]))
    assert np.abs(many[0] - many[1]).max() > 0.1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: scales.interval(2.0, 1.0, 1.0), r"interval=\(1.0, 1.0\) is empty"),
        (lambda: scales.linear(1, 2, "clock"), r"linear: clock 'clock' is not known"),
        (lambda: scales.cosine(1, 2, 0.0), r"cosine: exponent=0.0 given"),
        (lambda: scales.beta(2.0, 0.5), r"beta: a=0.5 given; it is at least 1"),
        (lambda: scales.piecewise_linear([1, 0], [1, 2]), r"logsnrs=\[1.0, 0.0\] must rise"),
        (lambda: scales.piecewise_linear([0, 1], [1]), r"logsnrs \(2,\) and scales \(1,\)"),
        (lambda: acted(jnp.ones(2)), r"scale of shape \(2,\) for a batch of 3"),
        (lambda: acted(guidance.per_sample("w"), u=T), r"entry of cond 'w' is not known"),
        (lambda: acted(scales.linear(1, 2), None), r"a Schedule .* is needed"),
        (
            lambda: acted(scales.linear(1, 2, "time"), schedules.ve()),
            r"clock='time': VE has its data at t = -inf",
        ),
    ],
)  # fmt: skip
def test_a_scale_that_cannot_work_is_refused_by_name(make, said):
    with pytest.raises(UserError, match=said):
        make()
