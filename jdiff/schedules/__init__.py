"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, as frozen pytrees of numbers.

Conventions, the same for every schedule:

* t grows with noise. `t_data` (0 unless said otherwise) is the data itself: alpha = 1, sigma = 0,
  exactly. Papers whose time runs the other way are mapped here: their t is our 1 - t.
* `[t_min, t_max]` is the domain on which a network is trained and evaluated; solvers step from
  t_max down to t_data and never evaluate a denoiser at t_data.
* logsnr = 2 log(alpha / sigma) falls strictly with t, and `time` is its inverse.
* Numbers (beta_max, sigma_min, ...) are leaves: they can be traced, swept by vmap or learned.

A pytree prefix of schedules gives each part of x its own; `schedule_map` is how the rest of the
ground floor applies them.
"""

from jdiff.schedules.base import Schedule, first, is_schedule, schedule_map
from jdiff.schedules.continuous import (
    EDM,
    Cosine,
    RectifiedFlow,
    VPLinear,
    cosine,
    edm,
    rectified_flow,
    vp_linear,
)  # fmt: skip
from jdiff.schedules.discrete import Discrete, ddpm_linear, from_betas

#: Schedules by name, as configs give them.
BY_NAME = {
    "edm": edm, "vp_linear": vp_linear, "cosine": cosine, "ddpm_linear": ddpm_linear,
    "rectified_flow": rectified_flow,
}  # fmt: skip

__all__ = [
    "BY_NAME", "Cosine", "Discrete", "EDM", "RectifiedFlow", "Schedule", "VPLinear", "cosine",
    "ddpm_linear", "edm", "first", "from_betas", "is_schedule", "rectified_flow", "schedule_map",
    "vp_linear",
]  # fmt: skip
