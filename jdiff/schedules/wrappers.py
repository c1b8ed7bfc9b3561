"""Schedules made from a schedule: terminal noise, and shifts of the logSNR or of the time."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jdiff.errors import UserError, positive
from jdiff.pytree import Array, is_concrete, struct
from jdiff.schedules.base import Schedule, real
from jdiff.schedules.discrete import Discrete


class Wrapper(Schedule):
    """A schedule over the times of another, its `base`."""

    base: Schedule

    @property
    def t_min(self) -> Array:
        """The base's."""
        return self.base.t_min

    @property
    def t_max(self) -> Array:
        """The base's."""
        return self.base.t_max

    @property
    def t_data(self) -> float:
        """The base's."""
        return self.base.t_data

    @property
    def T(self) -> int | None:
        """The base's."""
        return self.base.T


@struct
class ZeroTerminalSNR(Wrapper):
    """alpha' = c (alpha - alpha(t_max)), c such that alpha'(t_min) = alpha(t_min); VP as its base.

    Below t_min (one step of a table) it is the base itself, so that the data stays the data.
    """

    base: Schedule

    def _terms(self, t: Array) -> tuple[Array, Array]:
        """(alpha', sigma'^2) for t in [t_min, t_max]; the variance without cancellation."""
        one, end, c = self._constants(t)
        a, variance = self.base.alpha(t), self.base.sigma(t) ** 2
        first = self.base.sigma(one) ** 2
        at_end = t >= self.t_max
        alpha = c * (a - end)
        # Exactly 0 at the end, whatever the compiler makes of a difference of equals, and its
        # derivative kept; never below 0, where rounding would put the logarithm's NaN.
        alpha -= jax.lax.stop_gradient(jnp.where(at_end, alpha, jnp.minimum(alpha, 0.0)))
        at_one = self.base.alpha(one)
        gap = first / (1.0 + at_one) + c * (variance - first) / (at_one + a)  # 1 - alpha'
        variance = (1.0 + alpha) * gap
        return alpha, variance - jax.lax.stop_gradient(jnp.where(at_end, variance - 1.0, 0.0))

    def _constants(self, t: Array) -> tuple[Array, Array, Array]:
        """(t_min, alpha(t_max), c) in the precision of t."""
        one, last = (jnp.asarray(end, t.dtype) for end in (self.t_min, self.t_max))
        at_one, end = self.base.alpha(one), self.base.alpha(last)
        return one, end, at_one / (at_one - end)

    def alpha(self, t: Array) -> Array:
        """0 exactly at t_max."""
        t = real(t)
        return jnp.where(t < self.t_min, self.base.alpha(t), self._terms(t)[0])

    def sigma(self, t: Array) -> Array:
        """1 exactly at t_max."""
        t = real(t)
        return jnp.where(t < self.t_min, self.base.sigma(t), jnp.sqrt(self._terms(t)[1]))

    def logsnr(self, t: Array) -> Array:
        """-inf at t_max."""
        t = real(t)
        alpha, variance = self._terms(t)
        inside = 2.0 * jnp.log(alpha) - jnp.log(variance)
        return jnp.where(t < self.t_min, self.base.logsnr(t), inside)

    def time(self, logsnr: Array) -> Array:
        """The base's time where its alpha is alpha' / c + alpha(t_max)."""
        logsnr = real(logsnr)
        one, end, c = self._constants(logsnr)
        at_one, first = self.base.alpha(one), self.base.sigma(one) ** 2
        above = logsnr > self.base.logsnr(one)
        alpha = jnp.sqrt(jax.nn.sigmoid(logsnr))
        a = alpha / c + end
        # 1 - a^2, by the steps of `_terms` backwards
        variance = first + (at_one + a) * (jax.nn.sigmoid(-logsnr) - first) / ((at_one + alpha) * c)
        of_base = 2.0 * jnp.log(a) - jnp.log(variance)
        inside = jnp.minimum(self.base.time(jnp.where(above, 0.0, of_base)), self.t_max)
        inside = jnp.where(jnp.isneginf(logsnr), self.t_max, inside)
        return jnp.where(above, self.base.time(logsnr), inside)


@struct
class Shifted(Wrapper):
    """The base's path at another pace: logSNR'(t) = logSNR(t) + 2 log shift."""

    base: Schedule
    shift: float

    def alpha(self, t: Array) -> Array:
        """The base's, at the warped time."""
        return self.base.alpha(self.base.warp(t, self.shift))

    def sigma(self, t: Array) -> Array:
        """The base's, at the warped time."""
        return self.base.sigma(self.base.warp(t, self.shift))

    def logsnr(self, t: Array) -> Array:
        """The base's + 2 log shift."""
        return self.base.logsnr(t) + 2.0 * jnp.log(self.shift)

    def time(self, logsnr: Array) -> Array:
        """The base's, of logsnr - 2 log shift."""
        return self.base.time(real(logsnr) - 2.0 * jnp.log(self.shift))

    def warp(self, t: Array, shift: Array) -> Array:
        """The base's: shifts of the logSNR commute."""
        return self.base.warp(t, shift)


def zero_terminal_snr(schedule: Schedule) -> ZeroTerminalSNR:
    """`schedule` rescaled to end in pure noise: alpha(t_max) = 0 (Lin et al. 2023, algorithm 1).

    sqrt(abar) is shifted and scaled to keep its first value and end at 0; exact at a table's steps,
    and for a continuous VP schedule the same map between t_min and t_max. At t_max logsnr is -inf,
    so a network must predict x0 or v there (eps says nothing of x0), and the grid must visit it
    (`grids.trailing`).

    Raises:
      UserError: the schedule is not variance preserving.
    """
    ends = jnp.stack([jnp.asarray(f(schedule.t_max)) for f in (schedule.alpha, schedule.sigma)])
    if is_concrete(ends) and abs(float(jnp.sum(ends * ends)) - 1.0) > 1e-4:
        raise UserError(
            f"zero_terminal_snr: {type(schedule).__name__} has alpha^2 + sigma^2 = "
            f"{float(jnp.sum(ends * ends)):.4g} at t_max; only variance-preserving schedules "
            "(ddpm_linear, scaled_linear, vp_linear, ...) can be rescaled."
        )
    return ZeroTerminalSNR(schedule)


def shifted(schedule: Schedule, shift: float) -> Schedule:
    """The same path with its logSNR moved by 2 log shift at every t (Hoogeboom et al. 2023).

    The noise schedule of a higher resolution: shift = 64 / d for d x d pixels where the schedule
    was made for 64 x 64, as `cosine(shift=...)`; below 1 it is noisier. On rectified flow it
    equals SD3's shift s = 1 / shift: alpha(t) = 1 - shift_time(t, s).

    Applied in the schedule, so in training and sampling alike and once; the network is told the
    unshifted t. SD3 and FLUX apply theirs to the times instead (`shift_time`), and their network is
    told the shifted one. Do not do both.

    Raises:
      UserError: shift is not positive.
    """
    positive("shifted", shift=shift)
    if isinstance(schedule, Discrete):  # its times end with its table, so the table moves
        return dataclasses.replace(schedule, table=schedule.table + 2.0 * jnp.log(shift))
    return Shifted(schedule, shift)


def shift_time(t: Array, shift: Array) -> Array:
    """s t / (1 + (s - 1) t): the time on [0, 1] where rectified flow's logSNR is lower by 2 log s.

    SD3's timestep shift (Esser et al. 2024, equation 23): 3 at 1024 x 1024; FLUX's is
    `flux_shift(tokens)`. It is applied to times, those of a training distribution and those of a
    sampling grid (`grids.shifted`), each once; the network is told the shifted time. For the shift
    of a schedule, of which the network knows nothing, see `shifted`.
    """
    t = real(t)
    return shift * t / (1.0 + (shift - 1.0) * t)


def flux_shift(
    tokens: int, base_tokens: int = 256, max_tokens: int = 4096,
    base_mu: float = 0.5, max_mu: float = 1.15,
) -> float:  # fmt: skip
    """FLUX's shift for an image of so many latent tokens, for `shift_time`: exp(mu).

    mu is linear in the tokens, 0.5 at 256 (a 256 x 256 image) and 1.15 at 4096 (1024 x 1024), as in
    FLUX's published sampling code; diffusers calls this dynamic shifting.
    """
    slope = (max_mu - base_mu) / (max_tokens - base_tokens)
    return math.exp(base_mu + slope * (tokens - base_tokens))
