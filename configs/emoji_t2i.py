"""Text to image on captioned emoji: an MM-DiT on latents, 128 x 128, or 32 x 32 pixels in an hour.

    jdiff prepare emoji minilm
    jdiff train --config=configs/autoencoder_emoji.py:128,f8 --workdir=runs/emoji_f8
    jdiff encode --data=emoji --size=128 --resample=box --autoencoder=runs/emoji_f8 --text=minilm \\
        --length=32 --name=emoji128_f8_minilm
    jdiff train --config=configs/emoji_t2i.py --workdir=runs/emoji_t2i

Text is MiniLM's: its states, and the pooled vector where the network takes one. 10 % of the
captions are dropped in training. Samples are drawn for held-out captions, whose subjects are in no
picture of training, and compared with the training split (config.evaluation.reference="train").

  full   latents 16 x 16 x 4 of the autoencoder; an MM-DiT of 12 blocks, 384 wide, a token a latent;
         rectified flow, logit-normal times, as in Stable Diffusion 3. One GPU.
  64     the same on latents of 64 x 64 pixels, factor 4:
         --config=configs/autoencoder_emoji.py:64,f4, --size=64, --name=emoji64_f4_minilm.
  small  32 x 32 pixels without an autoencoder (`jdiff encode --data=emoji --size=32 --resample=box
         --text=minilm --length=32 --name=emoji32_minilm`): a U-Net that sees the text's tokens at
         8 x 8 pixels, with EDM's preconditioning. Training takes 33 ms of a core an image: 12,000
         steps of 16 were 58 minutes on two.

How well samples match their captions needs a scorer, trained on the same split:
`jdiff train --config=configs/emoji_clip.py:small --workdir=runs/emoji_clip` and then
`jdiff evaluate --workdir=runs/emoji_t2i --scorer=runs/emoji_clip`. There is no published figure.
"""

import ml_collections

from jdiff.errors import choose
from jdiff.experiment import defaults

#: What the captions of emoji may differ in and mean the same thing: style, and tones of skin.
SAME = r"^.*? emoji of an? |, (medium )?(light |dark |medium )?skin tone"
#: The set of latents of each form on latents.
LATENTS = {"full": "emoji128_f8_minilm", "64": "emoji64_f4_minilm"}


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    choose("configs/emoji_t2i.py: size", size, (*LATENTS, "small"))
    c = defaults()
    c.optimizer.clip = 1.0
    c.evaluation.reference = "train"  # samples are drawn for captions of the test split
    c.evaluation.same = SAME
    return _small(c) if size == "small" else _latent(c, size)


def _latent(c: ml_collections.ConfigDict, size: str) -> ml_collections.ConfigDict:
    c.name = f"emoji from text, {LATENTS[size]}"
    c.data.name = LATENTS[size]
    c.data.conditions = ("text", "text_mask", "pooled")
    c.data.threads = 8
    c.model = {
        "name": "mmdit", "patch": 1, "width": 384, "depth": 12, "heads": 6, "positions": 16,
        "qk_norm": True, "scan": True, "dtype": "bfloat16",
    }  # fmt: skip
    c.schedule.name = "rectified_flow"
    c.parameterization.target = "velocity"
    c.parameterization.time = "t1000"
    c.loss.distribution.update({"name": "logit_normal", "mean": 0.0, "std": 1.0})
    c.optimizer.name = "adamw"
    c.optimizer.arguments = {"b2": 0.95, "weight_decay": 0.01}
    c.optimizer.learning_rate = 3e-4
    c.optimizer.warmup = 1000
    c.ema = {"ema": {"kind": "constant", "decay": 0.9995, "warmup": 0.05}}
    c.train.update(
        {"batch_size": 256, "steps": 60_000, "log_every": 100, "sample_every": 5000,
         "checkpoint_every": 2500}
    )  # fmt: skip
    c.sampling.solver = {"name": "heun"}
    c.sampling.grid = {"name": "uniform", "steps": 25}
    c.sampling.guidance.scale = 3.0
    c.sampling.batch = 128
    c.evaluation.num = 2034  # the test split
    c.evaluation.features = "inception"
    return c


def _small(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    c.name = "emoji from text, 32 x 32 pixels"
    c.data.name = "emoji32_minilm"
    c.data.conditions = ("text", "text_mask")
    c.model.update(
        {"name": "unet", "style": "adm", "channels": 32, "multipliers": (0.5, 1.5, 4),
         "blocks": 1, "attention_sizes": (8,), "num_classes": 0}
    )  # fmt: skip
    c.parameterization.sigma_data = 0.6  # the pixels' deviation
    c.loss.distribution.mean = -0.6  # more noise than EDM's -1.2: shapes are what is learnt last
    c.optimizer.learning_rate = 1e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = 200
    c.ema = {"ema": {"kind": "constant", "halflife_images": 5000.0, "warmup": 0.05}}
    c.train.update(
        {"batch_size": 16, "steps": 12_000, "log_every": 100, "sample_every": 2000,
         "checkpoint_every": 1000}
    )  # fmt: skip
    c.sampling.grid.steps = 18
    c.sampling.guidance.update({"scale": 2.5, "interval": (-4.0, 3.0)})
    c.sampling.threshold = {"name": "static"}  # a dynamic one turns white backgrounds grey
    c.sampling.batch = 64
    c.evaluation.num = 500
    c.evaluation.features = "classifier"
    return c
