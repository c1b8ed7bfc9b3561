"""jdiff: diffusion and flow models in JAX, as small pure functions on pytrees.

    from jdiff import schedules, grids, solvers, guidance, denoisers, sample

The ground floor (the modules below) imports jax alone. Networks, data, training and evaluation live
in the rooms above: jdiff.models, jdiff.data, jdiff.training, jdiff.evaluation.
"""

from typing import Any

from jdiff import (
    bound,
    cascades,
    couplings,
    denoisers,
    distributions,
    grids,
    guidance,
    interpolants,
    likelihood,
    losses,
    noise,
    operators,
    predictions,
    presets,
    schedules,
    solvers,
    weightings,
)
from jdiff.errors import UserError
from jdiff.inversion import invert
from jdiff.sampling import sample, stream
from jdiff.sweeps import Sweep, sweep

__version__ = "0.1.0"

__all__ = [
    "Sweep", "UserError", "bound", "cascades", "couplings", "denoisers", "distributions", "grids",
    "guidance", "interpolants", "invert", "likelihood", "load_autoencoder",
    "load_cascade", "load_run", "losses", "noise", "operators", "predictions", "presets", "sample",
    "schedules", "solvers", "stream", "sweep", "weightings",
]  # fmt: skip


def load_run(workdir: str, **options: Any) -> Any:
    """Opens a run directory: see `jdiff.runs.load_run`, imported when it is called."""
    from jdiff.runs import load_run as load

    return load(workdir, **options)


def load_autoencoder(workdir: str, **options: Any) -> Any:
    """The `autoencoders.Autoencoder` that a run trained; options as of `load_run`.

    See `jdiff.first_stage.trained.load`, imported when it is called.
    """
    from jdiff.first_stage.trained import load

    return load(workdir, **options).coder


def load_cascade(workdir: str, **options: Any) -> Any:
    """Opens a cascade's folder: see `jdiff.staged.load_cascade`, imported when it is called."""
    from jdiff.staged import load_cascade as load

    return load(workdir, **options)
