"""Null-space projection, DDNM (Wang et al. 2022, 2212.00490): noiseless linear measurements."""

from typing import Any

import jax

from jdiff.denoisers import as_denoiser, schedule_of
from jdiff.errors import UserError
from jdiff.guidance.measured import Measured
from jdiff.operators import as_operator, residual
from jdiff.predictions import Prediction, from_x0
from jdiff.pytree import Array, PyTree, broadcast_time, static, struct


@struct
class DDNM(Measured):
    """The guided denoiser that `ddnm` makes."""

    denoiser: Any
    operator: Any
    entry: str = static()

    def __call__(self, x: PyTree, t: Array, cond: PyTree = None) -> Prediction:
        """x `[B, ...]`, t `[B]`, cond with y -> projected prediction: one call."""
        t = broadcast_time(t, x)
        y, rest = self.read(cond)
        prediction = self.denoiser(x, t, rest)
        x0 = project(self.operator, y, prediction.x0)
        made = from_x0(schedule_of(self.denoiser), x, x0, t)
        return prediction._replace(x0=made.x0, eps=made.eps)


def project(operator: Any, y: PyTree, x0: PyTree) -> PyTree:
    """A^+ y + (I - A^+ A) x0: the nearest point to x0 with A x = y."""
    gap = residual(operator, y, x0)
    if hasattr(operator, "solve"):
        return jax.tree.map(lambda a, b: a + b, x0, operator.pinv(gap))
    ranges = operator.pinv(y), operator.pinv(operator(x0))  # not linear
    return jax.tree.map(lambda a, b, c: a + (b - c), x0, *ranges)


def ddnm(denoise: Any, operator: Any, entry: str = "y") -> DDNM:
    """x0 is replaced by A^+ y + (I - A^+ A) x0: y fixes the range, the denoiser the null space.

    Then A x0 = y at every step, and in the sample. Needs no gradient. With a mask it is the
    replacement of known pixels, the denoiser's half of RePaint. For noisy y see `solvers.ddnm`.

    Args:
      denoise: a denoiser with a schedule.
      operator: from `jdiff.operators`, with a pseudo-inverse.
      entry: of cond, where y `[B, ...]` is found.

    Raises:
      UserError: an operator without pseudo-inverse; at the call, no y or of another shape.
    """
    denoise, operator = as_denoiser(denoise), as_operator(operator)
    schedule_of(denoise, where="ddnm")
    if not hasattr(operator, "pinv"):
        raise UserError("ddnm: the operator has no pseudo-inverse; use one of jdiff.operators.")
    return DDNM(denoise, operator, entry)
