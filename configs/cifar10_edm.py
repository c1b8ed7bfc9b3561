"""EDM on CIFAR-10, class-conditional, DDPM++ (Karras et al. 2022, 2206.00364, configuration F).

Global batch 512, Adam 1e-3 with 10 million images of warm-up, dropout 13 %, EMA half-life 500,000
images with a 5 % ramp-up, 200 million images. Labels are never dropped: no guidance (scale 1).
Protocol: 50,000 samples, Heun with 18 steps (35 evaluations), FID to the training set, the best of
three draws. Published: FID 1.79 (table 2, F); without augmentation 1.88 (E). EDM's 12 % non-leaking
augmentation is not in the pipeline, mirroring is: the comparable figure is E's 1.88.
Data: `jdiff prepare cifar10`.
"""

import ml_collections

from jdiff.experiment import defaults
from jdiff.models import ddpmpp_cifar10


def get_config() -> ml_collections.ConfigDict:
    c = defaults()
    c.name = "CIFAR-10: EDM, DDPM++"
    c.data.name = "cifar10"
    c.data.flip = True
    c.model.update({"name": "unet", **ddpmpp_cifar10(augment_dim=0)})
    c.loss.distribution.update({"name": "lognormal", "mean": -1.2, "std": 1.2})
    c.loss.null_rate = 0.0
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup = 10_000_000 // 512
    c.ema = {"ema": {"kind": "constant", "halflife_images": 500_000.0, "warmup": 0.05}}
    c.train.batch_size = 512
    c.train.steps = 200_000_000 // 512
    c.train.log_every = 100
    c.train.sample_every = 10_000
    c.train.checkpoint_every = 5000
    c.sampling.grid.update({"name": "karras", "steps": 18})
    c.evaluation.num = 50_000
    c.evaluation.reference = "train"
    c.evaluation.features = "inception"
    return c
