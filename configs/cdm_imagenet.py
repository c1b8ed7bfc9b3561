"""CDM on ImageNet, class-conditional: 32 -> 64 -> 256 pixels (Ho et al. 2022, 2106.15282).

The paper's pipelines are 32 -> 64 -> 128 and 32 -> 64 -> 256; both of its large networks enlarge 64
pixels. `configs/cdm_imagenet.py:32-64-128` is the other one; `:32-64-128-256` has all four
resolutions, its last stage the paper's network for 256 pixels on an input of 128, which the paper
does not have.
Published, 50,000 samples against the training set: FID 1.11 at 32, 1.48 at 64, 3.52 at 128 and 4.88
at 256 pixels, all without guidance: labels are never dropped.
Where a comment says "not given", the paper does not say and the value is ours; one with a question
mark is to be checked against the paper's appendix B before numbers are compared.
Data: TFDS's imagenet2012 (see configs/imagenet64_edm.py), cropped alike in all stages, made smaller
by averaging areas, so that a stage's input is the image that the stage before was trained on.
"""

import ml_collections

from jdiff import staged
from jdiff.errors import choose
from jdiff.experiment import defaults
from jdiff.models import cdm_imagenet

ROUTES = ("32", "32-64", "32-64-128", "32-64-256", "32-64-128-256")


def get_config(route: str = "32-64-256") -> ml_collections.ConfigDict:
    sizes = [int(size) for size in choose("cdm_imagenet: route", route, ROUTES).split("-")]
    stages = [_base()]
    for before, size in zip(sizes, sizes[1:]):
        stages.append(_to_64() if size == 64 else _large(before, size))
    return staged.config(f"ImageNet: CDM {route}", *stages)


def _common(size: int) -> ml_collections.ConfigDict:
    c = defaults()
    c.name = f"ImageNet-{size}: CDM"
    c.data.name = "imagenet2012"
    c.data.test_split = "validation"
    c.data.size = size
    c.data.crop = "center"  # not given
    c.data.resample = "box"
    c.data.flip = True  # found to help at 256 pixels (5.00 to 4.88); at the others not given
    c.data.threads = 16
    # Appendix B: channels and multipliers; blocks, attention, heads and dropout (?).
    c.model.update({"name": "unet", **cdm_imagenet(size), "dtype": "bfloat16"})  # dtype: not given
    c.parameterization.target = "eps"
    c.loss.distribution.name = "uniform"  # over the steps
    c.loss.null_rate = 0.0
    c.optimizer.learning_rate = 1e-4  # Adam, appendix B (?)
    c.optimizer.warmup = 0  # not given
    c.ema = {"ema": {"kind": "constant", "decay": 0.9999}}  # appendix B (?)
    c.train.log_every = 100
    c.train.sample_every = 20_000
    c.train.checkpoint_every = 5000
    c.sampling.threshold = "static"  # stages hand over images in [-1, 1]
    c.evaluation.num = 50_000
    c.evaluation.reference = "train"
    c.evaluation.features = "inception"
    return c


def _improved(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Improved DDPM (Nichol and Dhariwal 2021), as the first two stages have it (appendix B)."""
    c.schedule.update({"name": "squared_cosine", "T": 4000})
    c.parameterization.time = "step"
    c.parameterization.variance = "learned_range"
    c.loss.name = "hybrid"  # with improved DDPM's weight, 0.001
    c.train.batch_size = 2048
    c.sampling.solver.update({"name": "ddpm"})
    c.sampling.grid.update({"name": "trailing", "steps": 4000})
    c.sampling.batch = 512
    return c


def _base() -> ml_collections.ConfigDict:
    c = _improved(_common(32))
    c.train.steps = 700_000  # appendix B (?)
    return c


def _to_64() -> ml_collections.ConfigDict:
    c = _improved(_common(64))
    c.train.steps = 400_000  # appendix B (?)
    c.low_res.factor = 2.0
    # Non-truncated conditioning augmentation, its level in steps of this schedule,
    # told to the network. Best in the paper: 751 or 1251 (FID 1.48; 1.71 without). Truncated, 501
    # or 751: --config.stages.1.sampling.truncate=True.
    same = dict(c.schedule)
    c.low_res.augmentation.update({"name": "gaussian", "schedule": same})  # of all steps (?)
    c.sampling.aug_level = 751.0
    return c


def _large(before: int, size: int) -> ml_collections.ConfigDict:
    """SR3's networks and process (Saharia et al. 2021, 2104.07636), without learned variance."""
    c = _common(size)
    c.low_res.factor = size / before
    # 3 x 3, sigma ~ U(0.4, 0.6), half of the images; in training only.
    blur = {"name": "blur", "size": 3, "low": 0.4, "high": 0.6, "share": 0.5}
    c.low_res.augmentation.update(blur)
    # 2000 steps in training (?), and 100 in sampling, whose betas rise from 1e-4 to 0.1 (?): every
    # 20th step of this table has nearly those. The network is told the level and not the step.
    c.schedule.update({"name": "ddpm_linear", "T": 2000, "beta_start": 1e-4, "beta_end": 0.005})
    c.parameterization.time = "log_sigma"
    c.train.batch_size = 1024  # at 256 pixels FID 5.75 with less, 5.00 with this
    c.train.steps = 500_000  # appendix B (?)
    c.sampling.solver.update({"name": "ddpm", "variance": 0.0})  # the posterior's: not given
    c.sampling.grid.update({"name": "trailing", "steps": 100})
    c.sampling.batch = 128
    return c
