"""The variational bound of a denoiser on a time grid (Ho et al. 2020; Kingma et al. 2021, VDM).

For times T = t_0 > ... > t_n > data, with the reverse step q(x_s | x_t, x0 = x0_hat),

    -log p(x0) <= KL(q(x_T | x0) || N(0, sigma_T^2))                                 prior
                + sum_i 1/2 (SNR(t_{i+1}) - SNR(t_i)) E ||x0 - x0_hat(x_{t_i})||^2   diffusion
                - E log p(x0 | x_{t_n})                                              decoder

Any schedule and any grid: the finer the grid, the tighter the bound; with the exact denoiser it
becomes -log p(x0) itself. The loss that trains a learned variance on a table's own steps is in
`losses.variance`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdiff import grids
from jdiff.denoisers import as_denoiser, schedule_of
from jdiff.errors import UserError, choose
from jdiff.predictions import corrupt
from jdiff.pytree import Array, PyTree, batch_size, broadcast_time, is_concrete, noise_like
from jdiff.schedules import Schedule, first, schedule_map


class Bound(NamedTuple):
    """The three parts of the bound, in nats `[B]`."""

    prior: Array
    diffusion: Array
    reconstruction: Array

    @property
    def total(self) -> Array:
        """At least -log p(x0), in expectation over the key."""
        return self.prior + self.diffusion + self.reconstruction


def variational_bound(
    key: Array, denoiser: Any, x0: PyTree, cond: PyTree = None, *, times: Array,
    decoder: str = "density", levels: int = 256, schedule: PyTree = None,
) -> Bound:  # fmt: skip
    """An unbiased estimate of the bound on -log p(x0), one draw of noise for each time.

    Args:
      key: of the noise; sample i's depends on the key and i alone.
      denoiser: (x, t `[B]`, cond) -> Prediction.
      x0: data, a tree of `[B, ...]`.
      cond: conditions `[B, ...]`.
      times: falling, ending at the data as for `sample`; one evaluation a step but the last.
      decoder: what x0 is given the last x: "density" for continuous data, N(x / alpha, (sigma /
        alpha)^2); "levels" for data of so many levels in [-1, 1], each as likely as that normal
        says, normalised (VDM, appendix H). `likelihood.bits_per_dim(-total, x0)` is for the
        former, with levels=None for the latter.
      levels: see above.
      schedule: the denoiser's own unless given.

    Raises:
      UserError: an unknown decoder, times that do not fall or do not end at the data.
    """
    choose("variational_bound: decoder", decoder, ("density", "levels"))
    denoiser = as_denoiser(denoiser)
    schedule = schedule_of(denoiser, schedule, where="variational_bound")
    times = grids.check(times, schedule)
    if len(times) < 3:
        raise UserError("variational_bound: times needs at least two noisy times and the data.")
    data = first(schedule).t_data
    if is_concrete(times) and float(times[-1]) != data:
        raise UserError(
            f"variational_bound: times end at {float(times[-1]):.6g}; the last must be the data, "
            f"t = {data:g}, as in every grid of jdiff.grids."
        )
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size(x0)))
    cond = {} if cond is None else cond
    return _run(keys, denoiser, schedule, x0, cond, times, decoder=decoder, levels=levels)


@partial(jax.jit, static_argnames=("decoder", "levels"))
def _run(
    keys: Array, denoiser: Any, schedule: PyTree, x0: PyTree, cond: PyTree, times: Array, *,
    decoder: str, levels: int,
) -> Bound:  # fmt: skip
    x0 = jax.tree.map(lambda a: jnp.asarray(a, jnp.promote_types(a.dtype, jnp.float32)), x0)

    def noisy(i: Array, t: Array) -> tuple[PyTree, PyTree]:
        eps = noise_like(jax.vmap(jax.random.fold_in, (0, None))(keys, i), x0)
        return corrupt(schedule, x0, eps, t), eps

    def step(total: Array, inputs: tuple) -> tuple[Array, None]:
        i, t, s = inputs
        x0_hat = denoiser(noisy(i, t)[0], broadcast_time(t, x0), cond).x0

        def nats(sched: Schedule, x0: Array, x0_hat: Array) -> Array:
            gain = jnp.exp(sched.logsnr(s)) - jnp.exp(sched.logsnr(t))
            return 0.5 * gain * _square(x0 - x0_hat)

        return total + _sum(schedule_map(nats, schedule, x0, x0_hat)), None

    inner = times[:-1]  # the last step, to the data, is the decoder's
    steps = (jnp.arange(len(inner) - 1), inner[:-1], inner[1:])
    zero = jnp.zeros(len(keys), jnp.result_type(times, *jax.tree.leaves(x0)))
    diffusion, _ = jax.lax.scan(step, zero, steps)

    start, last = inner[0], inner[-1]
    prior = schedule_map(lambda s, x0: 0.5 * jnp.exp(s.logsnr(start)) * _square(x0), schedule, x0)
    x, eps = noisy(len(inner), last)

    def decode(s: Schedule, x0: Array, x: Array, eps: Array) -> Array:
        ratio = s.sigma_ratio(last)
        if decoder == "density":
            dims = x0[0].size
            return 0.5 * _square(eps) + dims * (jnp.log(ratio) + 0.5 * jnp.log(2 * jnp.pi))
        values = jnp.linspace(-1.0, 1.0, levels, dtype=x0.dtype)
        normal = lambda v: -0.5 * jnp.square((x / s.alpha(last) - v) / ratio)
        log_all = jax.nn.logsumexp(jax.vmap(normal)(values), axis=0)
        return (log_all - normal(x0)).reshape(len(x0), -1).sum(1)

    return Bound(_sum(prior), diffusion, _sum(schedule_map(decode, schedule, x0, x, eps)))


def _square(a: Array) -> Array:
    return jnp.square(a).reshape(len(a), -1).sum(1)


def _sum(tree: PyTree) -> Array:
    return sum(jax.tree.leaves(tree))
