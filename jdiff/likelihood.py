"""Exact log-likelihoods by the probability-flow ODE (Song et al. 2021, section 4.3, appendix D.2).

Along the ODE dx/dt = v(x, t) the density obeys d log p / dt = -div v, so that

    log p_0(x_0) = log p_T(x_T) + integral of div v dt  from 0 to T,

with the divergence exact (one product a dimension) or estimated by probes (Hutchinson; Skilling).
Everything is integrated in logSNR, where diffusion ODEs are smooth from end to end.

The density is that of x / alpha at `last_time`: of the data with Gaussian noise of deviation
sigma / alpha, and no other change. (Where p_eps(x_0) is evaluated without dividing by alpha, the
answer is off by d log alpha nats.)
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdiff.denoisers import as_denoiser, schedule_of
from jdiff.errors import UserError, choose
from jdiff.predictions import endpoint_velocity
from jdiff.pytree import (
    Array,
    PyTree,
    batch_size,
    broadcast_time,
    expand,
    is_concrete,
    noise_like,
)
from jdiff.schedules import Schedule, first, schedule_map

_FAR = 20.0  # where a logSNR is infinite at an end of the domain, the ODE starts or stops here


class Likelihood(NamedTuple):
    """Log-densities in nats, and the latents they were computed through."""

    log_prob: Array  # [B]
    latent: PyTree  # x at the noise end, like x0
    evaluations: Array  # [B] of the velocity and its divergence together


def log_likelihood(
    key: Array, denoiser: Any, x0: PyTree, cond: PyTree = None, *, trace: str = "hutchinson",
    probes: int = 1, schedule: PyTree = None, first_time: float | None = None,
    last_time: float | None = None, steps: int | None = None, rtol: float = 1e-5,
    atol: float = 1e-5, prior: Callable[[PyTree], Array] | None = None,
) -> Likelihood:  # fmt: skip
    """log p(x0) of the model that the denoiser defines, by its probability-flow ODE.

    Args:
      key: of the probes; sample i's depend on the key and i alone.
      denoiser: (x, t `[B]`, cond) -> Prediction; guided ones have a density too.
      x0: data, a tree of `[B, ...]` floats; images are dequantised first (`dequantize`).
      cond: conditions `[B, ...]`.
      trace: "exact" costs one product a dimension, "hutchinson" one a probe and is unbiased.
      probes: how many Rademacher probes "hutchinson" averages.
      schedule: the denoiser's own unless given.
      first_time: the noise end; t_max unless given.
      last_time: the data end; t_min unless given.
      steps: of the classical Runge-Kutta method, evenly in logSNR, four evaluations each. Not
        given: adaptive steps, each sample's own (diffrax, the extra `solvers`).
      rtol, atol: tolerances of the adaptive steps.
      prior: x -> `[B]`, the log density at the noise end; N(0, sigma^2) unless given, which is
        where samplers start. It neglects the data's own mean m: about |m| / sigma nats a dimension,
        so 0.01 for images at EDM's 80.

    Returns:
      `Likelihood`; see `bits_per_dim`.

    Raises:
      UserError: an unknown trace, no schedule, or ends in the wrong order.
    """
    choose("log_likelihood: trace", trace, ("exact", "hutchinson"))
    denoiser = as_denoiser(denoiser)
    schedule = schedule_of(denoiser, schedule, where="log_likelihood")
    clock = first(schedule)
    low = _end(clock, clock.t_max if first_time is None else first_time)
    high = _end(clock, clock.t_min if last_time is None else last_time)
    if is_concrete((low, high)) and not float(low) < float(high):
        raise UserError(
            f"log_likelihood: first_time={first_time} must be noisier than last_time={last_time}."
        )
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size(x0)))
    return _run(
        keys, denoiser, schedule, x0, {} if cond is None else cond, low, high, rtol, atol,
        trace=trace, probes=probes, steps=steps, prior=prior,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("trace", "probes", "steps", "prior"))
def _run(
    keys: Array, denoiser: Any, schedule: PyTree, x0: PyTree, cond: PyTree, low: Array, high: Array,
    rtol: float, atol: float, *, trace: str, probes: int, steps: int | None, prior: Any,
) -> Likelihood:  # fmt: skip
    clock = first(schedule)
    t_low, t_high = clock.time(low), clock.time(high)
    x = schedule_map(lambda s, x: s.alpha(t_high) * x, schedule, x0)
    log_alpha = schedule_map(
        lambda s, x: x[0].size * jnp.log(s.alpha(t_high)), schedule, x0
    )  # of the change of variables from x to x / alpha
    draws = jax.vmap(lambda i: _signs(jax.vmap(jax.random.fold_in, (0, None))(keys, i), x0))(
        jnp.arange(probes)
    )

    def field(u: Array, x: PyTree, cond: PyTree, draws: PyTree) -> tuple[PyTree, Array]:
        """(dx / du, its divergence [B]) at logSNR u."""
        t, dt_du = jax.jvp(clock.time, (u,), (jnp.ones_like(u),))

        def velocity(x: PyTree) -> PyTree:
            prediction = denoiser(x, broadcast_time(t, x), cond)
            v = endpoint_velocity(schedule, prediction, t)
            return jax.tree.map(lambda v, x: (dt_du * v).astype(x.dtype), v, x)

        if trace == "exact":
            return velocity(x), _exact_divergence(velocity, x)
        v, pull = jax.vjp(velocity, x)
        return v, jax.vmap(lambda z: _dot(pull(z)[0], z))(draws).mean(0)

    if steps is None:
        x, change, evaluations = _adaptive(field, x, cond, draws, high, low, rtol, atol)
    else:
        x, change, evaluations = _fixed(field, x, cond, draws, high, low, steps)
    at_noise = (prior or partial(_gaussian, schedule, t_low))(x)
    # The integral runs from data to noise, falling in logSNR: log p_0 = log p_T + change.
    log_prob = at_noise + change + sum(jax.tree.leaves(log_alpha))
    return Likelihood(log_prob, x, evaluations)


def _fixed(
    field: Callable, x: PyTree, cond: PyTree, draws: PyTree, start: Array, end: Array, steps: int
) -> tuple[PyTree, Array, Array]:
    """The classical fourth-order Runge-Kutta method for x and its divergence's integral."""
    h = (end - start) / steps
    move = lambda x, k, c: jax.tree.map(lambda x, k: x + c * h * k, x, k)

    def step(carry: tuple, i: Array) -> tuple:
        x, change = carry
        u = start + i * h
        k1, d1 = field(u, x, cond, draws)
        k2, d2 = field(u + 0.5 * h, move(x, k1, 0.5), cond, draws)
        k3, d3 = field(u + 0.5 * h, move(x, k2, 0.5), cond, draws)
        k4, d4 = field(u + h, move(x, k3, 1.0), cond, draws)
        slope = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, k1, k2, k3, k4)
        return (move(x, slope, 1.0), change + h * (d1 + 2 * d2 + 2 * d3 + d4) / 6), None

    batch = batch_size(x)
    zero = jnp.zeros(batch, jnp.result_type(start, *jax.tree.leaves(x)))
    (x, change), _ = jax.lax.scan(step, (x, zero), jnp.arange(steps))
    return x, change, jnp.full(batch, 4 * steps)


def _adaptive(
    field: Callable, x: PyTree, cond: PyTree, draws: PyTree, start: Array, end: Array,
    rtol: float, atol: float,
) -> tuple[PyTree, Array, Array]:  # fmt: skip
    """Tsitouras' method of order 5 with steps of its own for each sample."""
    try:
        import diffrax
    except ImportError as error:
        raise UserError(
            "log_likelihood: adaptive steps need diffrax: pip install 'jdiff[solvers]', or give "
            "steps=, e.g. steps=100."
        ) from error

    def one(x: PyTree, cond: PyTree, draws: PyTree) -> tuple[PyTree, Array, Array]:
        batched = lambda tree: jax.tree.map(lambda a: a[None], tree)
        cond, draws = batched(cond), jax.tree.map(lambda a: a[:, None], draws)

        def slope(u: Array, state: tuple, _: None) -> tuple:
            dx, d = field(u, batched(state[0]), cond, draws)
            return jax.tree.map(lambda a: a[0], dx), d[0].astype(state[1].dtype)

        zero = jnp.zeros((), jnp.result_type(start, *jax.tree.leaves(x)))
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(slope), diffrax.Tsit5(), start, end, None, (x, zero),
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol), max_steps=10_000,
        )  # fmt: skip
        x, change = jax.tree.map(lambda a: a[0], found.ys)
        return x, change, 6 * found.stats["num_steps"] + 1

    return jax.vmap(one, in_axes=(0, 0, 1))(x, cond, draws)


def dequantize(key: Array, images: Array) -> Array:
    """uint8 images `[B, ...]` as floats in [-1, 1] with uniform noise of one level's width.

    The centre of level k is k / 127.5 - 1, where networks see it; E over the noise of
    `log_likelihood` is a lower bound of the log-probability of the discrete image.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(images)))
    u = jax.vmap(lambda k: jax.random.uniform(k, images.shape[1:]))(keys)
    return (jnp.asarray(images, u.dtype) + u - 0.5) / 127.5 - 1.0


def bits_per_dim(log_prob: Array, x0: PyTree, levels: int | None = 256) -> Array:
    """Nats as bits per dimension `[B]`; with `levels`, of images that `dequantize` made.

    A level is 2 / (levels - 1) wide, so its probability is the density times that: bits / dim gains
    log2((levels - 1) / 2), 6.99 for 256 levels. None is for continuous data.
    """
    dims = sum(leaf[0].size for leaf in jax.tree.leaves(x0))
    offset = 0.0 if levels is None else jnp.log2((levels - 1) / 2)
    return offset - log_prob / (dims * jnp.log(2.0))


def _end(clock: Schedule, t: Any) -> Array:
    """The logSNR at an end, or one far out where it is infinite."""
    return jnp.clip(clock.logsnr(jnp.asarray(t, jnp.result_type(float))), -_FAR, _FAR)


def _gaussian(schedule: PyTree, t: Array, x: PyTree) -> Array:
    """log N(x; 0, sigma(t)^2) in the variable x / alpha, `[B]`."""

    def leaf(s: Schedule, x: Array) -> Array:
        z = (x / expand(s.sigma(t), x)).reshape(len(x), -1)
        log_scale = jnp.log(s.sigma(t))
        return jax.scipy.stats.norm.logpdf(z).sum(1) - z.shape[1] * log_scale

    return sum(jax.tree.leaves(schedule_map(leaf, schedule, x)))


def _exact_divergence(velocity: Callable, x: PyTree) -> Array:
    """The trace of the Jacobian `[B]`: one forward product for each dimension of a sample."""
    leaves, treedef = jax.tree.flatten(x)
    total = 0.0
    for i, leaf in enumerate(leaves):

        def entry(j: Array, i: int = i, leaf: Array = leaf) -> Array:
            unit = jax.nn.one_hot(j, leaf[0].size, dtype=leaf.dtype).reshape(leaf.shape[1:])
            tangent = [jnp.zeros_like(a) for a in leaves]
            tangent[i] = jnp.broadcast_to(unit, leaf.shape)
            out = jax.jvp(velocity, (x,), (treedef.unflatten(tangent),))[1]
            return jax.tree.leaves(out)[i].reshape(len(leaf), -1)[:, j]

        total = total + jax.lax.map(entry, jnp.arange(leaf[0].size), batch_size=64).sum(0)
    return total


def _signs(keys: Array, x: PyTree) -> PyTree:
    """Rademacher probes like x, each sample's from its own key."""
    return jax.tree.map(lambda z: jnp.where(z < 0, -1, 1).astype(z.dtype), noise_like(keys, x))


def _dot(a: PyTree, b: PyTree) -> Array:
    """The inner product of each sample, `[B]`."""
    products = jax.tree.map(lambda a, b: jnp.sum((a * b).reshape(len(a), -1), 1), a, b)
    return sum(jax.tree.leaves(products))
