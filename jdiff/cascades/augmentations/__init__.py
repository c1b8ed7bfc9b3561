"""Augmentations of the low-resolution input of a stage: the same function in training and sampling.

    augmentation = gaussian(high=0.5)
    level = augmentation.draw(key, 64)              # training: one a sample
    small = augmentation(keys, small, level)        # level 0 is the identity, bit for bit

Who lives here: one file per kind, each a frozen pytree whose ranges are leaves. A kind that `tells`
gives the network its level as a condition. `BY_NAME` is what configs name, `build` reads a section.
"""

from jdiff.cascades.augmentations.base import Augmentation, none
from jdiff.cascades.augmentations.blur import blur
from jdiff.cascades.augmentations.chain import chain
from jdiff.cascades.augmentations.down_up import down_up
from jdiff.cascades.augmentations.gaussian import gaussian
from jdiff.cascades.augmentations.jpeg import jpeg
from jdiff.cascades.augmentations.sections import BY_NAME, build

__all__ = [
    "BY_NAME", "Augmentation", "blur", "build", "chain", "down_up", "gaussian", "jpeg", "none",
]  # fmt: skip
