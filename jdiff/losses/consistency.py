"""Consistency models: one x0 for all points of a trajectory (Song et al. 2023, 2303.01469).

f(x_t, t), the x0 that a denoiser predicts, learns to be the same at two neighbouring noise levels
of one trajectory, and is x itself at the lowest: it becomes the end of the trajectory, in one
evaluation. In training (`consistency`) the neighbours share their x0 and eps; in distillation
(`consistency_distillation`) a teacher's ODE step leads from one to the other. The levels are
Karras' (2022, equation 5) between the schedule's t_min and t_max; the lower neighbour's prediction,
by the `target` network, is held fixed. Sample with `solvers.consistency`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.denoisers import Network
from jdiff.errors import UserError
from jdiff.losses.denoising import Weighting, normal
from jdiff.losses.distances import dimensions, pseudo_huber, squared
from jdiff.noise import Fresh
from jdiff.predictions import corrupt
from jdiff.pytree import Array, PyTree, batch_size, expand, is_concrete
from jdiff.schedules import Schedule, first, schedule_map
from jdiff.solvers import Solver, heun

RHO = 7.0  # of Karras' levels, as in both papers


def consistency(
    key: Array, denoiser: Network, x0: PyTree, cond: PyTree = None, *, target: Network,
    step: Array, total: int, fewest: int = 10, most: int = 1280, mean: float | None = -1.1,
    std: float = 2.0, huber: float | None = 0.00054, weighting: Weighting | None = None,
    eps: PyTree = None, dropout_key: Array | None = None,
) -> Array:  # fmt: skip
    """Consistency training, with the choices of iCT (Song and Dhariwal 2023, 2310.14189) unless
    told otherwise.

    Song et al. (2023), algorithm 3: fewest = most, mean=None, an averaged target.

    Args:
      key: the key of the levels and the noise.
      denoiser: the network.
      x0: clean data, a tree of `[B, ...]`.
      cond: conditions `[B, ...]`.
      target: the network of the lower level: iCT's is the denoiser itself, its weights held fixed.
      step, total: how many training steps are done, and will be; for the curriculum.
      fewest, most: s_0 and s_1, the intervals between levels at the start and the end.
      mean, std: the interval is that in which a normal log(sigma / alpha) falls (iCT, table 1);
        mean=None: all intervals are as likely.
      huber: c / sqrt(d) of the pseudo-Huber distance; None: the mean squared error.
      weighting: of the distance; 1 / (difference of the levels) unless given (iCT's).
      eps: the other endpoint; standard normal unless given.
      dropout_key: switches dropout on, with the same masks in both networks.

    Returns:
      `[B]` losses.

    Raises:
      UserError: sigma / alpha is infinite at the schedule's t_max, or fewest above most.
    """
    if not 1 <= fewest <= most:
        raise UserError(f"consistency: fewest={fewest} and most={most}; 1 <= fewest <= most.")
    key_i, key_eps = jax.random.split(key)
    schedule, s = denoiser.schedule, first(denoiser.schedule)
    n = curriculum(step, total, fewest, most)
    i = interval(key_i, batch_size(x0), s, n, mean, std)
    low, high = level(s, i, n), level(s, i + 1, n)
    eps = normal(key_eps, x0) if eps is None else eps
    weight = weighting or (lambda s, t: 1.0 / (s.sigma_ratio(high) - s.sigma_ratio(low)))
    return weight(s, high) * _distance(
        denoiser, corrupt(schedule, x0, eps, high), high, target,
        corrupt(schedule, x0, eps, low), low, i == 1, cond, huber, dropout_key,
    )  # fmt: skip


def consistency_distillation(
    key: Array, denoiser: Network, x0: PyTree, cond: PyTree = None, *, teacher: Any,
    target: Network, solver: Solver | None = None, levels: int = 18,
    huber: float | None = 0.00054, weighting: Weighting | None = None, eps: PyTree = None,
    dropout_key: Array | None = None,
) -> Array:  # fmt: skip
    """Consistency distillation (Song et al. 2023, algorithm 2).

    Args:
      key: the key of the levels and the noise.
      denoiser: the student; with its teacher's weights to start from.
      x0: clean data, a tree of `[B, ...]`.
      cond: conditions `[B, ...]`.
      teacher: a denoiser, guided or not, on the student's schedule.
      target: the student with the weights that predict at the lower level (the paper: averaged).
      solver: of the teacher's step from one level to the next; `solvers.heun` unless given.
      levels: N.
      huber, weighting, eps, dropout_key: as in `consistency`; the weight is 1 unless given.

    Returns:
      `[B]` losses.

    Raises:
      UserError: sigma / alpha is infinite at the schedule's t_max, or fewer than 2 levels.
    """
    if levels < 2:
        raise UserError(f"consistency_distillation: levels={levels} given; at least 2 are needed.")
    key_i, key_eps, key_step = jax.random.split(key, 3)
    schedule, s, batch = denoiser.schedule, first(denoiser.schedule), batch_size(x0)
    i = interval(key_i, batch, s, levels - 1)
    low, high = level(s, i, levels - 1), level(s, i + 1, levels - 1)
    eps = normal(key_eps, x0) if eps is None else eps
    x = corrupt(schedule, x0, eps, high)
    keys = jax.random.split(key_step, batch)
    x_low = step_each(solver or heun(), teacher, schedule, x, high, low, cond, keys)
    weight = 1.0 if weighting is None else weighting(s, high)
    return weight * _distance(
        denoiser, x, high, target, x_low, low, i == 1, cond, huber, dropout_key
    )


def curriculum(step: Array, total: int, fewest: int, most: int) -> Array:
    """The number of intervals N(k) - 1 = min(s_0 2^floor(k / K'), s_1) (iCT, table 1).

    K' = floor(K / (log2 floor(s_1 / s_0) + 1)): it doubles at equal distances and ends at `most`.
    """
    stage = max(int(total / (math.log2(most // fewest) + 1)), 1)
    doubled = fewest * jnp.exp2(jnp.asarray(step // stage, jnp.float32))
    return jnp.minimum(doubled, most).astype(jnp.int32)


def level(schedule: Schedule, i: Array, n: Array | int) -> Array:
    """The time of level i of 1 .. n + 1, from t_min to t_max, evenly in (sigma / alpha)^(1 / 7).

    Raises:
      UserError: sigma / alpha is infinite at t_max.
    """
    low, high = _ends(schedule)
    ratio = (low + (i - 1) / n * (high - low)) ** RHO
    return schedule.time(-2.0 * jnp.log(ratio))


def interval(
    key: Array, batch: int, schedule: Schedule, n: Array | int, mean: float | None = None,
    std: float = 1.0,
) -> Array:  # fmt: skip
    """The number i of 1 .. n `[batch]` of the interval between the levels i and i + 1.

    With a mean, log(sigma / alpha) ~ N(mean, std^2), cut off at the outer levels, and i is where it
    falls: the discrete log-normal of iCT's table 1.
    """
    u = jax.random.uniform(key, (batch,))
    if mean is None:
        return 1 + jnp.floor(u * n).astype(jnp.int32)
    ends = _ends(schedule)
    low, high = (jax.scipy.stats.norm.cdf((RHO * jnp.log(e) - mean) / std) for e in ends)
    z = jax.scipy.special.ndtri(low + u * (high - low))
    place = (jnp.exp((mean + std * z) / RHO) - ends[0]) / (ends[1] - ends[0])
    return 1 + jnp.clip(jnp.floor(place * n), 0, n - 1).astype(jnp.int32)


def step_each(
    solver: Solver, denoise: Any, schedule: PyTree, x: PyTree, t: Array, s: Array, cond: PyTree,
    keys: Array,
) -> PyTree:  # fmt: skip
    """One step of any solver from t `[B]` to s `[B]`, each sample at its own times."""

    def one(x: PyTree, t: Array, s: Array, cond: PyTree, key: Array) -> PyTree:
        x, cond = jax.tree.map(lambda a: a[None], (x, cond))
        memory = solver.init(x, jnp.stack([t, s]))
        noise = Fresh().at(key[None], 0)
        x = solver.step(denoise, schedule, x, memory, t, s, noise, cond)[0]
        return jax.tree.map(lambda a: a[0], x)

    return jax.vmap(one)(x, t, s, cond, keys)


def _distance(
    denoiser: Network, x: PyTree, t: Array, target: Network, x_low: PyTree, low: Array,
    lowest: Array, cond: PyTree, huber: float | None, dropout_key: Array | None,
) -> Array:  # fmt: skip
    """d(f(x, t), f_target(x_low, low)) `[B]`; where `low` is the lowest level, f is x / alpha."""
    ours = denoiser(x, t, cond, dropout_key).x0
    theirs = target(x_low, low, cond, dropout_key).x0

    # The boundary condition f(x, t_min) = x is imposed here, whatever the parameterisation.
    def bounded(s: Schedule, x: Array, x0: Array) -> Array:
        return jnp.where(expand(lowest, x), x / expand(s.alpha(low), x), x0)

    theirs = jax.lax.stop_gradient(schedule_map(bounded, target.schedule, x_low, theirs))
    if huber is None:
        return squared(ours, theirs) / dimensions(ours)
    return pseudo_huber(ours, theirs, huber)


def _ends(schedule: Schedule) -> tuple[Array, Array]:
    """(sigma / alpha)^(1 / 7) at t_min and t_max."""
    low, high = (
        schedule.sigma_ratio(jnp.asarray(t, jnp.result_type(float)))
        for t in (schedule.t_min, schedule.t_max)
    )
    if is_concrete(high) and not jnp.isfinite(high):
        raise UserError(
            f"consistency: sigma / alpha of {type(schedule).__name__} is infinite at its t_max; "
            "its levels need a finite one, as that of edm."
        )
    return low ** (1.0 / RHO), high ** (1.0 / RHO)
