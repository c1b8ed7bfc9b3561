"""Denoisers: callables (x_t, t `[B]`, cond) -> Prediction(x0, eps), the currency of jdiff.

A denoiser is a pytree and callable: weights, means and null conditions are leaves, structure is
static, so jit takes a denoiser as an argument. Here are those that start from something else: a
network (`network`), the exact posterior mean of a data set (`exact`) or of a Gaussian mixture
(`mixture`), or a plain function (`function`). Guidance maps denoisers to denoisers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.predictions import Parameterization, Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, expand, static, struct
from jdiff.schedules import Schedule, schedule_map


@struct
class Network:
    """A network and its parameterisation as a denoiser.

    Attributes:
      params: the weights, a tree of arrays.
      schedule: the schedule it was trained on.
      parameterization: what it predicts and how it is fed.
      apply: `apply(params, x, c_noise, cond, key)` -> F like x; hashable; key=None: no dropout.
    """

    params: PyTree
    schedule: PyTree
    parameterization: Parameterization
    apply: Callable[..., PyTree] = static()

    def output(self, x: PyTree, t: Array, cond: PyTree, key: Array | None = None) -> PyTree:
        """The network's own output F at x_t = x, in the parameterisation's target space."""
        t = broadcast_time(t, x)
        scaled = self.parameterization.scale_input(self.schedule, x, t)
        c_noise = self.parameterization.condition_time(self.schedule, t)
        return self.apply(self.params, scaled, c_noise, cond, key)

    def __call__(
        self, x: PyTree, t: Array, cond: PyTree = None, key: Array | None = None
    ) -> Prediction:
        """x `[B, ...]` at times t `[B]` -> both endpoints. A key switches dropout on."""
        t = broadcast_time(t, x)
        output = self.output(x, t, {} if cond is None else cond, key)
        return self.parameterization.prediction(self.schedule, output, x, t)


def network(
    apply: Callable[..., PyTree],
    params: PyTree,
    schedule: PyTree,
    parameterization: Parameterization,
) -> Network:
    """A denoiser from `apply(params, x, c_noise, cond, key) -> F` and its weights.

    `apply` must be hashable and the same object (or equal) for the same structure: jit compiles
    once for each.
    """
    return Network(params, schedule, parameterization, apply)


@struct
class Function:
    """A plain function as a denoiser; jit recompiles when the function's identity changes."""

    schedule: PyTree
    fn: Callable[..., Prediction] = static()

    def __call__(self, x: PyTree, t: Array, cond: PyTree = None) -> Prediction:
        """Calls the function."""
        return self.fn(x, t, cond)


def function(fn: Callable[..., Prediction], schedule: PyTree = None) -> Function:
    """A denoiser from a plain function (x, t `[B]`, cond) -> Prediction."""
    return Function(schedule, fn)


@struct
class Mixture:
    """The exact denoiser of a Gaussian mixture; with variance 0, of a data set.

    Given x = alpha y + sigma eps and y from component k with mean m_k and variance v_k,

        r_k ~ w_k N(x; alpha m_k, alpha^2 v_k + sigma^2)                      (responsibilities)
        E[eps | x, k] = sigma (x - alpha m_k) / (alpha^2 v_k + sigma^2)
        E[x0 | x, k] = m_k + alpha v_k (x - alpha m_k) / (alpha^2 v_k + sigma^2)

    and the posterior means are their averages under r. Components are streamed in chunks with a
    running maximum, so memory is `[B, chunk]` and not `[B, N]`; distances are sums of squared
    differences (expanding the square loses all digits when sigma is small).

    Attributes:
      means: `[N, ...]`, a tree like x; N is padded to a multiple of the chunk.
      variances: `[N]`, per component; the same for every dimension and leaf.
      log_weights: `[N]`; -inf for padding.
      labels: `[N]` int32, or None.
      null: the label that stands for the whole set.
      schedule: a schedule or a prefix tree of them.
      chunk: components at a time.
    """

    means: PyTree
    variances: Array
    log_weights: Array
    labels: Array | None
    null: int | Array
    schedule: PyTree
    chunk: int = static()

    def __call__(self, x: PyTree, t: Array, cond: PyTree = None) -> Prediction:
        """x `[B, ...]`, t `[B]`; cond may hold "label" `[B]`. A label of no component gives NaN."""
        _, total, x0, eps = self._stream(x, t, cond)
        return Prediction(*jax.tree.map(lambda a: a / expand(total, a), (x0, eps)))

    def log_density(self, x: PyTree, t: Array, cond: PyTree = None) -> Array:
        """log p_t(x) `[B]` of the noised mixture, in nats."""
        biggest, total, _, _ = self._stream(x, t, cond)
        selected = jax.vmap(jax.nn.logsumexp)(self._selection(cond, len(biggest)))
        return biggest + jnp.log(total) - selected

    def _selection(self, cond: PyTree, batch: int) -> Array:
        """`[B, N]` log weights: those of the components that a sample's label selects."""
        log_w = jnp.broadcast_to(self.log_weights, (batch, len(self.log_weights)))
        if self.labels is None or not cond or "label" not in cond:
            return log_w
        wanted = jnp.asarray(cond["label"])[:, None]
        return jnp.where((wanted == self.null) | (wanted == self.labels), log_w, -jnp.inf)

    def _stream(self, x: PyTree, t: Array, cond: PyTree) -> tuple[Array, Array, PyTree, PyTree]:
        """Sums over the components: max log term, sum of exp(term - max), weighted x0 and eps."""
        dtype = jnp.result_type(self.log_weights, *jax.tree.leaves(x))
        x = jax.tree.map(lambda a: a.astype(dtype), x)
        t = broadcast_time(t, x)
        batch, n = len(t), len(self.log_weights)
        chunks = n // self.chunk
        split = lambda a: a.reshape(chunks, self.chunk, *a.shape[1:])
        log_w = self._selection(cond, batch).reshape(batch, chunks, self.chunk).swapaxes(0, 1)

        def chunk_terms(mean: PyTree, v: Array) -> tuple[Array, PyTree, PyTree]:
            """Log likelihood `[B, C]` and per-leaf coefficients of one chunk of components."""

            def leaf(s: Schedule, x: Array, m: Array) -> Array:
                alpha, sigma = s.alpha(t), s.sigma(t)
                spread = alpha[:, None] ** 2 * v + sigma[:, None] ** 2
                gap = x[:, None] - expand(alpha, m[None]) * m
                square = jnp.sum(jnp.square(gap), axis=tuple(range(2, gap.ndim)))
                size = m[0].size
                return -0.5 * (square / spread + size * jnp.log(2 * jnp.pi * spread))

            logp = schedule_map(leaf, self.schedule, x, mean)
            return sum(jax.tree.leaves(logp))

        def add(carry: tuple, inputs: tuple) -> tuple:
            biggest, total, x0, eps = carry
            mean, v, log_w = inputs
            term = chunk_terms(mean, v) + log_w
            new = jnp.maximum(biggest, term.max(1))
            pivot = jnp.where(jnp.isfinite(new), new, 0.0)  # no component selected so far
            keep, r = jnp.exp(biggest - pivot), jnp.exp(term - pivot[:, None])

            def accumulate(s: Schedule, x: Array, m: Array, x0: Array, eps: Array) -> tuple:
                alpha, sigma = s.alpha(t)[:, None], s.sigma(t)[:, None]
                shrink = r / (alpha**2 * v + sigma**2)  # [B, C]
                dims = ((1,), (0,))
                dot = lambda w: jax.lax.dot_general(
                    w, m, (dims, ((), ())), precision=jax.lax.Precision.HIGHEST
                )
                mine = lambda w: expand(w.sum(1), x) * x
                x0_sum = dot(r - alpha**2 * v * shrink) + mine(alpha * v * shrink)
                eps_sum = mine(sigma * shrink) - dot(sigma * alpha * shrink)
                return expand(keep, x0) * x0 + x0_sum, expand(keep, eps) * eps + eps_sum

            both = schedule_map(accumulate, self.schedule, x, mean, x0, eps)
            is_pair = lambda p: isinstance(p, tuple)
            x0, eps = (jax.tree.map(lambda p, i=i: p[i], both, is_leaf=is_pair) for i in (0, 1))
            return (new, keep * total + r.sum(1), x0, eps), None

        zeros = jax.tree.map(jnp.zeros_like, x)
        start = (jnp.full(batch, -jnp.inf, dtype), jnp.zeros(batch, dtype), zeros, zeros)
        xs = (jax.tree.map(split, self.means), split(self.variances), log_w)
        return jax.lax.scan(add, start, xs)[0]


def exact(
    images: PyTree, schedule: PyTree, labels: Array | None = None, null: int | None = None,
    chunk: int = 1024,
) -> Mixture:  # fmt: skip
    """The MMSE denoiser of a data set: nothing is trained (EDM, appendix B.3).

    Sampling with it returns the data set's own images. With `labels`, cond={"label": `[B]`} selects
    the images of that label; the label `null` (one above the largest unless given) selects all.

    Args:
      images: `[N, ...]` floats, or a tree of them with one N.
      labels: `[N]` integers.
      chunk: images at a time; `[B, chunk]` distances and one chunk of images are in memory.

    Raises:
      UserError: leaves with different N, labels of another length, or integer images.
    """
    return mixture(images, 0.0, schedule, labels=labels, null=null, chunk=chunk)


def mixture(
    means: PyTree, variances: Array | float, schedule: PyTree, *, weights: Array | None = None,
    labels: Array | None = None, null: int | None = None, chunk: int = 1024,
) -> Mixture:  # fmt: skip
    """The exact denoiser of sum_k w_k N(mean_k, variance_k I), by label too (see `exact`).

    Args:
      means: `[K, ...]`, or a tree of them.
      variances: a number, or `[K]`.
      weights: `[K]`, positive; uniform if not given, and need not sum to one.
    """
    leaves = jax.tree.leaves(means)
    n = len(leaves[0])
    for path, leaf in jax.tree_util.tree_leaves_with_path(means):
        name = jax.tree_util.keystr(path) or "images"
        if len(leaf) != n:
            raise UserError(f"{name} has {len(leaf)} entries, the first leaf {n}.")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise UserError(
                f"{name} is {leaf.dtype}; floats are needed (images: x / 127.5 - 1, in [-1, 1])."
            )
    if labels is not None and len(labels) != n:
        raise UserError(f"labels has {len(labels)} entries for {n} images.")
    if labels is not None and null is None:
        null = int(jnp.max(jnp.asarray(labels))) + 1
    dtype = jnp.result_type(float)
    log_w = jnp.zeros(n, dtype) if weights is None else jnp.log(jnp.asarray(weights, dtype))
    chunk = min(chunk, n)

    def pad(a: Any, value: Any) -> Array:
        return jnp.pad(
            jnp.asarray(a), ((0, -n % chunk),) + ((0, 0),) * (jnp.ndim(a) - 1),
            constant_values=value,
        )  # fmt: skip

    return Mixture(
        means=jax.tree.map(lambda m: pad(m, 0), means),
        variances=pad(jnp.broadcast_to(jnp.asarray(variances, dtype), (n,)), 1),
        log_weights=pad(log_w, -jnp.inf),
        labels=None if labels is None else pad(jnp.asarray(labels, jnp.int32), -1),
        null=-2 if null is None else null,
        schedule=schedule,
        chunk=chunk,
    )


def as_denoiser(denoise: Any) -> Any:
    """A denoiser as a pytree: a plain function is wrapped in `Function`, a pytree returned as is.

    Raises:
      UserError: what is given cannot be called.
    """
    if not callable(denoise):
        raise UserError(f"denoiser: a callable (x, t, cond) is needed, given {type(denoise)}.")
    return function(denoise) if jax.tree_util.all_leaves([denoise]) else denoise


def schedule_of(denoise: Any, given: PyTree = None, where: str = "sample") -> PyTree:
    """`given`, or else the denoiser's own schedule.

    Raises:
      UserError: neither is there.
    """
    schedule = getattr(denoise, "schedule", None) if given is None else given
    if schedule is None:
        raise UserError(f"{where}: the denoiser carries no schedule; pass schedule=...")
    return schedule
