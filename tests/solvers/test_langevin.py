"""Langevin steps on one data point, where a chain is a linear recursion with a known law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import SCHEDULES, at, x64

from jdiff import denoisers, sample, schedules, solvers
from jdiff.noise import Noise
from jdiff.predictions import from_x0
from jdiff.pytree import struct

MEAN, STEPS = 0.4, 5


@struct
class Unit(Noise):
    """Row 2 + i of the batch gets a 1 at the free draw i, row 1 none, and no interval any."""

    def between(self, x, t, s, part=0):
        """Zeros."""
        return jnp.zeros_like(x)

    def free(self, x, i=0):
        """The unit draw i."""
        return (jnp.arange(len(x)) == 2 + i).astype(x.dtype)[:, None]


@jax.jit
def _step(solver, denoise, schedule, x, t, s):
    return solver.step(denoise, schedule, x, (), t, s, Unit(), {})[0][:, 0]


def _law(solver, s, t, u):
    """(gain, variance of the free noise, mean from 0) of one step around one data point."""
    x = jnp.zeros((4 + STEPS, 1)).at[1].set(1.0)
    denoise = denoisers.mixture(jnp.asarray([[MEAN]]), 0.0, s)
    ends = np.asarray(_step(solver, denoise, s, x, t, u))
    return ends[1] - ends[0], np.sum((ends[2:] - ends[0]) ** 2), ends[0]


@pytest.mark.parametrize("name", ["edm", "vp_linear"])
@x64
def test_t_steps_at_a_level_have_the_variance_of_ncsnv2s_proposition_3(name):
    """q = 1 - e / 2: s^2 = q^(2 T) s_0^2 + e (1 - q^(2 T)) / (1 - q^2), in units of sigma^2."""
    s, e = SCHEDULES[name](), 0.3
    t, u = at(s, [2.0, 1.1])
    gain, noise, mean = _law(solvers.annealed_langevin(e, STEPS), s, t, u)
    q, scale = 1 - e / 2, float(s.alpha(u) / s.alpha(t))
    sigma = float(s.sigma(t))
    np.testing.assert_allclose(gain, scale * q**STEPS, rtol=1e-9)
    expected = (scale * sigma) ** 2 * e * (1 - q ** (2 * STEPS)) / (1 - q**2)
    np.testing.assert_allclose(noise, expected, rtol=1e-9)
    np.testing.assert_allclose(mean, float(s.alpha(u)) * MEAN * (1 - q**STEPS), rtol=1e-9)


def test_annealing_over_the_ncsn_ladder_ends_at_the_data():
    """N(0.4, 0.05^2), 20 levels from 10 to 0.01: its deviation to the chain's own bias, 5%."""
    s = schedules.edm()
    denoise = denoisers.mixture(jnp.asarray([[MEAN]]), 0.05**2, s)
    times = jnp.append(jnp.geomspace(10.0, 0.01, 20), 0.0)
    x = sample(
        jax.random.key(0), denoise, shape=(1,), num=2048, times=times,
        solver=solvers.annealed_langevin(0.2, 20),
    )  # fmt: skip
    assert float(x.mean()) == pytest.approx(MEAN, abs=4 * 0.05 / np.sqrt(2048))
    assert float(x.std()) == pytest.approx(0.05, rel=0.05 + 4 / np.sqrt(2 * 2048))


@x64
def test_the_corrector_comes_after_the_predictor_with_the_papers_step_size_for_each_sample():
    """Algorithm 5: e = 2 alpha_i (r |z| / |score|)^2, x + e score + sqrt(2 e) z, in numpy."""
    s, r = schedules.vp_linear(), 0.1
    t, u = at(s, [2.0, 1.1])
    image = jnp.asarray([0.3, -0.6])
    denoise = jax.tree_util.Partial(
        lambda x, t, cond: from_x0(s, x, jnp.broadcast_to(image, x.shape), t)
    )
    x = jnp.asarray([[1.0, 2.0], [-0.5, 0.1]])
    z = np.asarray([[0.7, -1.1], [0.2, 0.4]])

    class Given(Unit):
        def free(self, x, i=0):
            return jnp.asarray(z)

    corrected = solvers.predictor_corrector(solvers.ddim(), r, 1).step(
        denoise, s, x, (), t, u, Given(), {}
    )[0]
    y = np.asarray(solvers.ddim().step(denoise, s, x, (), t, u, Given(), {})[0])
    score = -(y - float(s.alpha(u)) * np.asarray(image)) / float(s.sigma(u)) ** 2
    ratio = np.linalg.norm(z, axis=1) / np.linalg.norm(score, axis=1)
    e = (2 * float(s.alpha(t) / s.alpha(u)) ** 2 * (r * ratio) ** 2)[:, None]
    np.testing.assert_allclose(corrected, y + e * score + np.sqrt(2 * e) * z, rtol=1e-9)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: solvers.annealed_langevin(4.0), r"epsilon / sigma_L\^2 lies in \(0, 4\)"),
        (lambda: solvers.annealed_langevin(steps=0), "annealed_langevin: steps=0 given"),
        (lambda: solvers.predictor_corrector(snr=0.0), "snr=0.0 given; it must be positive"),
        (lambda: solvers.predictor_corrector(steps=0), "predictor_corrector: steps=0 given"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, said):
    with pytest.raises(ValueError, match=said):
        make()
