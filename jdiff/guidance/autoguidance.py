"""Autoguidance: guiding a model with a bad version of itself (Karras et al. 2024, 2406.02507)."""

from typing import Any

import jax
import numpy as np

from jdiff.denoisers import as_denoiser
from jdiff.errors import UserError
from jdiff.guidance.base import Extrapolation, Pair
from jdiff.guidance.scales import as_scale, hide, read
from jdiff.pytree import Array, PyTree, is_concrete, struct


@struct
class Autoguidance(Extrapolation):
    """The guided denoiser that `autoguidance` makes: two denoisers and a scale."""

    denoiser: Any
    bad: Any
    scale: Any

    def pair(self, x: PyTree, t: Array, cond: PyTree) -> Pair:
        """One call of each denoiser."""
        cond = dict(cond or {})
        w = read(self.scale, self.schedule, t, cond)
        shown = hide(cond, self.scale)
        return Pair(self.bad(x, t, shown), self.denoiser(x, t, shown), w)


def autoguidance(denoise: Any, bad: Any, scale: Any) -> Autoguidance:
    """bad + scale (denoise - bad); scale = 1 is `denoise` itself.

    The bad denoiser suffers from the same errors and more: a smaller network, or weights from
    earlier in training. It is given the same condition; `fixed(bad, {"label": null})` drops it.

    Args:
      denoise: the good denoiser, which may be guided itself.
      bad: the bad denoiser, on the same schedule.
      scale: a number, `[B]`, `per_sample(...)` or one of `guidance.scales`.

    Raises:
      UserError: the two denoisers carry different schedules; at the call, predictions of different
        shapes.

    >>> guided = guidance.autoguidance(run.denoiser, early.denoiser, 2.0)
    """
    denoise, bad = as_denoiser(denoise), as_denoiser(bad)
    same_schedule("autoguidance: bad", denoise, bad)
    return Autoguidance(denoise, bad, as_scale(scale))


def same_schedule(where: str, denoise: Any, other: Any) -> None:
    """Raises a UserError if both carry a schedule and the schedules are not the same."""
    a, b = (getattr(d, "schedule", None) for d in (denoise, other))
    if a is None or b is None or not is_concrete((a, b)):
        return
    alike = jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(one, two) for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )
    if not alike:
        raise UserError(
            f"{where}: it is on the schedule {b!r}, the other denoiser on {a!r}; at one t their "
            "noise levels would differ."
        )
