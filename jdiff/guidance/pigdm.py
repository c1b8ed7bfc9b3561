"""Pseudo-inverse guidance, PiGDM (Song et al. 2023, "Pseudoinverse-guided diffusion models")."""

from typing import Any

import jax

from jdiff.denoisers import as_denoiser, schedule_of
from jdiff.errors import UserError
from jdiff.guidance.measured import Measured, add_score
from jdiff.operators import as_operator, residual
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, expand, static, struct
from jdiff.schedules import first


@struct
class PiGDM(Measured):
    """The guided denoiser that `pigdm` makes."""

    denoiser: Any
    operator: Any
    scale: Array | float
    noise: Array | float
    variance: Array | float
    entry: str = static()

    def __call__(self, x: PyTree, t: Array, cond: PyTree = None) -> Prediction:
        """x `[B, ...]`, t `[B]`, cond with y -> guided prediction: one call and its gradient."""
        t = broadcast_time(t, x)
        y, rest = self.read(cond)
        schedule = schedule_of(self.denoiser)

        def mean(x: PyTree) -> tuple[PyTree, Prediction]:
            prediction = self.denoiser(x, t, rest)
            return prediction.x0, prediction

        x0, pull, prediction = jax.vjp(mean, x, has_aux=True)
        s = first(schedule)
        alpha2, sigma2 = s.alpha(t) ** 2, s.sigma(t) ** 2
        r2 = self.variance * sigma2 / (alpha2 * self.variance + sigma2)
        if hasattr(self.operator, "solve"):
            gap = residual(self.operator, y, x0)
            back = self.operator.adjoint(self.operator.solve(gap, r2, self.noise**2))
        else:
            inverse = self.operator.pinv
            gap = jax.tree.map(lambda a, b: a - b, inverse(y), inverse(self.operator(x0)))
            back = jax.tree.map(lambda a: a / expand(r2, a), gap)
        back = jax.tree.map(lambda a, like: a.astype(like.dtype), back, x0)
        (g,) = pull(back)
        return add_score(schedule, prediction, g, t, self.scale)


def pigdm(
    denoise: Any, operator: Any, noise: Array | float = 0.0, scale: Array | float = 1.0,
    variance: Array | float = 1.0, entry: str = "y",
) -> PiGDM:  # fmt: skip
    """The score gains J^T A^T (r^2 A A^T + noise^2 I)^-1 (y - A x0), J = dx0 / dx_t.

    The gradient of log p(y | x_t) if x0 given x_t were normal with covariance r_t^2 I about the
    denoiser's x0, r_t^2 = v sigma^2 / (alpha^2 v + sigma^2): exact for data N(m, v I) and any
    linear operator. Without noise A^T (A A^T)^-1 is the pseudo-inverse; for a function that has one
    (`operators.function(fn, pinv)`) the residual is pinv(y) - pinv(A(x0)). (The paper
    multiplies the noiseless score by r_t^2 on top, an adaptive weight without which it is Bayes'.)

    Args:
      denoise: a denoiser with a schedule, differentiable in x.
      operator: from `jdiff.operators`: linear, or a function with a pseudo-inverse.
      noise: the standard deviation of y's noise.
      scale: multiplies the gradient; 1 is Bayes' rule.
      variance: v, the data's variance an entry; 1 in the paper.
      entry: of cond, where y `[B, ...]` is found.

    Raises:
      UserError: an operator without `solve` and `pinv`, or noise on one without `solve`; no
        schedule; at the call, no y or of another shape.
    """
    denoise, operator = as_denoiser(denoise), as_operator(operator)
    schedule_of(denoise, where="pigdm")
    if isinstance(noise, int | float) and noise < 0:
        raise UserError(f"pigdm: noise={noise} given; it is not negative.")
    if not hasattr(operator, "solve"):
        if not hasattr(operator, "pinv"):
            raise UserError(
                "pigdm: the operator has no pseudo-inverse; use one of jdiff.operators, or dps."
            )
        if not (isinstance(noise, int | float) and noise == 0):
            raise UserError("pigdm: noise needs a linear operator; use dps.")
    return PiGDM(denoise, operator, scale, noise, variance, entry)
