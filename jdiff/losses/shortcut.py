"""Shortcut models: one large step equals two half steps (Frans et al. 2024, 2410.12557).

The network's s(x, t, d) is the mean velocity over a step of size d, so that x moves by d s. Most
samples of a batch learn the velocity (d = 0); one in `every` learns from the model itself, that a
step of 2 d is a step of d and another (section 3):

    s(x_t, t, 2 d) = s(x_t, t, d) / 2 + s(x', t', d) / 2,      x' = x_t after the first.

Here t grows with noise, so steps go down, and the step is told by its end, cond["s"] = t - d `[B]`;
models take it by `scalars=("t-s",)`, which embeds d. Sizes are 1, 1/2, ... of the whole way down
to 2^-levels, at which the model is asked for its velocity (d = 0) instead.
"""

import jax
import jax.numpy as jnp

from jdiff.denoisers import Network
from jdiff.distributions import Uniform
from jdiff.errors import UserError
from jdiff.losses.denoising import Distribution, normal
from jdiff.losses.distances import dimensions, squared
from jdiff.losses.meanflow import average_velocity, path_velocity
from jdiff.predictions import corrupt
from jdiff.pytree import Array, PyTree, batch_size, expand
from jdiff.schedules import Schedule, first
from jdiff.schedules.base import finite_data


def shortcut(
    key: Array, denoiser: Network, x0: PyTree, cond: PyTree = None, *, target: Network,
    every: int = 4, levels: int = 7, distribution: Distribution | None = None,
    eps: PyTree = None, dropout_key: Array | None = None,
) -> Array:  # fmt: skip
    """The shortcut loss: the squared error of velocities, mean over the dimensions.

    Args:
      key: the key of the times, the sizes and the noise.
      denoiser: the network, asked with cond["s"] `[B]`. Its schedule must be straight (see
        `solvers.flow_map`).
      x0: clean data, a tree of `[B, ...]`.
      cond: conditions `[B, ...]`.
      target: the same network with the weights that make the two half steps (the paper: averaged).
      every: one sample in so many learns from two half steps (the paper: 4).
      levels: the smallest half step is 2^-levels of the way (the paper: 7, 1/128).
      distribution: of the times at which the velocity is learned; uniform unless given.
      eps: the other endpoint; standard normal unless given.
      dropout_key: switches the network's dropout on, not that of the target.

    Returns:
      `[B]` losses.

    Raises:
      UserError: the batch is no multiple of `every`, `every` or levels is below 1, or the data
        lies at no finite t.
    """
    cond = {} if cond is None else cond
    key_t, key_step, key_eps = jax.random.split(key, 3)
    batch, schedule = batch_size(x0), denoiser.schedule
    finite_data("shortcut", first(schedule))
    if every < 1 or levels < 1 or batch % every:
        raise UserError(
            f"shortcut: every={every} and levels={levels} given; both are at least 1, and the "
            f"batch ({batch}) is a multiple of every."
        )
    # The samples 0, every, 2 every, ...: neighbours stay on their device.
    some = lambda a: a.reshape(-1, every, *a.shape[1:])[:, 0]
    chosen = jnp.arange(batch) % every == 0
    put = lambda few, all_: jnp.where(expand(chosen, all_), jnp.repeat(few, every, 0), all_)

    t_few, middle, end, smallest = _steps(key_step, batch // every, levels, first(schedule))
    t = put(t_few, (distribution or Uniform())(key_t, batch, first(schedule)))
    s = put(end, t)
    eps = normal(key_eps, x0) if eps is None else eps
    x = corrupt(schedule, x0, eps, t)

    x_few, cond_few = jax.tree.map(some, (x, cond))
    half = jax.lax.stop_gradient(half_steps(target, x_few, t_few, middle, end, cond_few, smallest))
    wanted = jax.tree.map(put, half, path_velocity(schedule, x0, eps, t))
    u = average_velocity(denoiser, x, t, s, cond, dropout_key)
    return squared(u, wanted) / dimensions(x0)


def half_steps(
    denoiser: Network, x: PyTree, t: Array, middle: Array, end: Array, cond: dict[str, PyTree],
    smallest: Array,
) -> PyTree:  # fmt: skip
    """The mean velocity of the steps from t to `middle` and from there to `end`, of equal size.

    Where `smallest` is true the steps are Euler's, with the velocity at their start.
    """
    one = average_velocity(denoiser, x, t, jnp.where(smallest, t, middle), cond)
    x = jax.tree.map(lambda x, u: x + expand(middle - t, x) * u, x, one)
    two = average_velocity(denoiser, x, middle, jnp.where(smallest, middle, end), cond)
    return jax.tree.map(lambda a, b: 0.5 * (a + b), one, two)


def _steps(
    key: Array, n: int, levels: int, schedule: Schedule
) -> tuple[Array, Array, Array, Array]:
    """n steps of random size on the grid of that size: (t, middle, end, is it the smallest)."""
    key_size, key_place = jax.random.split(key)
    level = jax.random.randint(key_size, (n,), 0, levels)
    size = jnp.exp2(-level.astype(jnp.result_type(float)))
    place = 1.0 + jnp.floor(jax.random.uniform(key_place, (n,)) / size)  # 1 .. 2^level
    at = lambda p: schedule.t_data + (schedule.t_max - schedule.t_data) * p * size
    return at(place), at(place - 0.5), at(place - 1.0), level == levels - 1
