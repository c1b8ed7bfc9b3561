"""Captioned emoji, 16 -> 64 -> 128, class-conditional: a cascade that one GPU trains in hours.

Data: `jdiff prepare emoji`: 21,908 drawings in six styles, rendered once at 128 x 128 on white and
area-downsampled to the size of each stage; the label is the Unicode group (10). Train and test are
split by what is depicted: no subject and no picture of the one is in the other.

Stages, EDM's schedule and preconditioning in each, ADM's U-Nets, 10 % of the labels dropped:
  0  16 x 16; guidance 2 inside an interval.
  1  64 x 64 from 16; Gaussian conditioning augmentation with its level ~ U(0, 1) told (Imagen),
     0.2 in sampling; weaker guidance; dynamic thresholding.
  2  128 x 128 from 64; trained on patches of 64 x 64 pixels (attention in the middle only), sampled
     whole; half of the inputs blurred in training (CDM, section 4.3); dynamic thresholding.
There is no published figure. After training, choose sampling.aug_level and the guidance of each
stage by `jdiff evaluate`: they need no retraining.

Cost (41, 57 and 23 M parameters in bfloat16): by `jdiff plan --devices=H100` a step takes 12, 50
and 26 ms at best, which is 0.3 + 2.1 + 0.7 hours in all. Reading an image takes 0.6 ms of a core:
eight threads read, and the base waits for them.
`--config=configs/cdm_emoji.py:small` has the same stages with networks of a first try: 0.23, 0.32
and 0.19 core-seconds a step, 500 steps each, some minutes on two cores.
"""

import ml_collections

from jdiff import staged
from jdiff.errors import choose
from jdiff.experiment import defaults

#: Of each stage: the network, images a step, steps; then the same of the first try.
SIZES = {
    "full": (
        ({"channels": 128, "multipliers": (1, 2, 2), "blocks": 3, "attention_sizes": (8, 4)},
         256, 100_000),
        ({"channels": 96, "multipliers": (1, 2, 3, 4), "blocks": 2, "attention_sizes": (16, 8)},
         128, 150_000),
        ({"channels": 64, "multipliers": (1, 2, 3, 4), "blocks": 2, "attention_sizes": ()},
         128, 100_000),
    ),
    "small": (
        ({"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention_sizes": (8,)}, 32, 500),
        ({"channels": 16, "multipliers": (1, 2, 2), "blocks": 1, "attention_sizes": ()}, 8, 500),
        ({"channels": 8, "multipliers": (1, 2, 4), "blocks": 1, "attention_sizes": ()}, 8, 500),
    ),
}  # fmt: skip


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    stages = [_common(size, k) for k in range(3)]
    base, middle, last = stages

    base.name = "emoji 16"
    base.data.size = 16
    base.sampling.grid.steps = 32
    base.sampling.guidance.update({"scale": 2.0, "interval": (-3.0, 3.0)})

    middle.name = "emoji 16 -> 64"
    middle.data.size = 64
    middle.low_res.factor = 4.0
    middle.low_res.augmentation = {"name": "gaussian", "low": 0.0, "high": 1.0}
    middle.sampling.aug_level = 0.2
    middle.sampling.grid.steps = 18
    middle.sampling.guidance.update({"scale": 1.5, "interval": (-1.0, 4.0)})

    last.name = "emoji 64 -> 128"
    last.data.size = 64
    last.data.crop = "patch"
    last.low_res.factor = 2.0
    last.low_res.augmentation = {"name": "blur", "size": 3, "low": 0.4, "high": 0.6, "share": 0.5}
    last.sampling.grid.steps = 12

    for stage in (middle, last):
        stage.sampling.threshold = {"name": "dynamic", "quantile": 0.995}
    if size == "small":
        for stage in stages:
            stage.sampling.grid.steps = 8
    return staged.config("emoji 16 -> 64 -> 128", *stages)


def _common(size: str, k: int) -> ml_collections.ConfigDict:
    network, batch, steps = SIZES[choose("configs/cdm_emoji.py: size", size, SIZES)][k]
    small = size == "small"
    c = defaults()
    c.data.name = "emoji"
    c.data.resample = "box"
    c.data.threads = 2 if small else 8
    c.model.update({"name": "unet", "style": "adm", **network})
    if not small:
        c.model.update({"dropout": 0.1, "dtype": "bfloat16"})
    c.parameterization.sigma_data = 0.6  # the pixels' deviation: 0.55 at 16 x 16, 0.62 at 128 x 128
    c.optimizer.learning_rate = 1e-3 if small else 2e-4
    c.optimizer.warmup = 100 if small else 5000
    c.optimizer.clip = 1.0
    halflife = 2000.0 if small else 500_000.0
    c.ema = {"ema": {"kind": "constant", "halflife_images": halflife, "warmup": 0.05}}
    c.train.batch_size = batch
    c.train.steps = steps
    c.train.sample_every = 250 if small else 10_000
    c.train.checkpoint_every = 250 if small else 5000
    c.sampling.batch = 16 if small else 64
    c.evaluation.num = 40 if small else 2000
    c.evaluation.reference = "train"
    return c
