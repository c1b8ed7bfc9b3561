"""The losses of a path between two endpoints: its velocity, and its latent noise.

Both regress a network's own output on what is known of one pair of endpoints; the minimum is the
conditional mean that a sampler needs (`jdiff.interpolants`, whose paths these losses train:
conditional flow matching, stochastic interpolants, Schroedinger bridges). Given the same key, both
see the same times, points and latent noise, so two networks can learn from one draw.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdiff import interpolants
from jdiff.denoisers import Network
from jdiff.distributions import Uniform
from jdiff.errors import UserError, call
from jdiff.interpolants import Interpolant
from jdiff.losses.denoising import Distribution, normal
from jdiff.pytree import Array, PyTree, batch_size

#: A path, or what a config says of it.
Path = Interpolant | Mapping[str, Any] | None


class Draw(NamedTuple):
    """A batch of points on a path, and what is known of them.

    Attributes:
      t: the times `[B]`.
      x: the points x_t.
      velocity: dx_t/dt given the endpoints and z.
      z: the latent noise.
    """

    t: Array
    x: PyTree
    velocity: PyTree
    z: PyTree


def draw(
    key: Array, path: Interpolant, x0: PyTree, x1: PyTree, distribution: Distribution | None = None
) -> Draw:
    """Points of the path between coupled endpoints, at times of the distribution."""
    key_t, key_z = jax.random.split(key)
    t = (distribution or Uniform())(key_t, batch_size(x0), path.schedule)
    z = normal(key_z, x0)
    return Draw(t, path.position(x0, x1, z, t), path.velocity(x0, x1, z, t), z)


def conditional_flow(
    key: Array, denoiser: Network, x0: PyTree, cond: PyTree = None, *, path: Path = None,
    distribution: Distribution | None = None, eps: PyTree = None, dropout_key: Array | None = None,
) -> Array:  # fmt: skip
    """The conditional flow matching loss ||F - dx_t/dt||^2 / d (Tong et al. 2024, 2302.00482).

    Without latent noise this is `flow_matching`, but for the order of the draws.

    Args:
      key: the key of the times, of the latent noise, and of the other endpoint.
      denoiser: a network whose target is "velocity".
      x0: data, a tree of `[B, ...]`.
      cond: conditions for the network, `[B, ...]`.
      path: an `Interpolant`, or its name and numbers as configs give them, e.g.
        {"name": "bridge", "scale": 0.5}; straight without latent noise unless given.
      distribution: of the times; uniform on the path's [0, 1] unless given.
      eps: the other endpoint, like x0, coupled as it stands; standard normal noise unless given.
      dropout_key: switches the network's dropout on.

    Returns:
      `[B]` losses; with trees, the mean over all dimensions of all leaves.

    Raises:
      UserError: a network that predicts something else.
    """
    target_is(denoiser, "velocity", "conditional_flow")
    found = _drawn(key, _path(path), x0, eps, distribution)
    return _regression(denoiser, found, found.velocity, cond, dropout_key)


def latent_noise(
    key: Array, denoiser: Network, x0: PyTree, cond: PyTree = None, *, path: Path = None,
    distribution: Distribution | None = None, eps: PyTree = None, dropout_key: Array | None = None,
) -> Array:  # fmt: skip
    """The latent noise's loss ||F - z||^2 / d (Albergo et al. 2023, section 2).

    It is the score's, weighted by gamma^2 (in SF2M by lambda(t): Tong et al. 2023, 2307.03672): the
    score is -F / gamma (`Interpolant.score`).

    Args:
      denoiser: a network whose target is "eps"; its output is E[z | x_t], not an endpoint.

    The rest as in `conditional_flow`.

    Raises:
      UserError: a network that predicts something else, or a path without latent noise.
    """
    target_is(denoiser, "eps", "latent_noise")
    path = _path(path)
    if path.level is None:
        raise UserError("latent_noise: path has no latent noise; give one with a scale above 0.")
    found = _drawn(key, path, x0, eps, distribution)
    return _regression(denoiser, found, found.z, cond, dropout_key)


def target_is(denoiser: Network, target: str, where: str) -> None:
    """Raises a UserError unless that is what the network predicts."""
    given = denoiser.parameterization.target
    if given != target:
        raise UserError(f"{where}: the network predicts {given!r}; {target!r} is needed.")


def _path(path: Path) -> Interpolant:
    if isinstance(path, Interpolant):
        return path
    return call("path", interpolants.BY_NAME, {"name": "straight"} if path is None else path)


def _drawn(
    key: Array, path: Interpolant, x0: PyTree, eps: PyTree, distribution: Distribution | None
) -> Draw:
    key_path, key_eps = jax.random.split(key)
    return draw(key_path, path, x0, normal(key_eps, x0) if eps is None else eps, distribution)


def _regression(
    denoiser: Network, found: Draw, target: PyTree, cond: PyTree, dropout_key: Array | None
) -> Array:
    """The mean square over all dimensions of all leaves `[B]`."""
    output = denoiser.output(found.x, found.t, {} if cond is None else cond, dropout_key)

    def squared(output: Array, target: Array) -> Array:
        return jnp.square(output.astype(target.dtype) - target).reshape(len(target), -1)

    errors = jax.tree.leaves(jax.tree.map(squared, output, target))
    return sum(e.sum(1) for e in errors) / sum(e.shape[1] for e in errors)
