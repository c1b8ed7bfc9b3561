"""The randomness of a solver's step: which noise it draws, not how it uses it.

A solver asks for the noise of an interval of time (`between`) or for noise that belongs to none
(`free`). `sample(..., noise=...)` decides where it comes from: `fresh()` draws anew at each step,
`brownian(schedule)` takes the increments of one Brownian path a sample, whatever the grid.
Every sample has its own key, so that its noise depends on neither the batch nor the devices.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.pytree import Array, PyTree, noise_like, static, struct
from jdiff.schedules import Schedule, is_schedule, schedule_map

_PARTS, _FREE = 1 << 16, 1 << 17  # apart from the indices of leaves that noise_like folds in
_PATH = (1 << 31) - 1  # apart from the numbers of steps
_WIDEST = 40.0  # of the log SNR: beyond it one of alpha and sigma is below exp(-20)


class Noise:
    """What a solver draws from. `at` binds it to a batch of samples and a step."""

    def at(self, keys: Array, step: Array | int) -> "Noise":
        """The noise of step number `step` for samples with these keys `[B]`."""
        raise NotImplementedError  # abstract

    def between(self, x: PyTree, t: Array, s: Array, part: int = 0) -> PyTree:
        """Standard normal, like x: the path's increment from t to s over its deviation.

        The intervals that one step asks for must be disjoint and numbered by `part`.
        """
        raise NotImplementedError  # abstract

    def free(self, x: PyTree, i: int = 0) -> PyTree:
        """Standard normal, like x: the step's i-th draw that belongs to no interval."""
        raise NotImplementedError  # abstract


@struct
class Fresh(Noise):
    """Independent draws at every step."""

    keys: Array | None = None  # [B], of this step

    def at(self, keys: Array, step: Array | int) -> "Fresh":
        """Keys of the samples `[B]`, folded with the step."""
        return Fresh(jax.vmap(jax.random.fold_in, (0, None))(keys, step))

    def between(self, x: PyTree, t: Array, s: Array, part: int = 0) -> PyTree:
        """A draw for each `part`; the times do not matter."""
        return noise_like(self._fold(_PARTS + part) if part else self.keys, x)

    def free(self, x: PyTree, i: int = 0) -> PyTree:
        """A draw for each i."""
        return noise_like(self._fold(_FREE + i), x)

    def _fold(self, number: int) -> Array:
        return jax.vmap(jax.random.fold_in, (0, None))(self.keys, number)


def fresh() -> Fresh:
    """New noise at every step: what `sample` uses unless told otherwise."""
    return Fresh()


@struct
class Brownian(Noise):
    """One Brownian motion W a sample, of the clock Q = SNR = (alpha / sigma)^2.

    With x0 known, Q x_t / alpha = Q x0 + W(Q): the reverse process observes x0 in the noise of W,
    and the posterior q(x_s | x_t, x0) draws W's increment. So a sampler of posteriors (`ddpm`) that
    is told one x0 throughout makes the same sample on every grid, and one whose x0 changes makes
    samples that converge, path by path, as the grid is refined.

    Nothing is stored. V = W(Q) / sqrt(Q) is stationary in log Q, so any point is found by bisection
    of the log SNR between the bounds -40 and 40 (beyond which W is not told apart), each midpoint
    drawn given the two ends around it, from a key that names the interval (Brownian bridges on a
    virtual tree: Li et al. 2020, 2001.01328; Kidger et al. 2021, 2105.13493).

    Attributes:
      schedule: a schedule or a prefix tree of them, whose log SNR is the clock.
      depth: how often the axis is halved. Increments between times in different intervals of
        80 / 2^depth are exactly those of W; within one, the path is a smooth curve.
      path: `[B]` keys of the paths.
      fresh: for the noise of no interval.
    """

    schedule: PyTree
    depth: int = static(18)
    path: Array | None = None
    fresh: Fresh = Fresh()

    def at(self, keys: Array, step: Array | int) -> "Brownian":
        """The path is that of the keys `[B]`, at every step; other noise is folded with it."""
        path = jax.vmap(jax.random.fold_in, (0, None))(keys, _PATH)
        return Brownian(self.schedule, self.depth, path, self.fresh.at(keys, step))

    def between(self, x: PyTree, t: Array, s: Array, part: int = 0) -> PyTree:
        """(W(Q_s) - W(Q_t)) / sqrt(Q_s - Q_t), and 0 for Q_s = Q_t; `part` does not matter."""
        where, treedef = jax.tree.flatten(x)
        leaves = treedef.unflatten(list(range(len(where))))  # each leaf has a path of its own

        def increment(sched: Schedule, x: Array, leaf: int) -> Array:
            q_t, q_s = (jnp.clip(sched.logsnr(a), -_WIDEST, _WIDEST) for a in (t, s))
            keys = jax.vmap(jax.random.fold_in, (0, None))(self.path, leaf)
            v_t, v_s = (jax.vmap(self._point, (0, None, None))(keys, q, x) for q in (q_t, q_s))
            spread = jnp.sqrt(-jnp.expm1(q_t - q_s))
            gap = v_s - jnp.exp(0.5 * (q_t - q_s)) * v_t
            z = jnp.where(spread == 0, 0.0, gap / jnp.where(spread == 0, 1.0, spread))
            return z.astype(x.dtype)

        return schedule_map(increment, self.schedule, x, leaves)

    def free(self, x: PyTree, i: int = 0) -> PyTree:
        """Drawn anew for each step and i."""
        return self.fresh.free(x, i)

    def _point(self, key: Array, q: Array, x: Array) -> Array:
        """V at log SNR q of one sample: an array of x's shape without the batch."""
        dtype = jnp.promote_types(x.dtype, q.dtype)
        draw = lambda node: jax.random.normal(jax.random.fold_in(key, node), x.shape[1:], dtype)
        end = jnp.asarray(_WIDEST, q.dtype)
        # Nodes are numbered as in a heap: 0 is not one of them, nor any below the last row.
        v_low = draw(0)
        v_high = _towards(end, v_low, -end, draw((1 << (self.depth + 1)) + 1))

        def halve(_: int, carry: tuple) -> tuple:
            low, high, v_low, v_high, node = carry
            middle = 0.5 * (low + high)
            v = _bridge(middle, low, high, v_low, v_high, draw(node))
            right = q >= middle
            pick = lambda a, b: jnp.where(right, a, b)
            return (
                pick(middle, low), pick(high, middle), pick(v, v_low), pick(v_high, v),
                2 * node + right.astype(node.dtype),
            )  # fmt: skip

        start = (-end, end, v_low, v_high, jnp.asarray(1, jnp.uint32))
        low, high, v_low, v_high, node = jax.lax.fori_loop(0, self.depth, halve, start)
        return _bridge(q, low, high, v_low, v_high, draw(node))


def brownian(schedule: PyTree, depth: int = 18) -> Brownian:
    """Noise that is consistent under refinement of the grid: one Brownian path a sample.

    Give it the schedule of the denoiser. The path depends on the sample's key and the log SNR
    alone, so schedules share it. A step costs 2 (depth + 3) draws in place of one, and no memory.

    Args:
      schedule: a schedule or a prefix tree of x with schedules as leaves.
      depth: the axis of the log SNR is resolved to 80 / 2^depth: 3e-4 for 18. A finer one is as
        rough as float32's rounding of the times.

    Raises:
      UserError: no schedule, or a depth outside 1 to 29.

    >>> sample(key, denoise, times=times, solver=solvers.dpmpp_sde(), noise=brownian(schedule))
    """
    found = jax.tree.leaves(schedule, is_leaf=is_schedule)
    if not found or not all(map(is_schedule, found)):
        raise UserError(f"brownian: schedule: a Schedule (or a tree of them), given {schedule!r}.")
    if not 1 <= depth <= 29:
        raise UserError(f"brownian: depth={depth} given; allowed are 1 to 29.")
    return Brownian(schedule, depth)


def _towards(q: Array, v: Array, at: Array, z: Any) -> Array:
    """V at q given V = v at `at` below it: their correlation is exp(-(q - at) / 2)."""
    return jnp.exp(0.5 * (at - q)) * v + jnp.sqrt(-jnp.expm1(at - q)) * z


def _bridge(q: Array, low: Array, high: Array, v_low: Array, v_high: Array, z: Array) -> Array:
    """V at q in [low, high] given both ends."""
    below, above, whole = (-jnp.expm1(-gap) for gap in (q - low, high - q, high - low))
    mean = (
        jnp.exp(0.5 * (low - q)) * above * v_low + jnp.exp(0.5 * (q - high)) * below * v_high
    ) / whole
    return mean + jnp.sqrt(jnp.maximum(below * above / whole, 0.0)) * z
