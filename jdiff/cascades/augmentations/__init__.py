"""Augmentations of the low-resolution input of a stage: the same function in training and sampling.

Who lives here: one file per kind, each a frozen pytree whose ranges are leaves. A kind that `tells`
gives the network its level as a condition. `BY_NAME` is what configs name, `build` reads a section.
"""

from jdiff.cascades.augmentations.base import Augmentation, none
from jdiff.cascades.augmentations.gaussian import gaussian

__all__ = ["Augmentation", "gaussian", "none"]
