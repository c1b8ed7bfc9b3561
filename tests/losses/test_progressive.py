"""Progressive distillation: one step of the target is two of the teacher's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import SCHEDULES, inside, x64
from exact_flow import denoiser, network

from jdiff import denoisers, losses, schedules, solvers, weightings
from jdiff.errors import UserError
from jdiff.losses.progressive import target
from jdiff.noise import Fresh
from jdiff.predictions import parameterization

KEY = jax.random.key(0)


@pytest.mark.parametrize("name", ["cosine", "edm", "rectified_flow"])
@x64
def test_ddim_with_the_target_lands_where_two_steps_of_the_teacher_do(name):
    s = SCHEDULES[name]()
    teacher, x = denoiser(s), jax.random.normal(KEY, (5, 1))
    end, middle, t = inside(s, 3)[jnp.array([0, 1, 2])]
    ddim, noise = solvers.ddim(), Fresh(jax.random.split(KEY, 5))
    each = lambda a: jnp.full(5, a)

    @jax.jit
    def both():
        z, _, _ = ddim.step(teacher, s, x, (), t, middle, noise, {})
        z, _, _ = ddim.step(teacher, s, z, (), middle, end, noise, {})
        found = target(teacher, s, x, each(t), each(middle), each(end), {})
        one, _, _ = ddim.step(lambda x, t, cond: found, s, x, (), t, end, noise, {})
        return z, found, one

    z, found, one = both()
    np.testing.assert_allclose(one, z, rtol=1e-10)
    # and it is a prediction at x, to the data as well
    np.testing.assert_allclose(s.alpha(t) * found.x0 + s.sigma(t) * found.eps, x, rtol=1e-10)


@x64
def test_a_student_that_is_the_target_has_no_loss_on_its_grid():
    """The student's x0 at t is that of two half steps of its own size, 1 / N: the loss's grid."""
    s, steps = schedules.cosine(), 4

    def answer(params, x, t, cond):
        size = s.t_max / steps
        end = jnp.maximum(t - size, 0.0)
        return target(denoiser(s), s, x, t, t - size / 2, end, {}).x0 + params["b"]

    x0 = jax.random.normal(KEY, (64, 1))

    @jax.jit
    def loss(b, weighting=None):
        student = network(answer, s, "x0", {"b": b})
        return losses.progressive(
            KEY, student, x0, teacher=denoiser(s), steps=steps, weighting=weighting
        )

    assert loss(0.0).max() < 1e-12
    np.testing.assert_allclose(loss(0.5), 0.25, rtol=1e-5)
    weighted = loss(0.5, weightings.v())
    times = s.t_max * jnp.arange(1, 5) / 4
    allowed = 0.25 * (1 + jnp.exp(s.logsnr(times)))
    assert jnp.abs(weighted[:, None] / allowed - 1).min(1).max() < 1e-5  # each of a time i / N
    assert jnp.abs(weighted[:, None] / allowed - 1).min(0).max() < 1e-5  # and all of them occur


@x64
def test_the_target_of_ever_shorter_steps_is_the_teachers_own_x0():
    s, x, t = schedules.cosine(), jnp.asarray([[0.4]]), jnp.asarray([0.5])
    gaps = []
    for n in (16, 32, 64):
        found = jax.jit(target)(denoiser(s), s, x, t, t - 0.5 / n, t - 1.0 / n, {}).x0
        gaps.append(float(jnp.abs(found - denoiser(s)(x, t).x0)[0, 0]))
    np.testing.assert_allclose(np.log2(gaps[0] / gaps[1]), 1.0, atol=0.1)
    np.testing.assert_allclose(np.log2(gaps[1] / gaps[2]), 1.0, atol=0.1)


def test_a_student_of_no_steps_is_refused():
    s = schedules.cosine()
    with pytest.raises(UserError, match="steps=0"):
        losses.progressive(KEY, None, jnp.zeros((2, 1)), teacher=denoiser(s), steps=0)


def test_data_at_no_finite_time_is_refused():
    s = schedules.ve()
    student = denoisers.network(lambda w, x, *rest: w * x, 1.0, s, parameterization("x0"))
    with pytest.raises(UserError, match="progressive: VE has its data at t = -inf"):
        losses.progressive(jax.random.key(0), student, jnp.ones((4, 2)), teacher=student, steps=2)
