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
    if isinstance(schedule, schedules.RectifiedFlow):
        low, high = 1e-3, 1 - 1e-3
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
