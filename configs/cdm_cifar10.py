"""A cascade of CIFAR-10, 8 -> 16 -> 32 pixels, class-conditional.

Three U-Nets with EDM's network, preconditioning and noise (Karras et al. 2022, 2206.00364; DDPM++)
in the arrangement of CDM (Ho et al. 2022, 2106.15282): every stage is told the class; the
super-resolution stages also the image before with Gaussian noise of a level s ~ U(0, 1), and that
level (non-truncated conditioning augmentation, section 4.2), which is 0.2 in sampling. The small
images are means of pixels, and enlarged bilinearly. 11.9, 20.3 and 20.3 million parameters.
Global batch 256, Adam 1e-3 with 10 million images of warm-up, dropout 13 %, 51 million images for
each stage. Guidance: scale 1; labels are dropped in 10 % of training, so that other scales can be
had in sampling. Protocol: 50,000 samples, Heun with 18 steps in each stage (35 evaluations), FID to
the training set. No published figure has these resolutions; the cascade is compared with
configs/cifar10_edm.py, and with its own last stage fed with true images.
Data: `jdiff prepare cifar10`.
"""

import ml_collections

from jdiff import staged
from jdiff.experiment import defaults


def get_config() -> ml_collections.ConfigDict:
    return staged.config(
        "CIFAR-10: cascade 8 -> 16 -> 32",
        stage("CIFAR-10, 8 x 8", size=8, channels=96, multipliers=(1, 2), attention=(8, 4)),
        stage("CIFAR-10, 8 -> 16", size=16, channels=96, multipliers=(1, 2, 2), attention=(8,)),
        stage("CIFAR-10, 16 -> 32", size=32, channels=96, multipliers=(1, 2, 2), attention=(16,)),
    )


def stage(name, size, channels, multipliers, attention) -> ml_collections.ConfigDict:
    c = defaults()
    c.name = name
    c.data.name = "cifar10"
    c.data.size = size
    c.data.resample = "box"  # the mean of pixels, as low_res.down="area" takes it
    c.data.flip = True
    c.model.update({"name": "unet", "style": "ddpmpp", "channels": channels, "blocks": 3,
                    "multipliers": multipliers, "attention_sizes": attention,
                    "dropout": 0.13})  # fmt: skip
    if size > 8:
        c.low_res.factor = 2
        c.low_res.augmentation = {"name": "gaussian"}
        c.sampling.aug_level = 0.2
    c.loss.distribution.update({"name": "lognormal", "mean": -1.2, "std": 1.2})
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup = 10_000_000 // 256
    c.ema = {"ema": {"kind": "constant", "halflife_images": 500_000.0, "warmup": 0.05}}
    c.train.batch_size = 256
    c.train.steps = 200_000
    c.train.log_every = 100
    c.train.sample_every = 10_000
    c.train.checkpoint_every = 5000
    c.sampling.grid.update({"name": "karras", "steps": 18})
    c.evaluation.num = 50_000
    c.evaluation.reference = "train"
    c.evaluation.features = "inception"
    return c
