"""Distributions of the training time: (key, n, schedule) -> t `[n]`, as frozen pytrees of numbers.

Each draws n times in the schedule's own units. `stratified` spreads the n uniforms evenly over
their range with one common shift (Kingma et al. 2021, appendix I.1): the same marginal, less
variance in the loss.
"""

import jax
import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.pytree import Array, static, struct
from jdiff.schedules import Schedule


def unit(key: Array, n: int, stratified: bool) -> Array:
    """n uniforms on [0, 1), independent or stratified."""
    if not stratified:
        return jax.random.uniform(key, (n,))
    return (jax.random.uniform(key) + jnp.arange(n) / n) % 1.0


@struct
class Uniform:
    """t uniform on the schedule's [t_min, t_max]; on a discrete table, over its steps 1..T."""

    stratified: bool = static(False)

    def __call__(self, key: Array, n: int, schedule: Schedule) -> Array:
        """t `[n]`."""
        u = unit(key, n, self.stratified)
        if schedule.T is not None:
            return 1.0 + jnp.floor(u * schedule.T)
        # Off the ends: a float32 uniform is 0 once in 2^23 draws, and a weight at sigma = 0 is NaN.
        return schedule.t_min + _inside(u) * (schedule.t_max - schedule.t_min)


@struct
class LogNormal:
    """log(sigma / alpha) normal: EDM's training distribution (Karras et al. 2022, table 1)."""

    mean: float = -1.2
    std: float = 1.2
    stratified: bool = static(False)

    def __call__(self, key: Array, n: int, schedule: Schedule) -> Array:
        """t `[n]`, not clipped to the domain (EDM does not)."""
        z = jax.scipy.special.ndtri(_inside(unit(key, n, self.stratified)))
        return schedule.time(-2.0 * (self.mean + self.std * z))


@struct
class LogitNormal:
    """logit(t) normal on the schedule's domain (Esser et al. 2024, SD3, section 3.1)."""

    mean: float = 0.0
    std: float = 1.0
    stratified: bool = static(False)

    def __call__(self, key: Array, n: int, schedule: Schedule) -> Array:
        """t `[n]`."""
        z = jax.scipy.special.ndtri(_inside(unit(key, n, self.stratified)))
        u = jax.nn.sigmoid(self.mean + self.std * z)
        return schedule.t_min + u * (schedule.t_max - schedule.t_min)


def uniform(stratified: bool = False) -> Uniform:
    """Uniform in t."""
    return Uniform(stratified)


def lognormal(mean: float = -1.2, std: float = 1.2, stratified: bool = False) -> LogNormal:
    """log(sigma / alpha) ~ N(mean, std^2); EDM's P_mean and P_std."""
    return LogNormal(mean, _positive("lognormal", std), stratified)


def logit_normal(mean: float = 0.0, std: float = 1.0, stratified: bool = False) -> LogitNormal:
    """logit(t) ~ N(mean, std^2); SD3's rf/lognorm(mean, std)."""
    return LogitNormal(mean, _positive("logit_normal", std), stratified)


#: Distributions by name, as configs give them.
BY_NAME = {"uniform": uniform, "lognormal": lognormal, "logit_normal": logit_normal}


def _inside(u: Array) -> Array:
    """u kept off 0 and 1, where the normal quantile is infinite (float32: 5.3 deviations)."""
    return jnp.clip(u, 2.0**-24, 1.0 - 2.0**-24)


def _positive(where: str, std: float) -> float:
    if isinstance(std, int | float) and not std > 0:
        raise UserError(f"{where}: std={std} given; it must be positive.")
    return std
