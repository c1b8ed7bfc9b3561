"""What guidance by a measurement shares: where y is found, and how a score moves a prediction."""

from typing import Any

from jdiff.guidance.base import Guided
from jdiff.operators import measurement
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, expand
from jdiff.schedules import Schedule, schedule_map
from jdiff.solvers.base import safe_ratio


class Measured(Guided):
    """A denoiser that knows y = A(x0) + noise; y is read from `cond[entry]` `[B, ...]`.

    So y is chunked and sharded with its sample; the denoiser inside is not shown it.
    """

    denoiser: Any
    operator: Any
    entry: str

    def read(self, cond: PyTree) -> tuple[PyTree, dict[str, PyTree]]:
        """(y, the rest of cond)."""
        return measurement(cond, self.entry)


def add_score(
    schedule: PyTree, prediction: Prediction, g: PyTree, t: Array, scale: Array | float
) -> Prediction:
    """The prediction whose score is larger by scale g: x0 + (sigma^2 / alpha) g, eps - sigma g.

    At pure noise, alpha = 0, the score of a measurement says nothing of x0 through x, and x0 stays.
    """

    def x0(s: Schedule, x0: Array, g: Array) -> Array:
        return x0 + expand(scale * safe_ratio(s.sigma(t) ** 2, s.alpha(t)), g) * g

    def eps(s: Schedule, eps: Array, g: Array) -> Array:
        return eps - expand(scale * s.sigma(t), g) * g

    return prediction._replace(
        x0=schedule_map(x0, schedule, prediction.x0, g),
        eps=schedule_map(eps, schedule, prediction.eps, g),
    )
