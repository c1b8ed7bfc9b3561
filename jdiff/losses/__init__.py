"""Training losses, unreduced: `[B]`, one number a sample, the mean over its dimensions.

A file here is one idea: a target that a network is trained on and the loss of missing it. What
lives here takes a key, a denoiser (or two: a student and its teacher) and clean data, draws its
times through `distributions`, its endpoints through `couplings`, counts errors through
`weightings`, and returns `[B]` without reducing it. Networks, optimisers, averages and the loop do
not: a loss knows a denoiser and nothing of who trains it.
"""

from jdiff.losses.consistency import consistency, consistency_distillation
from jdiff.losses.denoising import (
    Distribution,
    Weighting,
    denoising,
    flow_matching,
    normal,
)
from jdiff.losses.interpolants import conditional_flow, latent_noise
from jdiff.losses.meanflow import meanflow
from jdiff.losses.progressive import progressive
from jdiff.losses.reflow import reflow
from jdiff.losses.shortcut import shortcut
from jdiff.losses.variance import hybrid

#: Losses that a config can name. Of their arguments, training hands over those that are its own
#: (see `experiment.Experiment.loss`); the others are the config's.
BY_NAME = {
    "denoising": denoising, "flow_matching": flow_matching, "consistency": consistency,
    "consistency_distillation": consistency_distillation, "progressive": progressive,
    "reflow": reflow, "shortcut": shortcut, "meanflow": meanflow,
    "conditional_flow": conditional_flow, "hybrid": hybrid,
}  # fmt: skip

#: Those whose networks are asked with the target time in cond["s"].
FLOW_MAPS = ("shortcut", "meanflow")

__all__ = [
    "BY_NAME", "Distribution", "FLOW_MAPS", "Weighting", "conditional_flow", "consistency",
    "consistency_distillation", "denoising", "flow_matching", "hybrid", "latent_noise", "meanflow",
    "normal", "progressive", "reflow", "shortcut",
]  # fmt: skip
