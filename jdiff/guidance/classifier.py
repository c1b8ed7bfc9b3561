"""Classifier guidance (Dhariwal and Nichol 2021, 2105.05233, algorithm 2)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.denoisers import as_denoiser, schedule_of
from jdiff.guidance.base import Guided
from jdiff.guidance.measured import add_score
from jdiff.guidance.scales import as_scale, hide, read
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, struct


@struct
class Classifier(Guided):
    """The denoiser that `classifier` makes. Leaves: denoiser, log_prob (if a pytree), scale."""

    denoiser: Any
    log_prob: Any
    scale: Any

    def __call__(self, x: PyTree, t: Array, cond: PyTree = None) -> Prediction:
        """x `[B, ...]`, t `[B]` -> the prediction of p(x) p(c | x)^scale at this noise level."""
        t = broadcast_time(t, x)
        cond = dict(cond or {})
        w = read(self.scale, self.schedule, t, cond)
        cond = hide(cond, self.scale)
        prediction = self.denoiser(x, t, cond)
        g = jax.grad(lambda x: jnp.sum(self.log_prob(x, t, cond)))(x)
        return add_score(schedule_of(self.denoiser), prediction, g, t, w)


def classifier(denoise: Any, log_prob: Callable[..., Array], scale: Any = 1.0) -> Classifier:
    """Guidance by a classifier of noisy data: eps - scale sigma grad log p(c | x_t).

    x0 gains scale sigma^2 / alpha times the gradient, so the result is consistent with x; where
    alpha = 0, x_t says nothing of c and x0 is left alone. With the exact classifier, scale = 1
    turns the unconditional denoiser into the conditional one.

    Args:
      denoise: the denoiser to guide, unconditional or not; it sees the same cond.
      log_prob: (x, t `[B]`, cond) -> log p(c | x_t) `[B]` in nats, each sample's a function of its
        own x; a plain function, or a pytree whose weights are leaves, such as
        `jax.tree_util.Partial(apply, params)`.
      scale: a number, `[B]`, `per_sample(...)` or one of `guidance.scales`.

    Raises:
      UserError: the denoiser has no schedule.

    >>> guided = guidance.classifier(denoise, lambda x, t, cond: log_p(x, t, cond["label"]), 2.0)
    """
    denoise = as_denoiser(denoise)
    schedule_of(denoise, where="classifier")
    return Classifier(denoise, as_denoiser(log_prob), as_scale(scale))
