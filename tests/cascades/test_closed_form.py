"""Gaussian data through a whole cascade: the joint law of every stage's images in closed form.

x ~ N(m, C) is 4 x 4, its small image S x is 2 x 2 with covariance P = S C S', and the augmented
input is z = a S x + b n. The second stage samples N(x | z), a linear-Gaussian posterior with the
gain K = a C S' (a^2 P + b^2)^-1, so that x again has the law N(m, C), whatever the level, and

    cov(S x of the first stage, x) = a P K'       where noise is added to the first's image
    cov(z, x) = a S C                             where the first stage stops at z
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import grids, schedules, solvers
from jdiff.cascades import augmentations, cascade, low_res, stage
from jdiff.predictions import from_x0
from jdiff.pytree import static, struct

NUM = 10_000
PLACE = np.stack(np.meshgrid(np.arange(4), np.arange(4), indexing="ij"), -1).reshape(16, 2)
MEAN = 0.3 * np.sin(PLACE @ np.array([1.0, 0.5]))
COVARIANCE = 0.25 * np.exp(-np.linalg.norm(PLACE[:, None] - PLACE, axis=-1) / 2.0)
CELL = (PLACE // 2) @ np.array([2, 1])  # which small pixel a pixel belongs to
SHRINK = (np.arange(4)[:, None] == CELL) / 4.0  # [4, 16]
LEVEL = 0.4

COSINE = schedules.cosine()
TIMES = grids.uniform(COSINE, 32)


@struct
class Linear:
    """The exact denoiser of N(mean, covariance), given z = a S x + b n where there is an S."""

    mean: jax.Array
    covariance: jax.Array
    shrink: jax.Array | None
    schedule: schedules.Schedule
    residual: bool = static(False)

    def __call__(self, x, t, cond=None):
        n = self.mean.size
        mean, covariance = jnp.broadcast_to(self.mean, (len(x), n)), self.covariance
        if self.shrink is not None:
            level = cond["aug_level"][0] if "aug_level" in cond else jnp.zeros(())
            a, b = jnp.cos(0.5 * jnp.pi * level), jnp.sin(0.5 * jnp.pi * level)
            small = self.shrink @ covariance
            seen = a**2 * small @ self.shrink.T + b**2 * jnp.eye(len(small))
            gain = jnp.linalg.solve(seen, a * small).T
            z = cond["low_res"].reshape(len(x), -1)
            mean = mean + (z - a * mean @ self.shrink.T) @ gain.T
            covariance = covariance - a * gain @ small
            if self.residual:  # what the network's nearest neighbours take off
                mean = mean - z @ (4.0 * self.shrink)
        alpha, sigma = self.schedule.alpha(t[0]), self.schedule.sigma(t[0])
        noised = alpha**2 * covariance + sigma**2 * jnp.eye(n)
        flat = x.reshape(len(x), n)
        x0 = mean + jnp.linalg.solve(noised, (flat - alpha * mean).T).T @ (alpha * covariance)
        return from_x0(self.schedule, x, x0.reshape(x.shape), t)


def _stages(augmentation, **options):
    residual = options.pop("residual", False)
    low = low_res(2, augmentation, up="nearest", residual=residual)
    array = lambda a: jnp.asarray(a, jnp.float32)
    small = array(SHRINK @ MEAN), array(SHRINK @ COVARIANCE @ SHRINK.T)
    rest = {"times": TIMES, "solver": solvers.dpmpp_2m()}
    return (
        stage(Linear(*small, None, COSINE), shape=(2, 2, 1), **rest),
        stage(
            Linear(array(MEAN), array(COVARIANCE), array(SHRINK), COSINE, residual),
            shape=(4, 4, 1), low_res=low, **options, **rest,
        ),
    )  # fmt: skip


NOISE = augmentations.gaussian(COSINE)
CASES = {
    "level 0": lambda: (0.0, False, _stages(NOISE, level=0.0)),
    "noise added": lambda: (LEVEL, False, _stages(NOISE, level=LEVEL)),
    "residual, no augmentation": lambda: (0.0, False, _stages(None, residual=True)),
    "truncated": lambda: (LEVEL, True, _stages(NOISE, level=LEVEL, truncate=True)),
}


def law(level, truncated):
    """Mean [20] and covariance [20, 20] of (what the first stage hands over, x)."""
    a, b = np.cos(0.5 * np.pi * level), np.sin(0.5 * np.pi * level)
    small = SHRINK @ COVARIANCE @ SHRINK.T
    noised = a**2 * small + b**2 * np.eye(4)
    gain = a * COVARIANCE @ SHRINK.T @ np.linalg.inv(noised)
    first, across = (noised, a * SHRINK @ COVARIANCE) if truncated else (small, a * small @ gain.T)
    mean = (a if truncated else 1.0) * SHRINK @ MEAN
    return np.concatenate([mean, MEAN]), np.block([[first, across], [across.T, COVARIANCE]])


def worst(samples, mean, covariance):
    """The largest deviation of sampled moments from their expectation, in standard errors."""
    n, v = len(samples), np.diag(covariance)
    of_mean = (samples.mean(0) - mean) / np.sqrt(v / n)
    spread = np.sqrt((np.outer(v, v) + covariance**2) / n)
    of_covariance = (np.cov(samples, rowvar=False) - covariance) / spread
    return max(np.abs(of_mean).max(), np.abs(of_covariance).max())


@functools.cache
def drawn(case):
    level, truncated, stages = CASES[case]()
    images = cascade(*stages).sample(jax.random.key(0), num=NUM, intermediate=True)
    samples = np.concatenate([np.asarray(a, np.float64).reshape(NUM, -1) for a in images], 1)
    return level, truncated, samples


@pytest.mark.parametrize("case", CASES)
def test_both_stages_have_the_law_of_the_data(case):
    level, truncated, samples = drawn(case)
    assert worst(samples, *law(level, truncated)) < 4.5  # of 230 moments, a normal's largest is 3


@pytest.mark.parametrize(
    ("case", "level", "truncated"), [("noise added", 0.2, False), ("noise added", 0.0, False),
                                     ("truncated", 0.2, True), ("level 0", 0.1, False)]
)  # fmt: skip
def test_another_level_would_be_seen(case, level, truncated):
    assert worst(drawn(case)[2], *law(level, truncated)) > 8.0
