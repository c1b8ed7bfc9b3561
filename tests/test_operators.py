"""Operators against the dense matrices that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from closed_forms import x64

from jdiff import operators
from jdiff.errors import UserError

RANDOM = np.random.default_rng(0)
SHAPE = (4, 4, 3)
KEEP = RANDOM.random((4, 4, 1)) < 0.5
DENSE = RANDOM.normal(size=(5, 48))
DENSE[4] = DENSE[0] + DENSE[1]  # of rank 4

OPERATORS = {
    "mask": lambda: operators.mask(KEEP),
    "average_pool": lambda: operators.average_pool(2, (4, 4)),
    "bicubic": lambda: operators.bicubic(2, (4, 4)),
    "blur": lambda: operators.blur(0.7, (4, 4)),
    "grayscale": lambda: operators.grayscale(),
    "matrix": lambda: operators.matrix(DENSE, SHAPE),
    "linear": lambda: operators.linear(lambda x: jnp.cumsum(x[:, ::2], axis=2), SHAPE, 200),
}


X = np.ones((1, 2, 2, 3), np.float32)


def dense(operator):
    """`[m, n]`: the images of the basis vectors, flattened."""
    basis = jnp.eye(48).reshape(48, *SHAPE)
    return np.asarray(operator(basis)).reshape(48, -1).T


@pytest.mark.parametrize("name", OPERATORS)
@x64
def test_adjoint_pseudo_inverse_solution_and_filter_are_those_of_the_matrix(name):
    operator = OPERATORS[name]()
    a = dense(operator)
    x = jnp.asarray(RANDOM.normal(size=(2, *SHAPE)))
    y = operator(x)
    flat = np.asarray(y).reshape(2, -1)
    r2 = np.array([0.5, 2.0])
    weight = lambda s: 1.0 / (2.0 + s**2)

    @jax.jit
    def everything(operator, y, x):
        out = operator.adjoint(y), operator.pinv(y), operator.solve(y, jnp.asarray(r2), 0.3)
        return out if name == "linear" else (*out, operator.filter(x, weight))

    adjoint, pinv, solved, *filtered = everything(operator, y, x)
    close = lambda got, wanted: np.testing.assert_allclose(
        np.asarray(got).reshape(2, -1), wanted, rtol=1e-7, atol=1e-9
    )
    close(adjoint, flat @ a)
    close(pinv, flat @ np.linalg.pinv(a, rcond=1e-10).T)
    gram = a @ a.T
    solve = lambda r, b: np.linalg.solve(r * gram + 0.3 * np.eye(len(a)), b)
    wanted = np.stack([solve(r, b) for r, b in zip(r2, flat)])
    if name == "mask":
        wanted = wanted * np.broadcast_to(KEEP, SHAPE).ravel()  # y is 0 there in any case
    close(solved, wanted)
    if filtered:
        values, vectors = np.linalg.eigh(a.T @ a)
        factors = weight(np.sqrt(np.maximum(values, 0)))
        close(filtered[0], np.asarray(x).reshape(2, -1) @ (vectors * factors) @ vectors.T)


def test_what_the_operators_measure():
    x = RANDOM.random((2, 8, 8, 3)).astype(np.float32)
    pooled = x.reshape(2, 4, 2, 4, 2, 3).mean((2, 4))
    np.testing.assert_allclose(operators.average_pool(2, (8, 8))(x), pooled, atol=1e-6)
    resized = jax.image.resize(x, (2, 4, 4, 3), "bicubic", antialias=True)
    np.testing.assert_allclose(operators.bicubic(2, (8, 8))(x), resized, atol=1e-5)
    gray = 0.299 * x[..., 0] + 0.587 * x[..., 1] + 0.114 * x[..., 2]
    np.testing.assert_allclose(operators.grayscale()(x)[..., 0], gray, atol=1e-6)
    wide = RANDOM.random((1, 21, 21, 1)).astype(np.float32)
    blurred = scipy.ndimage.gaussian_filter(wide[0, ..., 0], 1.0, truncate=8)
    middle = np.s_[8:13, 8:13]
    mine = operators.blur(1.0, (21, 21))(wide)[0, ..., 0]
    np.testing.assert_allclose(mine[middle], blurred[middle], atol=1e-5)
    np.testing.assert_allclose(operators.blur(1.0, (8, 8))(np.ones_like(x)), 1.0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: operators.mask(np.array([0.5])), "other than 0 and 1"),
        (lambda: operators.average_pool(3, (8, 8)), r"factor=3 does not divide size=\(8, 8\)"),
        (lambda: operators.bicubic(3, (8, 8)), "factor=3"),
        (lambda: operators.blur(0.0, (8, 8)), "sigma=0.0"),
        (lambda: operators.matrix(DENSE, (4, 4, 1)), r"\(5, 48\) does not fit samples of \(4, 4"),
        (lambda: operators.average_pool(2, (4, 4))(jnp.ones((1, 8, 8, 3))), "made for length 4"),
        (lambda: operators.average_pool(2, (4, 4))(jnp.ones((8, 8, 3))), "3 axes after the batch"),
        (lambda: OPERATORS["linear"]().filter(jnp.ones(3), jnp.exp), "singular values are not"),
        (lambda: operators.as_operator(3), "a callable x0 -> y is needed, given 3"),
        (lambda: operators.measurement({"z": 1}, "y"), "'y' is not known.*Allowed: z"),
        (
            lambda: operators.residual(operators.grayscale(), jnp.ones((1, 2, 2)), X),
            r"y has shape \(1, 2, 2\), the operator makes \(1, 2, 2, 1\)",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()
