"""Guidance: Denoiser -> Denoiser. A guided denoiser is a denoiser, so guidances compose by plain
application and every stage of every solver is guided.

Who lives here: one file per idea, each a frozen pytree whose numbers (scales, intervals, null
conditions) are leaves. What extrapolates is built on one primitive, `extrapolate`: bad + w (good -
bad), with one convention: w = 1 is the plain conditional model, w = 0 the unconditional one. Papers
that write (1 + w) good - w bad (Ho and Salimans 2022, Imagen's predecessors) mean our w - 1.
"""

from jdiff.guidance.base import Guided, extrapolate
from jdiff.guidance.cfg import PerSample, cfg, per_sample
from jdiff.guidance.thresholding import dynamic_threshold, static_threshold

__all__ = [
    "Guided", "PerSample", "cfg", "dynamic_threshold", "extrapolate", "per_sample",
    "static_threshold",
]  # fmt: skip
