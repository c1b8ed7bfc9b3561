"""Guidance: Denoiser -> Denoiser. A guided denoiser is a denoiser, so guidances compose by plain
application and every stage of every solver is guided.

Who lives here: one file per idea, each a frozen pytree whose numbers (scales, intervals, null
conditions) are leaves. What extrapolates is built on one primitive, `extrapolate`: bad + w (good -
bad), with one convention: w = 1 is the plain conditional model, w = 0 the unconditional one. Papers
that write (1 + w) good - w bad (Ho and Salimans 2022, Imagen's predecessors) mean our w - 1.

Three kinds: what makes a pair and extrapolates it (`Extrapolation`: cfg, autoguidance), what
refines any such guidance (`Refinement`: apg, cfg_pp, cfg_zero, frequency, magnitude, rescale,
tangential), and what takes any denoiser. Extrapolation from a weakened self (perturbed_attention,
smoothed_energy, skip_layer) replaces parts of the network; dps, pigdm and ddnm condition on a
measurement (jdiff.operators, docs/inverse.md). docs/guidance.md is the chapter on them.
"""

from jdiff.guidance import scales
from jdiff.guidance.apg import apg
from jdiff.guidance.autoguidance import autoguidance
from jdiff.guidance.base import Extrapolation, Guided, Pair, Refinement, extrapolate
from jdiff.guidance.cfg import cfg
from jdiff.guidance.cfg_pp import cfg_pp
from jdiff.guidance.cfg_zero import cfg_zero, zero_init
from jdiff.guidance.classifier import classifier
from jdiff.guidance.conditions import composed, fixed, negative, nested
from jdiff.guidance.ddnm import ddnm
from jdiff.guidance.dps import dps
from jdiff.guidance.experts import product, union
from jdiff.guidance.frequency import frequency
from jdiff.guidance.magnitude import magnitude
from jdiff.guidance.momentum import with_momentum
from jdiff.guidance.perturbed_attention import perturbed, perturbed_attention
from jdiff.guidance.pigdm import pigdm
from jdiff.guidance.rescale import rescale
from jdiff.guidance.scales import PerSample, per_sample
from jdiff.guidance.skip_layer import skip_layer, skipping
from jdiff.guidance.smoothed_energy import smoothed, smoothed_energy
from jdiff.guidance.tangential import tangential
from jdiff.guidance.thresholding import dynamic_threshold, static_threshold

__all__ = [
    "Extrapolation", "Guided", "Pair", "PerSample", "Refinement", "apg", "autoguidance", "cfg",
    "cfg_pp", "cfg_zero", "classifier", "composed", "ddnm", "dps", "dynamic_threshold",
    "extrapolate", "fixed", "frequency", "magnitude", "negative", "nested", "per_sample",
    "perturbed", "perturbed_attention", "pigdm", "product", "rescale", "scales", "skip_layer",
    "skipping", "smoothed", "smoothed_energy", "static_threshold", "tangential", "union",
    "with_momentum", "zero_init",
]  # fmt: skip
