"""DDNM+: DDNM without noise; with it, the noise that y brings is taken off what is added."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import SCHEDULES, at, x64

from jdiff import denoisers, grids, guidance, operators, sample, solvers
from jdiff.errors import UserError
from jdiff.noise import Noise
from jdiff.pytree import struct

RANDOM = np.random.default_rng(4)
SINGULAR = np.array([2.0, 1.0, 0.1, 0.0])
POINT = RANDOM.normal(size=4)


@struct
class Given(Noise):
    """The noise that a test wants."""

    z: jax.Array

    def between(self, x, t, s, part=0):
        return self.z


def rotated():
    """An operator with those singular values, and its left and right vectors."""
    u, v = (np.linalg.qr(RANDOM.normal(size=(4, 4)))[0] for _ in range(2))
    return u @ np.diag(SINGULAR) @ v.T


@x64
def test_every_state_has_the_noise_level_of_its_time():
    """With the exact x0, x_s - alpha x0 is linear in x_t's, y's and the step's noise."""
    schedule, a = SCHEDULES["vp_linear"](), rotated()
    operator = operators.matrix(a, (4,))
    denoise = denoisers.exact(jnp.asarray(POINT)[None], schedule)
    t, s = at(schedule, [1.0, 0.6])

    def step(noise, eps, n, z):
        x = schedule.alpha(t) * POINT + schedule.sigma(t) * eps
        cond = {"y": (a @ POINT + noise * n)[None]}
        solver = solvers.ddnm(operator, noise)
        x, _, _ = solver.step(denoise, schedule, x[None], (), t, s, Given(z[None]), cond)
        return x[0] - schedule.alpha(s) * POINT

    def linear(noise):
        zero = jnp.zeros(4)
        return step(noise, zero, zero, zero), jax.jacobian(step, (1, 2, 3))(noise, zero, zero, zero)

    linear = jax.jit(linear)
    for noise in (0.0, 0.05, 2.0):
        centre, parts = linear(noise)
        np.testing.assert_allclose(centre, 0, atol=1e-9)
        covariance = sum(p @ p.T for p in parts)
        np.testing.assert_allclose(covariance, schedule.sigma(s) ** 2 * np.eye(4), atol=1e-9)
        assert (np.abs(parts[1]).max() > 1e-3) == (noise > 0)  # y has its say


@x64
def test_without_noise_it_is_ddpm_with_the_projected_denoiser():
    schedule, operator = SCHEDULES["vp_linear"](), operators.average_pool(2, (4, 4))
    denoise = denoisers.mixture(jnp.asarray(RANDOM.normal(size=(3, 4, 4, 1))), 0.5, schedule)
    y = operator(jnp.asarray(RANDOM.normal(size=(2, 4, 4, 1))))
    settings = dict(cond={"y": y}, shape=(4, 4, 1), times=grids.uniform(schedule, 5))
    one = sample(jax.random.key(0), denoise, solver=solvers.ddnm(operator), **settings)
    other = sample(
        jax.random.key(0), guidance.ddnm(denoise, operator), solver=solvers.ddpm(), **settings
    )
    np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(operator(one), y, atol=1e-9)


def test_ddnm_that_cannot_work_is_refused():
    with pytest.raises(UserError, match="noise=-1"):
        solvers.ddnm(operators.grayscale(), -1)
    with pytest.raises(UserError, match="a linear operator"):
        solvers.ddnm(lambda x: x)
