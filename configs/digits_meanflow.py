"""Class-conditional 8 x 8 digits in one step: a small DiT trained by MeanFlow, minutes on 2 cores.

MeanFlow (Geng et al. 2025): the network learns the mean velocity between any two times, so that one
evaluation leads from noise to an image; guidance 2 is learned, not added in sampling (10 % of the
labels are dropped in training). Its choices: logit-normal times (-0.4, 1), t and t - s embedded,
adaptive weight p = 1, which makes the reported loss 1 throughout: watch the samples. Global batch
64. Protocol: as configs/digits.py, with one evaluation an image; --config.sampling.grid.steps=2
takes two. No published figure.
"""

import ml_collections

from jdiff.experiment import defaults


def get_config() -> ml_collections.ConfigDict:
    c = defaults()
    c.name = "digits: DiT, MeanFlow"
    c.model.update(
        {"name": "dit", "patch": 2, "width": 64, "depth": 4, "heads": 4, "scan": True,
         "scalars": ("t-s",), "time_scale": 30.0}
    )  # fmt: skip
    c.schedule.name = "rectified_flow"
    c.parameterization.target = "velocity"
    c.parameterization.time = "t"  # so that t - s is a difference; the model scales both
    c.loss.name = "meanflow"
    c.loss.arguments.update({"share": 0.25, "power": 1.0, "guidance": 2.0})
    c.loss.distribution.update({"name": "logit_normal", "mean": -0.4, "std": 1.0})
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 2e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = 100
    c.optimizer.clip = 1.0
    c.ema = {"ema": {"kind": "constant", "decay": 0.998, "warmup": 0.05}}
    c.train.batch_size = 64
    c.train.steps = 3000
    c.train.sample_every = 1000
    c.train.checkpoint_every = 1000
    c.sampling.solver.name = "flow_map"
    c.sampling.grid.update({"name": "uniform", "steps": 1})
    c.evaluation.features = "classifier"
    return c
