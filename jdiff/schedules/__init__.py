"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, as frozen pytrees of numbers.

Conventions, the same for every schedule:

* t grows with noise. `t_data` (0; -inf where sigma reaches 0 at no finite time) is the data itself:
  alpha = 1, sigma = 0, exactly. Papers whose time runs the other way are mapped here: their t is
  our 1 - t.
* `[t_min, t_max]` is the domain on which a network is trained and evaluated; solvers step from
  t_max down to t_data and never evaluate a denoiser at t_data.
* logsnr = 2 log(alpha / sigma) falls strictly with t, and `time` is its inverse.
* Numbers (beta_max, sigma_min, ...) are leaves: they can be traced, swept by vmap or learned.

A pytree prefix of schedules gives each part of x its own; `schedule_map` is how the rest of the
ground floor applies them.
"""

from jdiff.schedules.base import Schedule, first, is_schedule, schedule_map
from jdiff.schedules.discrete import (
    Discrete,
    Ladder,
    ddpm_linear,
    from_betas,
    ncsn,
    scaled_linear,
    squared_cosine,
)
from jdiff.schedules.flows import Polynomial, RectifiedFlow, polynomial, rectified_flow
from jdiff.schedules.learned import Monotone, monotone
from jdiff.schedules.sdes import (
    EDM,
    VE,
    SubVP,
    VESqrt,
    VPLinear,
    edm,
    sub_vp,
    ve,
    ve_sqrt,
    vp_linear,
)
from jdiff.schedules.variance_preserving import (
    Cosine,
    LinearLogSNR,
    PowerVP,
    Sigmoid,
    cosine,
    gvp,
    linear_gamma,
    linear_logsnr,
    linear_vp,
    sigmoid,
)
from jdiff.schedules.wrappers import (
    Shifted,
    ZeroTerminalSNR,
    flux_shift,
    shift_time,
    shifted,
    zero_terminal_snr,
)

#: Schedules by name, as configs give them. The wrappers and `monotone` take a schedule or a key.
BY_NAME = {
    "edm": edm, "ve": ve, "ve_sqrt": ve_sqrt, "vp_linear": vp_linear, "sub_vp": sub_vp,
    "cosine": cosine, "gvp": gvp, "sigmoid": sigmoid, "linear_vp": linear_vp,
    "linear_gamma": linear_gamma, "linear_logsnr": linear_logsnr,
    "rectified_flow": rectified_flow, "polynomial": polynomial,
    "ddpm_linear": ddpm_linear, "scaled_linear": scaled_linear, "squared_cosine": squared_cosine,
    "ncsn": ncsn,
}  # fmt: skip

__all__ = [
    "BY_NAME", "Cosine", "Discrete", "EDM", "Ladder", "LinearLogSNR", "Monotone", "Polynomial",
    "PowerVP", "RectifiedFlow", "Schedule", "Shifted", "Sigmoid", "SubVP", "VE", "VESqrt",
    "VPLinear", "ZeroTerminalSNR", "cosine", "ddpm_linear", "edm", "first", "flux_shift",
    "from_betas", "gvp", "is_schedule", "linear_gamma", "linear_logsnr", "linear_vp", "monotone",
    "ncsn", "polynomial", "rectified_flow", "scaled_linear", "schedule_map", "shift_time",
    "shifted", "sigmoid", "squared_cosine", "sub_vp", "ve", "ve_sqrt", "vp_linear",
    "zero_terminal_snr",
]  # fmt: skip
