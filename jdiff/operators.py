"""Measurements y = A(x0) + noise, for guidance that conditions on them.

An operator is a callable from x0 `[B, ...]` to y `[B, ...]`; any function will do where only a
gradient is needed. A `Linear` one also has

    adjoint(y)                A^T y
    pinv(y)                   A^+ y, of least norm
    solve(w, r2, s2)          (r2 A A^T + s2 I)^-1 w; r2 a number or `[B]`
    filter(x, f)              V f(S) V^T x, for A = U S V^T and S padded with zeros

in closed form: a mask is diagonal, and pooling, resizing, blurring and mixing channels are one
small matrix along each axis, whose singular value decompositions multiply (a Kronecker product).
`linear` makes one of any linear function, with the adjoint by transposition and `solve` by
conjugate gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.errors import UserError, choose
from jdiff.pytree import Array, PyTree, expand, static, struct


class Linear:
    """What the module's docstring promises of a linear operator."""

    def __call__(self, x: Array) -> Array:
        """A x."""
        raise NotImplementedError  # abstract

    def adjoint(self, y: Array) -> Array:
        """A^T y."""
        raise NotImplementedError  # abstract

    def pinv(self, y: Array) -> Array:
        """A^+ y: A A^+ A = A, without a share in the null space of A."""
        return self.adjoint(self.solve(y, 1.0, 0.0))

    def solve(self, w: Array, r2: Array | float, s2: Array | float) -> Array:
        """(r2 A A^T + s2 I)^-1 w; with s2 = 0 its pseudo-inverse."""
        raise NotImplementedError  # abstract

    def filter(self, x: Array, f: Callable[[Array], Array]) -> Array:
        """V f(S) V^T x, where f maps singular values, 0 on the null space, to factors."""
        raise UserError(
            f"{type(self).__name__}: its singular values are not known; use mask, average_pool, "
            "bicubic, blur, grayscale or matrix."
        )


@struct
class Mask(Linear):
    """The operator that `mask` makes: diagonal."""

    keep: Array

    def __call__(self, x: Array) -> Array:
        """x where it is known, 0 elsewhere."""
        return self.keep.astype(x.dtype) * x

    def adjoint(self, y: Array) -> Array:
        """As forwards."""
        return self(y)

    def solve(self, w: Array, r2: Array | float, s2: Array | float) -> Array:
        """Known entries are divided by r2 + s2; the rest holds no measurement, and is 0."""
        return self(w) / expand(r2 + s2, w)

    def filter(self, x: Array, f: Callable[[Array], Array]) -> Array:
        """f(1) on known entries, f(0) on the others."""
        return f(self.keep.astype(x.dtype)) * x


@struct
class Factor:
    """A matrix along one axis with its decomposition: A = U S V^T.

    Attributes:
      matrix: A `[m, n]`.
      u: `[m, m]`.
      v: `[n, n]`.
      s_out, s_in: the singular values padded with zeros to `[m]` and `[n]`.
    """

    matrix: Array
    u: Array
    v: Array
    s_out: Array
    s_in: Array


@struct
class Axes(Linear):
    """One matrix along each axis after the batch; None leaves an axis as it is."""

    factors: tuple[Factor | None, ...]

    def __call__(self, x: Array) -> Array:
        """Each matrix along its axis."""
        return self._along(x, lambda f: f.matrix)

    def adjoint(self, y: Array) -> Array:
        """The transposed matrices."""
        return self._along(y, lambda f: f.matrix.T)

    def solve(self, w: Array, r2: Array | float, s2: Array | float) -> Array:
        """In the basis of the left singular vectors, where A A^T is diagonal."""
        square = self._singular(w.ndim, lambda f: f.s_out).astype(w.dtype) ** 2
        total = expand(jnp.asarray(r2, w.dtype), w) * square + expand(jnp.asarray(s2, w.dtype), w)
        c = self._along(w, lambda f: f.u.T)
        c = jnp.where(total > 0, c / jnp.where(total > 0, total, 1.0), 0.0)
        return self._along(c, lambda f: f.u)

    def filter(self, x: Array, f: Callable[[Array], Array]) -> Array:
        """In the basis of the right singular vectors."""
        c = self._along(x, lambda factor: factor.v.T)
        s = self._singular(x.ndim, lambda factor: factor.s_in).astype(x.dtype)
        return self._along(f(s) * c, lambda factor: factor.v)

    def _along(self, x: Array, pick: Callable[[Factor], Array]) -> Array:
        if x.ndim != 1 + len(self.factors):
            raise UserError(
                f"operator: made for [B, ...] with {len(self.factors)} axes after the batch, given "
                f"an array of shape {x.shape}."
            )
        for axis, factor in enumerate(self.factors, 1):
            if factor is None:
                continue
            a = pick(factor).astype(x.dtype)
            if a.shape[1] != x.shape[axis]:
                raise UserError(
                    f"operator: made for length {a.shape[1]} along axis {axis}, given an array of "
                    f"shape {x.shape}."
                )
            dims = (((1,), (axis,)), ((), ()))
            x = jax.lax.dot_general(a, x, dims, precision=jax.lax.Precision.HIGHEST)
            x = jnp.moveaxis(x, 0, axis)
        return x

    def _singular(self, ndim: int, pick: Callable[[Factor], Array]) -> Array:
        """The products of the factors' singular values, to broadcast against `[B, ...]`."""
        total = jnp.ones((1,) * ndim)
        for axis, factor in enumerate(self.factors, 1):
            if factor is not None:
                shape = [1] * ndim
                shape[axis] = -1
                total = total * pick(factor).reshape(shape)
        return total


@struct
class Flat(Linear):
    """A matrix on the flattened sample."""

    axes: Axes
    shape: tuple[int, ...] = static()

    def __call__(self, x: Array) -> Array:
        """`[B, ...]` -> `[B, m]`."""
        return self.axes(x.reshape(len(x), -1))

    def adjoint(self, y: Array) -> Array:
        """`[B, m]` -> `[B, ...]`."""
        return self.axes.adjoint(y).reshape(len(y), *self.shape)

    def solve(self, w: Array, r2: Array | float, s2: Array | float) -> Array:
        """On `[B, m]`."""
        return self.axes.solve(w, r2, s2)

    def filter(self, x: Array, f: Callable[[Array], Array]) -> Array:
        """On the flattened sample."""
        return self.axes.filter(x.reshape(len(x), -1), f).reshape(x.shape)


@struct
class Transposed(Linear):
    """Any linear function: what `linear` makes."""

    fn: Callable[[Array], Array] = static()
    shape: tuple[int, ...] = static()
    iterations: int = static()

    def __call__(self, x: Array) -> Array:
        """Calls the function."""
        return self.fn(x)

    def adjoint(self, y: Array) -> Array:
        """By transposing the function's program."""
        return jax.linear_transpose(self.fn, jax.ShapeDtypeStruct((len(y), *self.shape), y.dtype))(
            y
        )[0]

    def solve(self, w: Array, r2: Array | float, s2: Array | float) -> Array:
        """By conjugate gradients, so far as `iterations` go."""
        r2, s2 = (expand(jnp.asarray(a, w.dtype), w) for a in (r2, s2))
        gram = lambda w: r2 * self(self.adjoint(w)) + s2 * w
        solve = jax.scipy.sparse.linalg.cg
        return solve(gram, w, tol=1e-12, maxiter=self.iterations)[0]


@struct
class Function:
    """Any function: what `function` makes."""

    fn: Callable[[PyTree], PyTree] = static()
    inverse: Callable[[PyTree], PyTree] | None = static(None)

    def __call__(self, x: PyTree) -> PyTree:
        """Calls the function."""
        return self.fn(x)

    @property
    def pinv(self) -> Callable[[PyTree], PyTree]:
        """h+, with h(h+(h(x))) = h(x)."""
        if self.inverse is None:
            raise AttributeError("pinv")
        return self.inverse


def function(
    fn: Callable[[PyTree], PyTree], pinv: Callable[[PyTree], PyTree] | None = None
) -> Function:
    """Any function of x0 as an operator, differentiable for DPS; with `pinv` for PiGDM and DDNM.

    jit compiles anew for another function.
    """
    return Function(fn, pinv)


def as_operator(operator: Any) -> Any:
    """An operator as a pytree: a plain function is wrapped in `Function`.

    Raises:
      UserError: what is given cannot be called.
    """
    if not callable(operator):
        raise UserError(f"operator: a callable x0 -> y is needed, given {operator!r}.")
    return Function(operator) if jax.tree_util.all_leaves([operator]) else operator


def measurement(cond: PyTree, entry: str) -> tuple[PyTree, dict[str, PyTree]]:
    """(cond[entry], the rest of cond).

    Raises:
      UserError: there is no such entry.
    """
    rest = dict(cond or {})
    return rest.pop(choose("measurement: entry of cond", entry, rest)), rest


def residual(operator: Any, y: PyTree, x0: PyTree) -> PyTree:
    """y - A(x0).

    Raises:
      UserError: y does not have the shape that the operator makes.
    """
    made = operator(x0)
    shapes = [jax.tree.map(lambda a: a.shape, tree) for tree in (y, made)]
    if shapes[0] != shapes[1]:
        raise UserError(f"measurement: y has shape {shapes[0]}, the operator makes {shapes[1]}.")
    return jax.tree.map(lambda a, b: a - b, y, made)


def linear(fn: Callable[[Array], Array], shape: Sequence[int], iterations: int = 50) -> Transposed:
    """Any linear function `[B, *shape]` -> y as an operator; A^-1s by conjugate gradients.

    `pinv` is exact in the limit of many iterations, and needs no full rank.
    """
    return Transposed(fn, tuple(shape), iterations)


def mask(keep: Any) -> Mask:
    """Inpainting: y = keep x0. keep is 1 (True) where x0 is known, and broadcasts to `[B, ...]`.

    Raises:
      UserError: a value other than 0 and 1.
    """
    given = np.asarray(keep)
    if not np.isin(given, (0, 1)).all():
        raise UserError("mask: keep has values other than 0 and 1.")
    return Mask(jnp.asarray(given, bool))


def average_pool(factor: int, size: tuple[int, int]) -> Axes:
    """Super-resolution: means over factor x factor pixels of images `[B, H, W, C]`, size (H, W)."""
    for n in size:
        if n % factor:
            raise UserError(f"average_pool: factor={factor} does not divide size={size}.")
    pool = lambda n: np.kron(np.eye(n // factor), np.full((1, factor), 1.0 / factor))
    return axes(pool(size[0]), pool(size[1]), None)


def bicubic(factor: int, size: tuple[int, int]) -> Axes:
    """Super-resolution: bicubic downsampling with antialiasing (Keys' a = -1/2), size (H, W)."""
    for n in size:
        if n % factor:
            raise UserError(f"bicubic: factor={factor} does not divide size={size}.")
    return axes(_cubic(size[0], factor), _cubic(size[1], factor), None)


def blur(sigma: float, size: tuple[int, int], rcond: float = 1e-5) -> Axes:
    """Deblurring: Gaussian blur, sigma in pixels, weights that sum to 1 at the border too."""
    if not sigma > 0:
        raise UserError(f"blur: sigma={sigma} given; it must be positive.")

    def matrix(n: int) -> np.ndarray:
        gap = np.arange(n)[:, None] - np.arange(n)
        w = np.exp(-0.5 * (gap / sigma) ** 2)
        return w / w.sum(1, keepdims=True)

    return axes(matrix(size[0]), matrix(size[1]), None, rcond=rcond)


def grayscale(weights: Sequence[float] = (0.299, 0.587, 0.114)) -> Axes:
    """Colorisation: images `[B, H, W, C]` to their luminance `[B, H, W, 1]` (Rec. 601)."""
    return axes(None, None, np.asarray(weights)[None])


def axes(*matrices: Any, rcond: float = 1e-5) -> Axes:
    """One matrix `[m, n]` along each axis after the batch; None leaves an axis as it is.

    Singular values below rcond times the largest of their matrix count as 0.
    """
    return Axes(tuple(None if a is None else _factor(np.asarray(a), rcond) for a in matrices))


def matrix(a: Any, shape: Sequence[int], rcond: float = 1e-5) -> Flat:
    """y = a vec(x0), a `[m, n]`, for samples of this shape with n entries.

    Raises:
      UserError: the matrix does not fit the shape.
    """
    if np.ndim(a) != 2 or np.shape(a)[1] != np.prod(shape):
        raise UserError(f"matrix: a of shape {np.shape(a)} does not fit samples of {tuple(shape)}.")
    return Flat(axes(a, rcond=rcond), tuple(shape))


def _factor(a: np.ndarray, rcond: float) -> Factor:
    u, s, vt = np.linalg.svd(np.asarray(a, np.float64))
    s = np.where(s > rcond * s.max(), s, 0.0)
    pad = lambda n: np.pad(s, (0, n - len(s)))
    dtype = jnp.result_type(float)
    numbers = (a, u, vt.T, pad(len(a)), pad(a.shape[1]))
    return Factor(*(jnp.asarray(n, dtype) for n in numbers))


def _cubic(n: int, factor: int) -> np.ndarray:
    """Keys' cubic (1981), stretched by the factor, weights normalised where it leaves the image."""
    centre = (np.arange(n // factor) + 0.5) * factor - 0.5
    d = np.abs(np.arange(n) - centre[:, None]) / factor
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    w = np.where(d < 1, near, np.where(d < 2, far, 0.0))
    return w / w.sum(1, keepdims=True)
