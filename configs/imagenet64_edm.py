"""EDM on ImageNet 64 x 64, class-conditional, ADM (Karras et al. 2022, 2206.00364, table 2 and 4).

Global batch 4096, Adam 1e-4 with 10 million images of warm-up, dropout 10 %, EMA half-life 50
million images with a 5 % ramp-up, 2,500 million images, bfloat16 (the paper: float16). Labels are
never dropped: no guidance (scale 1).
Protocol: 50,000 samples; Heun with 40 steps (79 evaluations): FID 2.22. Stochastic, 256 steps with
churn 40, s_min 0.05, s_max 50, noise 1.003 (511 evaluations): FID 1.36 (table 5 and figure 5).
Data: TFDS's imagenet2012, centre-cropped as ADM does and resized to 64; it is not downloadable, so
TFDS says where to put the archives.
"""

import ml_collections

from jdiff.experiment import defaults
from jdiff.models import adm_imagenet64


def get_config() -> ml_collections.ConfigDict:
    c = defaults()
    c.name = "ImageNet-64: EDM, ADM"
    c.data.name = "imagenet2012"
    c.data.test_split = "validation"
    c.data.size = 64
    c.data.crop = "adm"
    c.data.threads = 16
    c.model.update({"name": "unet", **adm_imagenet64(), "dtype": "bfloat16", "remat": False})
    c.loss.distribution.update({"name": "lognormal", "mean": -1.2, "std": 1.2})
    c.loss.null_rate = 0.0
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup = 10_000_000 // 4096
    c.ema = {"ema": {"kind": "constant", "halflife_images": 50_000_000.0, "warmup": 0.05}}
    c.train.batch_size = 4096
    c.train.accumulate = 1
    c.train.steps = 2_500_000_000 // 4096
    c.train.log_every = 50
    c.train.sample_every = 5000
    c.train.checkpoint_every = 2500
    c.sampling.grid.update({"name": "karras", "steps": 40})
    c.evaluation.num = 50_000
    c.evaluation.reference = "train"
    c.evaluation.features = "inception"
    return c
