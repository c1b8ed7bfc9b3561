"""jdiff: diffusion and flow models in JAX, as small pure functions on pytrees.

    from jdiff import schedules, grids, solvers, guidance, denoisers, sample

The ground floor (these modules, and predictions, losses, distributions, weightings) imports jax
alone. Networks, data, training and evaluation live in the rooms above: jdiff.models, jdiff.data,
jdiff.training, jdiff.evaluation.
"""

from typing import Any

from jdiff import (
    denoisers,
    distributions,
    grids,
    guidance,
    losses,
    predictions,
    schedules,
    solvers,
    weightings,
)
from jdiff.errors import UserError
from jdiff.sampling import sample, stream

__version__ = "0.1.0"

__all__ = [
    "UserError", "denoisers", "distributions", "grids", "guidance", "load_run", "losses",
    "predictions", "sample", "schedules", "solvers", "stream", "weightings",
]  # fmt: skip


def load_run(workdir: str, **options: Any) -> Any:
    """Opens a run directory: see `jdiff.runs.load_run`, imported when it is called."""
    from jdiff.runs import load_run as load

    return load(workdir, **options)
