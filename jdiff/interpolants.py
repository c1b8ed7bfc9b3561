"""Paths between two endpoints of any kind: x_t = alpha(t) x0 + sigma(t) x1 + gamma(t) z.

A schedule alone is a path from data to noise. Here the other endpoint x1 (`eps` in a loss) may be
data of another distribution, coupled to x0 in any way (`couplings`), and a latent noise z of level
gamma smooths between them (Albergo, Boffi and Vanden-Eijnden 2023, 2303.08797, section 2). Two
conditional means carry all that a sampler needs, the velocity and the denoiser of the latent noise:

    b(x, t)   = E[alpha' x0 + sigma' x1 + gamma' z | x_t = x]
    eta(x, t) = E[z | x_t = x]

The score is -eta / gamma, and for any diffusion e(t) >= 0 both of these have the path's marginals:

    dx = b dt                                     (an ODE)
    dx = (b - e score) dt + sqrt(2 e) dw          (an SDE, backwards from t = 1)

`losses.conditional_flow` trains b, `losses.latent_noise` eta. A network of b is a "velocity"
network of the rectified flow for every solver of `sample` (with x= the other endpoint), and with
one of eta `solvers.interpolant_sde` draws from the SDE.

    name            alpha, sigma                  gamma              with a coupling
    straight        1 - t, t                      s                  I-CFM; `ot`: OT-CFM
    target          1 - t, s + (1 - s) t          0                  Lipman et al.'s FM, to noise
    bridge          1 - t, t                      s sqrt(t (1 - t))  `sinkhorn(2 s^2)`: SB-CFM
    trigonometric   cos(pi t / 2), sin(pi t / 2)  0                  VP-CFM

t = 1 is x1 as everywhere in jdiff; the papers' time is 1 - t, and their velocity minus ours.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jdiff.errors import UserError, positive
from jdiff.pytree import Array, PyTree, expand, struct
from jdiff.schedules import RectifiedFlow, Schedule, gvp, rectified_flow

#: gamma(t): the latent noise's level; any shape.
Level = Callable[[Array], Array]


@struct
class Constant:
    """gamma = scale: endpoints blurred by it."""

    scale: Array | float

    def __call__(self, t: Array) -> Array:
        """The level at t."""
        return self.scale * jnp.ones_like(t)


@struct
class Root:
    """gamma = scale sqrt(t (1 - t)): a Brownian bridge of that deviation."""

    scale: Array | float

    def __call__(self, t: Array) -> Array:
        """The level at t."""
        return self.scale * jnp.sqrt(t * (1.0 - t))


@struct
class Sine:
    """gamma = scale sin^2(pi t): 0 at both ends with its rate (2303.08797)."""

    scale: Array | float

    def __call__(self, t: Array) -> Array:
        """The level at t."""
        nearer = jnp.minimum(t, 1.0 - t)  # float32's sin(pi) is not 0, and 1 / gamma is the score's
        return self.scale * jnp.square(jnp.sin(jnp.pi * nearer))


@struct
class Target(RectifiedFlow):
    """alpha = 1 - t, sigma = s + (1 - s) t: noise of level s is left at t = 0.

    A path to train on; samplers that need sigma = 0 at the data take the rectified flow.
    """

    floor: Array | float = 0.0

    def sigma(self, t: Array) -> Array:
        """From s at the data to 1."""
        return self.floor + (1.0 - self.floor) * super().sigma(t)

    def logsnr(self, t: Array) -> Array:
        """2 log(alpha / sigma)."""
        return 2.0 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

    def time(self, logsnr: Array) -> Array:
        """The root of alpha / sigma = exp(logsnr / 2)."""
        ratio = jnp.exp(0.5 * jnp.asarray(logsnr))
        return (1.0 - self.floor * ratio) / (1.0 + (1.0 - self.floor) * ratio)


@struct
class Interpolant:
    """A path of two endpoints and a latent noise (see the module's docstring).

    Attributes:
      schedule: alpha and sigma, the levels of x0 and of x1.
      level: gamma(t), or None for a path without latent noise.
    """

    schedule: Schedule
    level: Level | None = None

    def gamma(self, t: Array) -> tuple[Array, Array]:
        """(gamma, gamma') at t."""
        t = jnp.asarray(t)
        if self.level is None:
            return jnp.zeros_like(t), jnp.zeros_like(t)
        return jax.jvp(self.level, (t,), (jnp.ones_like(t),))

    def position(self, x0: PyTree, x1: PyTree, z: PyTree, t: Array) -> PyTree:
        """x_t. Trees of `[B, ...]`, t a scalar or `[B]`; z may be None without a level."""
        return _combine(
            (self.schedule.alpha(t), self.schedule.sigma(t), self.gamma(t)[0]), x0, x1, z
        )

    def velocity(self, x0: PyTree, x1: PyTree, z: PyTree, t: Array) -> PyTree:
        """dx_t/dt: what b is the conditional mean of."""
        return _combine((*self.schedule.rates(t), self.gamma(t)[1]), x0, x1, z)

    def score(self, eta: PyTree, t: Array) -> PyTree:
        """grad log p_t from E[z | x_t]: -eta / gamma; 0 where gamma is 0, as z does not know it."""
        gamma, _ = self.gamma(t)
        scale = jnp.where(gamma == 0, 0.0, -1.0 / jnp.where(gamma == 0, 1.0, gamma))
        return jax.tree.map(lambda e: expand(scale, e) * e, eta)

    def data(self, x: PyTree, b: PyTree, eta: PyTree, t: Array) -> PyTree:
        """E[x0 | x_t] from both means: x_t and its velocity solved for x0."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        d_alpha, d_sigma = self.schedule.rates(t)
        gamma, d_gamma = self.gamma(t)
        det = alpha * d_sigma - sigma * d_alpha
        latent = jnp.where(gamma == 0, 0.0, (sigma * d_gamma - d_sigma * gamma) / det)
        return _combine((d_sigma / det, -sigma / det, latent), x, b, eta)


def straight(scale: float = 0.0) -> Interpolant:
    """x_t = (1 - t) x0 + t x1 + scale z (Tong et al. 2024, 2302.00482, equations 14 and 15).

    I-CFM with `couplings.independent`, OT-CFM with `couplings.ot`.

    Raises:
      UserError: a negative scale.
    """
    return Interpolant(rectified_flow(), _level("straight", Constant, scale))


def target(scale: float = 0.0) -> Interpolant:
    """x_t = (1 - t) x0 + (scale + (1 - scale) t) eps: Lipman et al. 2023, equations 20 to 23.

    The other endpoint must be noise. scale is their sigma_min.

    Raises:
      UserError: a scale outside [0, 1).
    """
    if isinstance(scale, int | float) and not 0 <= scale < 1:
        raise UserError(f"target: scale={scale} given; it lies in [0, 1).")
    return Interpolant(Target(floor=scale))


def bridge(scale: float = 1.0) -> Interpolant:
    """Brownian bridges of deviation scale sqrt(t (1 - t)) (Tong et al. 2024, equation 20).

    With pairs from the entropic plan at epsilon = 2 scale^2 (`couplings.sinkhorn`) the path is the
    Schroedinger bridge of Brownian motion; its SDE has the diffusion e = scale^2 / 2.

    Raises:
      UserError: a scale that is not positive.
    """
    positive("bridge", scale=scale)
    return Interpolant(rectified_flow(), Root(scale))


def trigonometric(scale: float = 0.0) -> Interpolant:
    """x_t = cos(pi t / 2) x0 + sin(pi t / 2) x1 (+ scale sin^2(pi t) z) (Albergo et al. 2023).

    Raises:
      UserError: a negative scale.
    """
    return Interpolant(gvp(), _level("trigonometric", Sine, scale))


#: Paths by name, as configs give them.
BY_NAME = {
    "straight": straight, "target": target, "bridge": bridge, "trigonometric": trigonometric,
}  # fmt: skip


def _level(where: str, level: type, scale: Array | float) -> Level | None:
    if isinstance(scale, int | float):
        if scale < 0:
            raise UserError(f"{where}: scale={scale} given; it must not be negative.")
        if scale == 0:
            return None
    return level(scale)


def _combine(weights: tuple[Array, Array, Array], *trees: PyTree) -> PyTree:
    """The weighted sum of three trees, of which the last may be None."""
    pairs = [(w, tree) for w, tree in zip(weights, trees) if tree is not None]
    add = lambda *leaves: sum(expand(w, a) * a for (w, _), a in zip(pairs, leaves))
    return jax.tree.map(add, *(tree for _, tree in pairs))
