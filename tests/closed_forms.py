"""What the proofs of the ground floor share: schedules by name, float64, Gaussians in closed form.

Nothing here is computed by the code under test, except `at` (times from `Schedule.time`, which has
its own proof in test_schedules.py).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import denoisers, schedules

#: Makers, not schedules: a table made under float64 holds float64.
SCHEDULES = {
    "edm": schedules.edm,
    "vp_linear": schedules.vp_linear,
    "cosine": schedules.cosine,
    "cosine_shifted": lambda: schedules.cosine(-15.0, 15.0, shift=0.5),
    "ddpm_linear": schedules.ddpm_linear,
    "rectified_flow": schedules.rectified_flow,
}
#: Every schedule and wrapper, for the proofs of the schedules and of the grids themselves.
ALL_SCHEDULES = SCHEDULES | {
    "ve": schedules.ve,
    "ve_sqrt": schedules.ve_sqrt,
    "sub_vp": schedules.sub_vp,
    "gvp": schedules.gvp,
    "sigmoid": schedules.sigmoid,
    "sigmoid_skewed": lambda: schedules.sigmoid(0.0, 3.0, 0.7),
    "linear_vp": schedules.linear_vp,
    "linear_gamma": schedules.linear_gamma,
    "linear_logsnr": schedules.linear_logsnr,
    "polynomial": lambda: schedules.polynomial(1.5),
    "monotone": lambda: schedules.monotone(jax.random.key(0), hidden=16),
    "scaled_linear": schedules.scaled_linear,
    "squared_cosine": schedules.squared_cosine,
    "ncsn": schedules.ncsn,
    "zero_terminal_scaled_linear": lambda: schedules.zero_terminal_snr(schedules.scaled_linear()),
    "zero_terminal_vp_linear": lambda: schedules.zero_terminal_snr(schedules.vp_linear()),
    "shifted_flow": lambda: schedules.shifted(schedules.rectified_flow(), 1 / 3),
    "shifted_sub_vp": lambda: schedules.shifted(schedules.sub_vp(), 0.5),
    "shifted_polynomial": lambda: schedules.shifted(schedules.polynomial(1.5), 0.5),
    "shifted_linear_vp": lambda: schedules.shifted(schedules.linear_vp(), 0.5),
    "shifted_gvp": lambda: schedules.shifted(schedules.gvp(), 0.5),
    "shifted_table": lambda: schedules.shifted(schedules.ddpm_linear(), 0.5),
}
CONTINUOUS = [name for name in SCHEDULES if name != "ddpm_linear"]
VARIANCE_PRESERVING = ["vp_linear", "cosine", "ddpm_linear"]


def x64(test):
    """Runs a test in float64; schedules and data must be made inside it."""

    @functools.wraps(test)
    def inside(*args, **kwargs):
        with jax.enable_x64(True):
            return test(*args, **kwargs)

    return inside


def ends(schedule) -> tuple[float, float]:
    """(low, high) times with a finite logSNR: the domain, or just inside it."""
    low, high = float(schedule.t_min), float(schedule.t_max)
    margin = 1e-3 * (high - low)
    if low == schedule.t_data:
        low += margin
    if float(schedule.alpha(high)) == 0:
        high -= margin
    return low, high


def inside(schedule, n: int = 9):
    """n times across the domain, evenly spaced in logSNR, none at an end or on a table's step."""
    low, high = ends(schedule)
    top, bottom = (float(schedule.logsnr(jnp.asarray(t))) for t in (low, high))
    return schedule.time(jnp.linspace(top, bottom, n + 2)[1:-1])


def at(schedule, sigma_ratio):
    """The times at which sigma / alpha has these values."""
    return schedule.time(-2.0 * jnp.log(jnp.asarray(sigma_ratio, jnp.result_type(float))))


def mixture_1d(schedule, labels: bool = False):
    """Three components in one dimension, of two labels; and its numbers for an independent hand."""
    means, variances = np.array([-1.0, 0.3, 1.2]), np.array([0.05, 0.02, 0.1])
    weights, label = np.array([0.2, 0.5, 0.3]), np.array([0, 1, 0])
    denoise = denoisers.mixture(
        jnp.asarray(means)[:, None], variances, schedule, weights=weights,
        labels=label if labels else None,
    )  # fmt: skip
    return denoise, (means, variances, weights, label)


def mixture_score(x, sigma, numbers, label: int | None = None):
    """d log p / dx of the mixture noised to x0 + sigma eps (alpha = 1), in numpy float64."""
    means, variances, weights, labels = numbers
    keep = np.ones(len(means), bool) if label is None else labels == label
    m, spread, w = means[keep], variances[keep] + sigma**2, weights[keep]
    gap = np.asarray(x)[..., None] - m
    log_r = np.log(w) - 0.5 * gap**2 / spread - 0.5 * np.log(spread)
    r = np.exp(log_r - log_r.max(-1, keepdims=True))
    r /= r.sum(-1, keepdims=True)
    return -(r * gap / spread).sum(-1)


def same(a, b, rtol=1e-5, atol=1e-6):
    """Trees of equal structure and (nearly) equal values."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)
