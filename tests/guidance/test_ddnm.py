"""DDNM: the measurement is met exactly and the null space is the denoiser's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import SCHEDULES, x64

from jdiff import denoisers, grids, guidance, operators, sample, solvers
from jdiff.errors import UserError
from jdiff.predictions import corrupt

RANDOM = np.random.default_rng(3)
X = RANDOM.normal(size=(2, 4, 4, 3))
OPERATORS = {
    "mask": lambda: operators.mask(RANDOM.random((4, 4, 1)) < 0.5),
    "average_pool": lambda: operators.average_pool(2, (4, 4)),
    "grayscale": lambda: operators.grayscale(),
}


@pytest.mark.parametrize("name", OPERATORS)
@x64
def test_range_from_the_measurement_null_space_from_the_denoiser(name):
    operator, schedule = OPERATORS[name](), SCHEDULES["vp_linear"]()
    y = operator(jnp.asarray(RANDOM.normal(size=X.shape)))
    t = jnp.asarray([0.3, 0.6])
    denoise = denoisers.mixture(jnp.asarray(RANDOM.normal(size=(3, 4, 4, 3))), 0.5, schedule)
    guided = guidance.ddnm(denoise, operator)
    both = jax.jit(lambda d, x, t, y: (d(x, t, {"y": y}), d.denoiser(x, t)))
    made, plain = both(guided, jnp.asarray(X), t, y)
    null = lambda x: x - operator.pinv(operator(x))
    np.testing.assert_allclose(operator(made.x0), y, atol=1e-12)
    np.testing.assert_allclose(null(made.x0), null(plain.x0), atol=1e-12)
    np.testing.assert_allclose(corrupt(schedule, made.x0, made.eps, t), X, atol=1e-12)
    assert np.abs(made.x0 - plain.x0).max() > 0.1


@x64
def test_samples_meet_the_measurement():
    schedule, operator = SCHEDULES["edm"](), OPERATORS["average_pool"]()
    denoise = denoisers.mixture(jnp.asarray(RANDOM.normal(size=(3, 4, 4, 3))), 0.5, schedule)
    y = operator(jnp.asarray(X))
    out = sample(
        jax.random.key(0), guidance.ddnm(denoise, operator), cond={"y": y}, shape=(4, 4, 3),
        times=grids.karras(schedule, 4), solver=solvers.ddim(),
    )  # fmt: skip
    np.testing.assert_allclose(operator(out), y, atol=1e-12)


@x64
def test_a_function_with_a_pseudo_inverse_is_projected():
    """Rounding to tenths: y -> y is a pseudo-inverse, and the range is what it rounds to."""
    rounding = operators.function(lambda x: jnp.round(10 * x) / 10, lambda y: y)
    denoise = denoisers.mixture(jnp.zeros((1, 4)), 1.0, SCHEDULES["edm"]())
    y = jnp.asarray([[0.1, -0.3, 0.7, 0.0]])
    made = guidance.ddnm(denoise, rounding)(jnp.asarray(RANDOM.normal(size=(1, 4))), 1.0, {"y": y})
    np.testing.assert_allclose(rounding(made.x0), y, atol=1e-12)


def test_an_operator_without_pseudo_inverse_is_refused():
    denoise = denoisers.mixture(jnp.zeros((1, 4)), 1.0, SCHEDULES["edm"]())
    with pytest.raises(UserError, match="no pseudo-inverse"):
        guidance.ddnm(denoise, lambda x: x**2)
