"""What is stored and for how long, in programs that a pencil can walk through."""

import jax
import jax.numpy as jnp
import pytest

from jdiff.models.remat import checkpoint
from jdiff.planning.memory import measure
from jdiff.planning.program import flatten

N = 64
MATRIX = 4 * N * N


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def peak(function, *args, donated=False):
    program = flatten(jax.make_jaxpr(function)(*args))
    return measure(program, lambda p, v: p.values[v].bytes, donated=donated).peak


def test_elementwise_chains_are_never_stored():
    x = shape(N, N)
    assert peak(lambda x: jnp.sum(3 * jnp.tanh(x) + x), x) == 4  # the sum alone
    assert peak(lambda x: 3 * jnp.tanh(x) + 1, x) == MATRIX  # the result
    assert peak(lambda x: 3 * jnp.tanh(x) + 1, x, donated=True) == 0


def test_products_live_until_they_are_read():
    x = shape(N, N)
    chain = lambda n: lambda x: sum([x := x @ x for _ in range(n)][-1:])
    assert peak(chain(2), x) == 2 * MATRIX  # one is read while the next is made
    assert peak(chain(9), x) == 2 * MATRIX
    kept = lambda x: ((a := x @ x), (b := a @ x), b @ a)[2]
    assert peak(kept, x) == 3 * MATRIX


def test_what_is_dear_and_read_twice_is_stored_and_what_is_cheap_is_not():
    x = shape(N, N)
    twice = lambda f: lambda x: (p := x @ x, y := f(p), jnp.sum(y * p), jnp.sum(y * x))[2:]
    assert peak(twice(jnp.exp), x) == 2 * MATRIX + 4  # the product, its exponential, a sum
    assert peak(twice(lambda p: p + 1), x) == MATRIX + 8


def test_what_is_made_of_more_than_it_has_is_stored():
    def f(x, w):
        y = x @ w + w @ x  # in the place of one of them: nobody reads them again
        return jnp.sum(y * x), jnp.sum(y * w), y

    assert peak(f, shape(N, N), shape(N, N)) == 2 * MATRIX


def layers(depth, remat):
    """A scan of tanh(h @ w), and its gradient by the stack of w."""
    layer = checkpoint(lambda h, w: jnp.tanh(h @ w), remat, scanned=True)

    def loss(ws, h):
        return jnp.sum(jax.lax.scan(lambda h, w: (layer(h, w), None), h, ws)[0])

    return peak(jax.grad(loss), shape(depth, N, N), shape(N, N))


def test_residuals_grow_with_depth_as_the_policy_says():
    """Of a layer: its input; besides, what the gradient of tanh reads, y (and 1 - y), or h @ w."""
    each = lambda remat: (layers(24, remat) - layers(12, remat)) / 12 / MATRIX
    gradient = 1  # of a layer's w, stacked
    assert each("none") - gradient in (pytest.approx(3), pytest.approx(2))  # jax 0.10, 0.11
    assert each("dots") == pytest.approx(2 + gradient)  # the input, and the product
    assert each("full") == pytest.approx(1 + gradient)


def test_a_loop_takes_its_body_once_and_writes_over_what_it_carries():
    body = lambda h, _: (h @ h @ h, None)
    once = peak(lambda x: (x @ x) @ x, shape(N, N))
    looped = lambda n: peak(lambda x: jax.lax.scan(body, x, length=n)[0], shape(N, N))
    assert once == 2 * MATRIX
    assert looped(3) == looped(300) == once + MATRIX  # its result beside them


def test_branches_take_the_larger():
    small, large = (lambda x: x), (lambda x: (x @ x) @ x)
    f = lambda i, x: jax.lax.switch(i, [small, large], x)
    assert peak(f, jax.ShapeDtypeStruct((), jnp.int32), shape(N, N)) == 3 * MATRIX + 4
