"""Autoencoders trained here: the first stage of latent diffusion, an experiment like others.

Who lives here: `objective` (what is minimised), with `pixels` (how near), `discriminator` and
`adversary` (the other player); `experiment` (from a config to these), `trained` (opening a run),
`assessment` (figures of reconstructions) and `kind` (what `jdiff.kinds` asks for). The networks are
in `jdiff.autoencoders`; LPIPS is in `jdiff.evaluation.lpips`.
"""

from jdiff.first_stage.defaults import defaults as defaults
