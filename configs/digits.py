"""Class-conditional 8 x 8 digits: a small U-Net with EDM's preconditioning, minutes on two cores.

Global batch 64. Guidance: scale 1 is the conditional model (10 % of the labels are dropped in
training). Protocol: 1,000 class-balanced guided samples, Heun with 18 steps (35 evaluations); the
share whose intended class a classifier of the real digits finds, and the Frechet distance to the
held-out split beside that of the training split and of noise. No published figure: this is the
data set of a first try.
"""

import ml_collections

from jdiff.experiment import defaults
from jdiff.launching.points import product


def get_config() -> ml_collections.ConfigDict:
    c = defaults()
    c.name = "digits: U-Net, EDM"
    c.model.update(
        {"name": "unet", "channels": 24, "multipliers": (1, 2), "blocks": 1,
         "attention_sizes": (4,)}
    )  # fmt: skip
    c.data.name = "digits"
    c.optimizer.learning_rate = 2e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = 100
    c.optimizer.clip = 1.0
    c.ema = {"ema": {"kind": "constant", "decay": 0.995, "warmup": 0.05},
             "power_10": {"kind": "power", "sigma_rel": 0.10}}  # fmt: skip
    c.train.batch_size = 64
    c.train.steps = 2000
    c.train.sample_every = 500
    c.train.checkpoint_every = 500
    c.sampling.guidance.scale = 1.5
    c.evaluation.features = "classifier"
    return c


def sweep() -> list[dict]:
    """Three learning rates with three seeds each, for `jdiff sweep`."""
    return product({"optimizer.learning_rate": (1e-3, 2e-3, 4e-3), "seed": range(3)})
