"""Class-conditional 8 x 8 digits: a small DiT trained by flow matching, minutes on two cores.

Rectified flow with a velocity network and logit-normal times (SD3's rf/lognorm(0, 1)). Global batch
64. Guidance: scale 1 is the conditional model (10 % of the labels are dropped in training).
Protocol: as configs/digits.py, with 25 Heun steps uniform in t. No published figure.
"""

import ml_collections

from jdiff.experiment import defaults


def get_config() -> ml_collections.ConfigDict:
    c = defaults()
    c.name = "digits: DiT, rectified flow"
    c.model.update(
        {"name": "dit", "patch": 2, "width": 96, "depth": 6, "heads": 4, "scan": True}
    )  # fmt: skip
    c.schedule.name = "rectified_flow"
    c.parameterization.target = "velocity"
    c.parameterization.time = "t1000"  # DiT's sinusoids are made for 0..1000
    c.loss.distribution.update({"name": "logit_normal", "mean": 0.0, "std": 1.0})
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = 100
    c.optimizer.clip = 1.0
    c.ema = {"ema": {"kind": "constant", "decay": 0.995, "warmup": 0.05}}
    c.train.batch_size = 64
    c.train.steps = 3000
    c.train.sample_every = 1000
    c.train.checkpoint_every = 1000
    c.sampling.grid.update({"name": "uniform", "steps": 25})
    c.sampling.guidance.scale = 1.5
    c.evaluation.features = "classifier"
    return c
