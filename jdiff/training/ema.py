"""Exponential moving averages of the weights: several at once, chosen by name at evaluation.

An average is a decay as a function of the step; the update is one line for all of them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.errors import UserError, call
from jdiff.pytree import Array, PyTree, struct


class Average:
    """decay(step) -> the share of the old average that is kept, step counting from 1."""

    def decay(self, step: Array) -> Array:
        """In [0, 1)."""
        raise NotImplementedError  # abstract


@struct
class Constant(Average):
    """A constant decay, reached through a warm-up so that the first steps are forgotten."""

    rate: float
    warmup: float  # 0: none. Else the half-life is at most this share of the steps before.

    def decay(self, step: Array) -> Array:
        """rate, or less while the run is young."""
        halflife = self.warmup * (step - 1).astype(jnp.float32)
        young = jnp.exp2(-1.0 / jnp.maximum(halflife, 1e-8))
        return jnp.where(self.warmup > 0, jnp.minimum(self.rate, young), self.rate)


@struct
class Power(Average):
    """EDM2's power function: (1 - 1 / step)^(gamma + 1), a profile that scales with the run."""

    gamma: float

    def decay(self, step: Array) -> Array:
        """0 at the first step, so that the initial weights are forgotten at once."""
        return (1.0 - 1.0 / step.astype(jnp.float32)) ** (self.gamma + 1.0)


def constant(
    decay: float | None = None, halflife_images: float | None = None, warmup: float = 0.0, *,
    batch_size: int = 1,
) -> Constant:  # fmt: skip
    """A constant average, by its decay a step or its half-life in images (EDM: 500,000).

    Args:
      warmup: EDM's ramp-up ratio (0.05): the half-life is at most this share of the images so far.

    Raises:
      UserError: neither or both of decay and halflife_images, or a decay outside [0, 1).
    """
    if (decay is None) == (halflife_images is None):
        raise UserError("ema constant: give one of decay and halflife_images.")
    rate = 2.0 ** (-batch_size / halflife_images) if decay is None else decay
    if not 0 <= rate < 1:
        raise UserError(f"ema constant: decay={rate} given; it lies in [0, 1).")
    return Constant(rate, warmup)


def power(sigma_rel: float, *, batch_size: int = 1) -> Power:
    """The power function with relative width sigma_rel (Karras et al. 2024, equation 123).

    sigma_rel = 0.05 gives gamma = 16.97, 0.10 gives 6.94.
    """
    if not 0 < sigma_rel < 12**-0.5:  # gamma = 0, the plain mean, has 1 / sqrt(12)
        raise UserError(f"ema power: sigma_rel={sigma_rel} given; it lies in (0, 0.2887).")
    # sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) falls in gamma: bisection.
    low, high = 0.0, 1.0 / sigma_rel**2
    for _ in range(200):
        gamma = 0.5 * (low + high)
        width = math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)
        low, high = (gamma, high) if width > sigma_rel else (low, gamma)
    return Power(gamma)


def build(config: Any, batch_size: int) -> dict[str, Average]:
    """The averages of `config.ema`: name -> {"kind": "constant" or "power", ...}."""
    averages = {}
    for name, entry in config.items():
        arguments = dict(entry)
        if name == "params" or not name.isidentifier():
            raise UserError(
                f"config.ema: {name!r} cannot name an average; 'params' is the weights."
            )
        arguments["name"] = arguments.pop("kind", None)
        table = {"constant": constant, "power": power}
        averages[name] = call(f"config.ema.{name}", table, arguments | {"batch_size": batch_size})
    return averages


def start(averages: dict[str, Average], params: PyTree) -> dict[str, PyTree]:
    """Each average at the initial weights, in float32 and in buffers of its own."""
    copy = lambda p: jnp.array(p, jnp.promote_types(p.dtype, jnp.float32), copy=True)
    return {name: jax.tree.map(copy, params) for name in averages}


def update(
    averages: dict[str, Average], values: dict[str, PyTree], params: PyTree, step: Array
) -> dict[str, PyTree]:
    """Each average moved towards the weights after `step` steps (1 after the first)."""

    def move(average: Average, value: PyTree) -> PyTree:
        decay = average.decay(step)
        return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p.astype(e.dtype) - e), value, params)

    return {name: move(average, values[name]) for name, average in averages.items()}
