"""Denoising and flow matching: the squared error of one network output.

A loss is the squared error of the network's own output, times a weight. The parameterisation says
what the output is, the weighting what an error counts (see `weightings`), the distribution which
times are seen; a new paper is another choice of the three.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jdiff import weightings
from jdiff.denoisers import Network
from jdiff.distributions import Uniform
from jdiff.predictions import corrupt
from jdiff.pytree import Array, PyTree, batch_size
from jdiff.schedules import Schedule, first, schedule_map

Weighting = Callable[[Schedule, Array], Array]
Distribution = Callable[[Array, int, Schedule], Array]


def denoising(
    key: Array, denoiser: Network, x0: PyTree, cond: PyTree = None, *,
    distribution: Distribution | None = None, weighting: Weighting | None = None,
    eps: PyTree = None, dropout_key: Array | None = None,
) -> Array:  # fmt: skip
    """The denoising loss w(t) ||x0 - x0_hat||^2 / d, through the network's own output.

    A learned variance is left out of it: that is `hybrid`.

    Args:
      key: the key of the times and the noise.
      denoiser: a `denoisers.Network`.
      x0: clean data, a tree of `[B, ...]`.
      cond: conditions for the network, `[B, ...]`.
      distribution: of the times; uniform on the schedule's domain unless given.
      weighting: the weight of the squared error in x0; the network's own unweighted squared error
        unless given (so "eps" without a weighting is L_simple, "edm" is EDM's loss).
      eps: the other endpoint, like x0; standard normal noise unless given (a coupling gives it).
      dropout_key: switches the network's dropout on.

    Returns:
      `[B]` float32 losses; with trees, the mean over all dimensions of all leaves.
    """
    cond = {} if cond is None else cond
    key_t, key_eps = jax.random.split(key)
    schedule, row = denoiser.schedule, denoiser.parameterization
    t = (distribution or Uniform())(key_t, batch_size(x0), first(schedule))
    if eps is None:
        eps = normal(key_eps, x0)
    x = corrupt(schedule, x0, eps, t)
    output, _ = row.split(denoiser.output(x, t, cond, dropout_key))
    return output_error(denoiser, output, x0, eps, t, weighting)


def output_error(
    denoiser: Network, output: PyTree, x0: PyTree, eps: PyTree, t: Array,
    weighting: Weighting | None = None,
) -> Array:  # fmt: skip
    """The mean squared error `[B]` of a network's output F, its weight given in x0 or none."""
    schedule, row, batch = denoiser.schedule, denoiser.parameterization, batch_size(x0)
    target = row.target_of(schedule, x0, eps, t)

    def squared(s: Schedule, output: Array, target: Array) -> tuple[Array, int]:
        error = jnp.square(output.astype(target.dtype) - target).reshape(batch, -1)
        weight = 1.0
        if weighting is not None:  # an error e in F is an error -sigma e / det in x0
            to_x0 = s.sigma(t) / row.determinant(s, t)
            weight = weighting(s, t) * jnp.square(to_x0)
        return weight * error.sum(1), error.shape[1]

    terms = schedule_map(squared, schedule, output, target)
    sums, sizes = zip(*jax.tree.leaves(terms, is_leaf=lambda p: isinstance(p, tuple)))
    return sum(sums) / sum(sizes)


def flow_matching(
    key: Array, denoiser: Network, x0: PyTree, cond: PyTree = None, *,
    distribution: Distribution | None = None, eps: PyTree = None, dropout_key: Array | None = None,
) -> Array:  # fmt: skip
    """The flow-matching loss ||u - u_hat||^2 / d of the velocity u = alpha' x0 + sigma' eps.

    `denoising` with the velocity's weighting, so any parameterisation can be trained with it
    (Lipman et al. 2023, equation 14). `eps` may be data of another distribution.
    """
    return denoising(
        key, denoiser, x0, cond, distribution=distribution, weighting=weightings.velocity(),
        eps=eps, dropout_key=dropout_key,
    )  # fmt: skip


def normal(key: Array, like: PyTree) -> PyTree:
    """Standard normal noise of the shapes of `like`, in jax's default float dtype."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        [jax.random.normal(k, a.shape, jnp.result_type(float)) for k, a in zip(keys, leaves)]
    )
