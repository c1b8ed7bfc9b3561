"""Every field of an experiment's config, with its default; a file in configs/ edits it."""

from typing import Any

import ml_collections
from ml_collections import config_dict


def common(kind: str) -> ml_collections.ConfigDict:
    """The fields that experiments of every kind have, with their defaults."""
    c = ml_collections.ConfigDict()
    c.kind = kind  # what is trained: jdiff.kinds.BY_NAME
    c.name = ""  # of the experiment, for reports
    c.seed = 0
    c.compile_cache = True  # keep compiled programs between runs, in cache_dir
    c.cache_dir = config_dict.placeholder(str)  # None: $JDIFF_CACHE/xla, or ~/.cache/jdiff/xla

    c.data = ml_collections.ConfigDict()
    c.data.name = "digits"  # bundled, or any prepared TFDS image set
    c.data.train_split = "train"
    c.data.test_split = "test"
    c.data.data_dir = config_dict.placeholder(str)  # None: TFDS's default folder
    c.data.size = config_dict.placeholder(int)  # resize to size x size pixels; None keeps them
    c.data.resample = "bicubic"  # filter of that; "box", the mean of the pixels, for cascades
    c.data.crop = config_dict.placeholder(str)  # "center", "random", "adm", "patch" or None
    c.data.flip = False  # mirror half of the images
    c.data.threads = 2  # that read and decode
    c.data.timeout = 600.0  # seconds to wait for a batch before the run saves and ends; 0: for ever
    c.data.conditions = ()  # further arrays of the data that the network is told: text, ...

    c.mesh = ml_collections.ConfigDict()  # devices an axis; -1 for what the others leave
    c.mesh.data = -1  # copies of the weights, each with its part of the batch
    c.mesh.fsdp = 1  # parts of the batch, over which weights and optimiser are split too
    c.mesh.tensor = 1  # heads and hidden units of transformers split
    c.mesh.sequence = 1  # tokens of transformers split
    c.mesh.attention = "ring"  # over split tokens: "ring" or "all_to_all"
    c.mesh.rules = _open()  # axis of an array -> mesh axis, over the family's; see docs/scale.md

    c.model = _open()  # what the kind trains; sizes come from the data

    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.name = "adam"  # adam, adamw, radam, lion or muon
    c.optimizer.arguments = _open()  # further arguments of the optimiser, e.g. b2
    c.optimizer.learning_rate = 1e-3
    c.optimizer.schedule = "constant"  # constant, cosine, linear or rsqrt, after the warm-up
    c.optimizer.warmup = 0  # steps from 0 to learning_rate
    c.optimizer.decay_from = 0  # steps after which rsqrt starts to fall (EDM2's t_ref)
    c.optimizer.clip = config_dict.placeholder(float)  # of the gradient's global norm

    c.ema = _open(ema=_open(kind="constant", decay=0.999))  # averages by name; see training/ema.py

    c.train = ml_collections.ConfigDict()
    c.train.start = config_dict.placeholder(str)  # a run directory whose weights to start from
    c.train.batch_size = 128  # over all devices
    c.train.accumulate = 1  # micro-batches a step
    c.train.steps = 1000
    c.train.log_every = 50
    c.train.sample_every = 500
    c.train.checkpoint_every = 500
    c.train.keep = 2  # checkpoints
    # Operations a second of one device, for the MFU; None: as jax names it, if that is known.
    c.train.peak_flops = config_dict.placeholder(float)

    c.sampling = ml_collections.ConfigDict()
    c.sampling.ema = "ema"  # which average is used; "params" is the weights themselves
    c.sampling.batch = 256  # images at a time

    c.evaluation = ml_collections.ConfigDict()
    c.evaluation.num = 1000  # images that are measured
    c.evaluation.reference = "test"  # the split they are compared with; papers' FID: "train"
    c.evaluation.features = "pixels"  # classifier, pixels, inception or resnet50
    return c


def defaults() -> ml_collections.ConfigDict:
    """Every field of an experiment's config, with its default.

    Sections with a `name` choose a function by name; their other entries are its arguments.
    """
    c = common("diffusion")
    c.model.name = "unet"  # jdiff.models.BY_NAME; sizes and classes come from the data
    c.data.null = "zero"  # what no condition is: "zero", "empty" (the text "") or "learned"
    c.data.autoencoder = config_dict.placeholder(str)  # of latents, where it was moved; see docs
    c.schedule = _open(name="edm")  # jdiff.schedules.BY_NAME
    c.parameterization = ml_collections.ConfigDict()
    c.parameterization.target = "edm"  # x0, eps, v, score, velocity or edm
    c.parameterization.time = config_dict.placeholder(str)  # what the network is told; see docs
    c.parameterization.sigma_data = 0.5
    c.parameterization.variance = "fixed"  # or "learned_range", with twice the out_channels

    c.low_res = ml_collections.ConfigDict()  # of a super-resolution stage; see docs/cascades.md
    c.low_res.factor = config_dict.placeholder(float)  # input's size = data.size / factor; or None
    c.low_res.down = "area"  # how it is made smaller: area, bilinear, bicubic or nearest
    c.low_res.up = "bilinear"  # how the network enlarges it: bilinear, bicubic or nearest
    c.low_res.residual = False  # generate what the image has beyond the enlarged input (SRDiff)
    c.low_res.augmentation = _open(name="none")  # jdiff.cascades.augmentations.BY_NAME

    c.loss = ml_collections.ConfigDict()
    c.loss.name = "denoising"  # jdiff.losses.BY_NAME
    c.loss.arguments = _open()  # further arguments of the loss, e.g. meanflow's share
    c.loss.distribution = _open(name="lognormal")  # of the training times
    c.loss.weighting = _open(name="own")  # "own": the loss's own, e.g. the network's squared error
    c.loss.coupling = _open(name="independent")  # of data and noise, jdiff.couplings.BY_NAME
    # Share of conditions dropped, for classifier-free guidance; or a section with one for each.
    c.loss.null_rate = config_dict.FieldReference(0.1, field_type=object)
    c.loss.target = "params"  # which average gives a loss its targets; "params": the weights as is
    c.loss.teacher = config_dict.placeholder(str)  # a run directory; guided as its config samples
    c.loss.solver = _open(name="heun")  # of the teacher's step, in consistency_distillation

    c.sampling.solver = _open(name="heun")  # jdiff.solvers.BY_NAME
    c.sampling.grid = _open(name="karras", steps=18)  # jdiff.grids.BY_NAME
    c.sampling.guidance = ml_collections.ConfigDict()
    c.sampling.guidance.scale = 1.0  # 1 is the conditional model, without guidance
    c.sampling.guidance.interval = config_dict.placeholder(tuple)  # (low, high) in logSNR
    c.sampling.guidance.rescale = config_dict.placeholder(float)  # 0 to 1
    # "static", "dynamic", or a section such as {"name": "dynamic", "quantile": 0.995}.
    c.sampling.threshold = None
    c.sampling.aug_level = config_dict.placeholder(float)  # of a stage's low-resolution input
    c.sampling.truncate = False  # True: the stage before stops at that level; no noise is added

    # A contrastive run, or the folder of a CLIP: how well samples match their captions.
    c.evaluation.scorer = config_dict.placeholder(str)
    c.evaluation.captions = config_dict.placeholder(str)  # the data's field of texts: "caption"
    c.evaluation.top = (1, 5)  # whether a caption is among the first so many
    # A regular expression: what it matches in a caption is no difference ("the same thing").
    c.evaluation.same = config_dict.placeholder(str)
    return c


def _open(**entries: Any) -> ml_collections.ConfigDict:
    """A config whose entries may be added to: the arguments of whatever it names."""
    return ml_collections.ConfigDict(entries)
