"""Imagen's cascade from text: 64 -> 256 -> 1024 pixels (Saharia et al. 2022, 2205.11487).

ADM's U-Net at 64 pixels and two Efficient U-Nets, all three told the text as embeddings of T5-XXL,
the last two also the level of the noise on their input. Published: zero-shot FID-30K 7.27 on COCO
at 256 pixels; there is no table per stage.
Where a comment says "not given", the paper does not say and the value is ours; one with a question
mark is to be checked against the paper before numbers are compared.
Data: the paper's are not public (460 M pairs of its own and LAION-400M). Any TFDS image set will do
that has the features "text" (float [L, 4096]) and "text_mask" (bool [L]); images of 1024 pixels or
more are needed for the last stage. A smaller text encoder needs another text_width: the data's.
"""

import ml_collections

from jdiff import staged
from jdiff.experiment import defaults
from jdiff.models import imagen_base, imagen_upsampler

DATA = "captioned_t5xxl"  # the name of that set; --config.stages.0.data.name= and so on


def get_config() -> ml_collections.ConfigDict:
    base = _common(64)
    base.model.update({"name": "unet", **imagen_base(), "dtype": "bfloat16"})  # appendix F.1; 2 B
    base.data.size = 64
    base.sampling.grid.update({"steps": 256})  # (?)
    base.sampling.guidance.scale = 1.35  # for the best FID; 10 and more for the text's sake

    middle = _super_resolution(256)
    middle.data.size = 256
    middle.sampling.grid.update({"steps": 128})  # (?)

    last = _super_resolution(1024)
    # Trained on crops of 256 x 256 pixels from 64 x 64, sampled whole: no pixel attends to another
    # (appendix F.3).
    last.data.size = 256
    last.data.crop = "patch"
    last.sampling.grid.update({"steps": 32})  # (?)
    last.sampling.batch = 8
    return staged.config("Imagen", base, middle, last)


def _common(size: int) -> ml_collections.ConfigDict:
    c = defaults()
    c.name = f"Imagen {size}"
    c.data.name = DATA
    c.data.test_split = "validation"
    c.data.conditions = ("text", "text_mask")
    c.data.crop = "center"  # not given
    c.data.resample = "box"
    c.data.threads = 16
    c.schedule.update({"name": "cosine"})  # continuous in [0, 1]; its limits are not given
    c.parameterization.target = "eps"
    c.parameterization.time = "t"  # the networks multiply it by 1000: not given
    c.loss.distribution.name = "uniform"
    c.loss.null_rate = 0.1  # of the texts, for guidance (section 4.1)
    # Section 4.1: 1e-4 after 10,000 steps of warm-up; Adafactor at 64 pixels, Adam at the others.
    # Here Adam at all, which the paper found as good and takes more memory.
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup = 10_000
    c.ema = {"ema": {"kind": "constant", "decay": 0.9999}}  # not given
    c.train.batch_size = 2048  # of every stage, section 4.1
    c.train.steps = 2_500_000
    c.train.log_every = 100
    c.train.sample_every = 20_000
    c.train.checkpoint_every = 5000
    c.sampling.solver.update({"name": "ddpm", "variance": 0.0})  # its variance is not given
    c.sampling.grid = {"name": "uniform", "steps": 256}
    c.sampling.threshold = {"name": "dynamic", "quantile": 0.995}  # section 2.3
    c.sampling.batch = 64
    c.evaluation.num = 30_000
    c.evaluation.reference = "train"  # the paper: COCO's validation split
    c.evaluation.features = "inception"
    return c


def _super_resolution(size: int) -> ml_collections.ConfigDict:
    c = _common(size)
    c.low_res.factor = 4.0
    # Section 2.4: aug_level ~ U(0, 1), told to the network; the process is the diffusion's own.
    c.low_res.augmentation.update({"name": "gaussian", "low": 0.0, "high": 1.0})
    c.sampling.aug_level = 0.2  # 0.1 to 0.3 in the paper
    fields = imagen_upsampler(size)  # appendix F.2 and F.3; 600 M and 400 M parameters
    fields["dtype"] = "bfloat16"  # not given
    c.model.update({"name": "efficient_unet", **fields})
    c.sampling.guidance.scale = 8.0
    return c
