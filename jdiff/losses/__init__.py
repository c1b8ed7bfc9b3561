"""Training losses, unreduced: `[B]`, one number a sample, the mean over its dimensions.

A file here is one idea: a target that a network is trained on and the loss of missing it. What
lives here takes a key, a denoiser (or two: a student and its teacher) and clean data, draws its
times through `distributions`, its endpoints through `couplings`, counts errors through
`weightings`, and returns `[B]` without reducing it. Networks, optimisers, averages and the loop do
not: a loss knows a denoiser and nothing of who trains it.
"""

from jdiff.losses.denoising import Distribution, Weighting, denoising, flow_matching

__all__ = ["Distribution", "Weighting", "denoising", "flow_matching"]
