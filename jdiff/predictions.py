"""The hub: what a network predicts, as rows of one affine table.

A network's raw output F stands for one linear combination of the two endpoints,

    F = r0 x0 + r1 eps,        and the input is        x = alpha x0 + sigma eps,

so with det = alpha r1 - sigma r0 both endpoints follow from one inversion:

    x0  = ( r1 x - sigma F) / det
    eps = (-r0 x + alpha F) / det

    target     r0                       r1                       det
    x0         1                        0                        -sigma
    eps        0                        1                        alpha
    v          -sigma                   alpha                    alpha^2 + sigma^2
    score      0                        -1 / sigma               -alpha / sigma
    scaled_score 0                      -1                       -alpha
    velocity   d alpha / dt             d sigma / dt             alpha sigma' - sigma alpha'
    edm        sigma / (s sqrt(D))      -alpha s / sqrt(D)       -sqrt(D) / s

with s = sigma_data and D = sigma^2 + alpha^2 s^2. For alpha = 1 the last row is EDM's table 1:
x0 = c_skip x + c_out F with c_skip = r1 / det and c_out = -sigma / det. Every conversion in jdiff
is this table read in one direction and the other; there are no pairwise converters.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdiff.errors import UserError, choose, positive
from jdiff.pytree import Array, PyTree, expand, static, struct
from jdiff.schedules import Schedule, is_schedule, schedule_map


class Prediction(NamedTuple):
    """Both endpoints of the path given x_t: what every denoiser returns. Trees like x.

    A network that learned the variance of the reverse step says it too, entry by entry, as the
    share of the way in log from the posterior's (0) to beta (1): Nichol and Dhariwal 2021,
    equation 15. Guidance leaves it as the conditional network gave it.
    """

    x0: PyTree
    eps: PyTree
    variance: PyTree = None


def corrupt(schedule: PyTree, x0: PyTree, eps: PyTree, t: Array) -> PyTree:
    """x_t = alpha(t) x0 + sigma(t) eps. Trees of `[B, ...]`; t a scalar or `[B]`."""

    def mix(s: Schedule, a: Array, b: Array) -> Array:
        return expand(s.alpha(t), a) * a + expand(s.sigma(t), b) * b

    return schedule_map(mix, schedule, x0, eps)


def endpoint_velocity(schedule: PyTree, prediction: Prediction, t: Array) -> PyTree:
    """dx/dt = alpha'(t) x0 + sigma'(t) eps: the probability-flow ODE's velocity."""

    def mix(s: Schedule, x0: Array, eps: Array) -> Array:
        d_alpha, d_sigma = s.rates(t)
        return expand(d_alpha, x0) * x0 + expand(d_sigma, eps) * eps

    return schedule_map(mix, schedule, prediction.x0, prediction.eps)


def from_x0(schedule: PyTree, x: PyTree, x0: PyTree, t: Array) -> Prediction:
    """The prediction with this x0 that is consistent with x: eps = (x - alpha x0) / sigma."""

    def eps(s: Schedule, x: Array, x0: Array) -> Array:
        return (x - expand(s.alpha(t), x) * x0) / expand(s.sigma(t), x)

    return Prediction(x0, schedule_map(eps, schedule, x, x0))


# The rows: (schedule, t, sigma_data) -> (r0, r1).
_ROWS: dict[str, Callable[[Schedule, Array, Array], tuple[Array, Array]]] = {
    "x0": lambda s, t, _: (jnp.ones_like(s.alpha(t)), jnp.zeros_like(s.alpha(t))),
    "eps": lambda s, t, _: (jnp.zeros_like(s.alpha(t)), jnp.ones_like(s.alpha(t))),
    "v": lambda s, t, _: (-s.sigma(t), s.alpha(t)),
    "score": lambda s, t, _: (jnp.zeros_like(s.sigma(t)), -1.0 / s.sigma(t)),
    "scaled_score": lambda s, t, _: (jnp.zeros_like(s.sigma(t)), -jnp.ones_like(s.sigma(t))),
    "velocity": lambda s, t, _: s.rates(t),
    "edm": lambda s, t, sd: (
        s.sigma(t) / (sd * _scale(s, t, sd)),
        -s.alpha(t) * sd / _scale(s, t, sd),
    ),
    "consistency": lambda s, t, sd: _consistency_row(s, t, sd),
}

# The targets whose network sees x at unit variance and log sigma.
_PRECONDITIONED = ("edm", "consistency")

# What the network is told of the time: (schedule, t) -> c_noise, in float32.
_TIMES: dict[str, Callable[[Schedule, Array], Array]] = {
    "t": lambda s, t: t,  # the schedule's own time
    "t1000": lambda s, t: 1000.0 * t,  # continuous t in [0, 1] on the scale of DDPM's steps
    "step": lambda s, t: t - 1.0,  # the index 0..T-1 of a discrete table
    "log_sigma": lambda s, t: -0.125 * s.logsnr(t),  # EDM's log(sigma) / 4
    "logsnr": lambda s, t: s.logsnr(t),
    # Those of EDM's table 1 (jdiff.presets): VP's (M - 1) t, VE's log(sigma / 2), iDDPM's index.
    "t999": lambda s, t: 999.0 * t,
    "log_half_sigma": lambda s, t: -0.5 * s.logsnr(t) - jnp.log(2.0),
    "nearest_step": lambda s, t: _nearest_step(s, t),
}


@struct
class Parameterization:
    """What a network predicts and how it is fed: one row of the table in the module's docstring.

    Attributes:
      target: "x0", "eps", "v", "score", "scaled_score" (sigma score), "velocity", "edm" or
        "consistency" (as "edm", but that x0 is x / alpha at t_min).
      time: what the network is told of the time: "t", "t1000", "step", "nearest_step",
        "log_sigma", "logsnr", "t999" or "log_half_sigma".
      sigma_data: the data's standard deviation (for "edm" and "consistency").
      variance: "fixed", or "learned_range": the network has twice the channels, of which the second
        half v in [-1, 1] says the reverse step's variance (iDDPM).
    """

    target: str = static()
    time: str = static("t")
    sigma_data: float = 0.5
    variance: str = static("fixed")

    def row(self, schedule: Schedule, t: Array) -> tuple[Array, Array]:
        """(r0, r1): the network's output is F = r0 x0 + r1 eps. Shapes of t."""
        return _ROWS[self.target](schedule, t, self.sigma_data)

    def determinant(self, schedule: Schedule, t: Array) -> Array:
        """alpha r1 - sigma r0. An error e in F is an error -sigma e / det in x0."""
        r0, r1 = self.row(schedule, t)
        return schedule.alpha(t) * r1 - schedule.sigma(t) * r0

    def scale_input(self, schedule: PyTree, x: PyTree, t: Array) -> PyTree:
        """c_in x, the network's input: unit variance for "edm", x itself for most others."""
        if self.target not in _PRECONDITIONED:
            return x
        return schedule_map(lambda s, x: x / expand(_scale(s, t, self.sigma_data), x), schedule, x)

    def condition_time(self, schedule: PyTree, t: Array) -> PyTree:
        """c_noise: `[B]` float32, or a tree of them where `schedule` is a tree."""
        tell = _TIMES[self.time]
        return jax.tree.map(lambda s: tell(s, t).astype(jnp.float32), schedule, is_leaf=is_schedule)

    def target_of(self, schedule: PyTree, x0: PyTree, eps: PyTree, t: Array) -> PyTree:
        """F from both endpoints: what the network is trained on."""

        def mix(s: Schedule, x0: Array, eps: Array) -> Array:
            r0, r1 = self.row(s, t)
            return expand(r0, x0) * x0 + expand(r1, eps) * eps

        return schedule_map(mix, schedule, x0, eps)

    def split(self, output: PyTree) -> tuple[PyTree, PyTree]:
        """(F, the learned variance as in `Prediction`, or None) of the network's output.

        Raises:
          UserError: a learned variance with an odd number of channels.
        """
        if self.variance == "fixed":
            return output, None
        for path, leaf in jax.tree_util.tree_leaves_with_path(output):
            if leaf.shape[-1] % 2:
                raise UserError(
                    f"parameterization variance='learned_range': output{jax.tree_util.keystr(path)}"
                    f" has {leaf.shape[-1]} channels; twice those of the image are needed "
                    "(config.model.out_channels)."
                )
        halves = [jax.tree.map(lambda a, i=i: jnp.split(a, 2, -1)[i], output) for i in (0, 1)]
        return halves[0], jax.tree.map(lambda v: 0.5 * (v + 1.0), halves[1])

    def prediction(self, schedule: PyTree, output: PyTree, x: PyTree, t: Array) -> Prediction:
        """Both endpoints from the network's output at x_t = x: the table inverted."""
        output, variance = self.split(output)

        def x0(s: Schedule, x: Array, f: Array) -> Array:
            _, r1 = self.row(s, t)
            det = self.determinant(s, t)
            return expand(r1 / det, x) * x - expand(s.sigma(t) / det, f) * f

        def eps(s: Schedule, x: Array, f: Array) -> Array:
            r0, _ = self.row(s, t)
            det = self.determinant(s, t)
            return expand(s.alpha(t) / det, f) * f - expand(r0 / det, x) * x

        return Prediction(
            schedule_map(x0, schedule, x, output), schedule_map(eps, schedule, x, output), variance
        )


def parameterization(
    target: str, time: str | None = None, sigma_data: float = 0.5, variance: str = "fixed"
) -> Parameterization:
    """A parameterisation by name (see `Parameterization`).

    `time` is "log_sigma" for "edm" and "consistency", and "t" otherwise, if not given.

    Raises:
      UserError: an unknown target, time or variance, with the nearest name.
    """
    choose("parameterization target", target, _ROWS)
    time = choose(
        "parameterization time", time or ("log_sigma" if target in _PRECONDITIONED else "t"), _TIMES
    )
    positive("parameterization", sigma_data=sigma_data)
    choose("parameterization variance", variance, ("fixed", "learned_range"))
    return Parameterization(target, time, sigma_data, variance)


def convert(
    value: PyTree, source: Parameterization, to: Parameterization, schedule: PyTree,
    x: PyTree, t: Array,
) -> PyTree:  # fmt: skip
    """One parameterisation's output as another's, e.g. a v-prediction as a score."""
    prediction = source.prediction(schedule, value, x, t)
    return to.target_of(schedule, prediction.x0, prediction.eps, t)


def _scale(schedule: Schedule, t: Array, sigma_data: Array) -> Array:
    """sqrt(sigma^2 + alpha^2 sigma_data^2): the standard deviation of x_t."""
    return jnp.sqrt(schedule.sigma(t) ** 2 + (schedule.alpha(t) * sigma_data) ** 2)


def _nearest_step(schedule: Schedule, t: Array) -> Array:
    """The index 0..T-1 of the table's noise level nearest to that at t, in sigma / alpha."""
    if schedule.T is None:
        raise UserError(
            f'parameterization: time="nearest_step" needs a discrete table, given '
            f"{type(schedule).__name__}."
        )
    levels = schedule.sigma_ratio(jnp.arange(1, schedule.T + 1, dtype=jnp.result_type(float)))
    return jnp.argmin(jnp.abs(levels - schedule.sigma_ratio(t)[..., None]), axis=-1)


def _consistency_row(s: Schedule, t: Array, sd: Array) -> tuple[Array, Array]:
    """The row of x0 = c_skip x / alpha + c_out F, with k = sigma / alpha and g = k - k(t_min):

        c_skip = sd^2 / (g^2 + sd^2),      c_out = sd g / sqrt(k^2 + sd^2)

    (Song et al. 2023, appendix C). At t_min, where F says nothing of x0, r1 is kept finite.
    """
    k = s.sigma_ratio(t)
    gap = jnp.maximum(k - s.sigma_ratio(jnp.asarray(s.t_min, k.dtype)), 1e-15)
    root = jnp.sqrt(k**2 + sd**2) / (gap**2 + sd**2)
    return gap * root / sd, -k * sd * root / gap
