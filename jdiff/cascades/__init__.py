"""Cascades: stages of growing resolution, each conditioned on the (augmented) image before it.

    base = stage(denoise_8, times=times, shape=(8, 8, 3))
    up = stage(denoise_32, times=times, shape=(32, 32, 3), level=0.2,
               low_res=low_res(4, augmentations.gaussian()))
    images = cascade(base, up).sample(key, num=64)

A stage is trained by itself, on images and the input that `LowRes.training` makes of them, and
sampling makes its input by the same function (Ho et al. 2022, "Cascaded Diffusion Models",
2106.15282). Stages and cascades are pytrees; a stage's denoiser is any: a network, guided or not,
or the exact one of a data set (`exact`).
"""

from jdiff.cascades import augmentations
from jdiff.cascades.cascade import Cascade, cascade
from jdiff.cascades.exact import Exact, exact
from jdiff.cascades.low_res import LowRes, low_res
from jdiff.cascades.stages import Stage, stage

__all__ = [
    "Cascade", "Exact", "LowRes", "Stage", "augmentations", "cascade", "exact", "low_res", "stage",
]  # fmt: skip
