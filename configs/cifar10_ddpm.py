"""DDPM on CIFAR-10, unconditional (Ho et al. 2020, 2006.11239).

Global batch 128, Adam 2e-4 with 5,000 steps of warm-up, clipping at 1, EMA 0.9999, 800,000 steps.
No guidance. Protocol: 50,000 samples with 1,000 ancestral steps and the "fixedlarge" variance,
FID to the training set. Published: FID 3.17, Inception Score 9.46 (table 1, L_simple).
Data: `jdiff prepare cifar10`.
"""

import ml_collections

from jdiff.experiment import defaults
from jdiff.models import ddpm_cifar10


def get_config() -> ml_collections.ConfigDict:
    c = defaults()
    c.name = "CIFAR-10: DDPM"
    c.data.name = "cifar10"
    c.data.flip = True
    c.model.update({"name": "unet", **ddpm_cifar10(), "num_classes": 0})
    c.schedule.update({"name": "ddpm_linear", "T": 1000, "beta_start": 1e-4, "beta_end": 0.02})
    c.parameterization.target = "eps"
    c.parameterization.time = "step"
    c.loss.distribution.name = "uniform"  # over the steps 1..1000
    c.loss.null_rate = 0.0
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup = 5000
    c.optimizer.clip = 1.0
    c.ema = {"ema": {"kind": "constant", "decay": 0.9999}}
    c.train.batch_size = 128
    c.train.steps = 800_000
    c.train.log_every = 100
    c.train.sample_every = 20_000
    c.train.checkpoint_every = 10_000
    c.sampling.solver.update({"name": "ddpm", "variance": 1.0})
    c.sampling.grid.update({"name": "trailing", "steps": 1000})
    c.sampling.threshold = "static"  # clip_denoised
    c.evaluation.num = 50_000
    c.evaluation.reference = "train"
    c.evaluation.features = "inception"
    return c
