"""Grids that are published tables of noise levels."""

import jax.numpy as jnp
import numpy as np

from jdiff.errors import choose
from jdiff.grids.base import start, to_data
from jdiff.pytree import Array, PyTree

#: Align Your Steps (Sabour et al. 2024, table 3): sigma / alpha at eleven times.
AYS = {
    "sd15": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029],
    "sdxl": [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029],
    "deepfloyd": [160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006],
    "svd": [700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002],
}


def align_your_steps(schedule: PyTree, n: int, model: str = "sd15") -> Array:
    """The optimised grid of Sabour et al. (2024), log-linear between its eleven levels.

    n + 1 levels, of which the data takes the place of the last: n = 10 is the published grid as
    diffusers and ComfyUI use it.

    Args:
      model: "sd15", "sdxl", "deepfloyd" or "svd". The levels are sigma / alpha: "svd" needs a
        schedule that reaches 700.

    Raises:
      UserError: an unknown model, with the nearest name.
    """
    s = start(schedule, n)
    levels = np.log(AYS[choose("align_your_steps: model", model, AYS)])
    at = np.linspace(0, 10, n + 1)[:-1]
    log_sigma = np.interp(at, np.arange(11), levels)
    return to_data(s, s.time(jnp.asarray(-2.0 * log_sigma, jnp.result_type(float))))
