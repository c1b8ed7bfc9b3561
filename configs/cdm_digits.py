"""A cascade of digits, 4 -> 8 pixels, class-conditional: minutes on two cores.

Two small U-Nets with EDM's preconditioning. The super-resolution stage is told the 4 x 4 image with
Gaussian noise of a level s ~ U(0, 1) and that level (non-truncated conditioning augmentation, Ho et
al. 2022, 2106.15282), and samples at s = 0.2. Global batch 64. Guidance: both stages at scale 1.5,
10 % of the labels are dropped in training. Protocol: as in configs/digits.py, of which this is the
cascaded form, but compared with the training split, so that true input is of held-out images. No
published figure: this is a first try of cascades.
"""

import ml_collections

from jdiff import staged
from jdiff.experiment import defaults


def get_config() -> ml_collections.ConfigDict:
    return staged.config("digits: cascade 4 -> 8", base(), upsampler())


def base() -> ml_collections.ConfigDict:
    c = stage("digits 4 x 4")
    c.data.size = 4
    c.model.update({"name": "unet", "channels": 24, "multipliers": (1,), "blocks": 2,
                    "attention_sizes": (4,)})  # fmt: skip
    return c


def upsampler() -> ml_collections.ConfigDict:
    c = stage("digits 4 -> 8")
    c.data.size = 8
    c.model.update({"name": "unet", "channels": 24, "multipliers": (1, 2), "blocks": 1,
                    "attention_sizes": (4,)})  # fmt: skip
    c.low_res.factor = 2
    c.low_res.augmentation = {"name": "gaussian"}
    c.sampling.aug_level = 0.2
    return c


def stage(name: str) -> ml_collections.ConfigDict:
    """What the stages have in common."""
    c = defaults()
    c.name = name
    c.data.name = "digits"
    c.data.resample = "box"  # the mean of 2 x 2 pixels, as low_res.down="area" takes it
    c.optimizer.learning_rate = 2e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = 100
    c.optimizer.clip = 1.0
    c.ema = {"ema": {"kind": "constant", "decay": 0.995, "warmup": 0.05}}
    c.train.batch_size = 64
    c.train.steps = 2000
    c.train.sample_every = 500
    c.train.checkpoint_every = 500
    c.sampling.guidance.scale = 1.5
    c.evaluation.reference = "train"
    c.evaluation.features = "classifier"
    return c
