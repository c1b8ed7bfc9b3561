"""Captioned emoji to latents: the first stage of latent diffusion, of any family and factor.

    jdiff train --config=configs/autoencoder_emoji.py:64,f4 --workdir=runs/emoji_f4
    jdiff train --config=configs/autoencoder_emoji.py:128,f8,vq --workdir=runs/emoji_vq

Words behind the colon, in any order, with commas: the size, 64 or 128 pixels; the factor, f4, f8 or
f16; the family, kl, vq or fsq; `small`. Unless given: 64, f4, kl.

Data: `jdiff prepare emoji`: drawings in six styles on white, split by what is depicted. Before
training: `jdiff prepare lpips`, and `jdiff prepare fid` for the rFID.

Losses as in LDM (Rombach et al. 2022, appendix G): L1 + LPIPS, a KL weight of 1e-6, PatchGAN with
the hinge loss and the adaptive weight; the discriminator begins when a tenth of the steps are done.
Latents have 3 (f4), 4 (f8) or 16 (f16) channels; codebooks have 2048 codes that are moving means,
FSQ's levels (8, 8, 6, 5) make 1920.

`small` is a first try: 32 x 32 pixels, a narrow network without attention, 400 steps, distances
between pixels in place of the rFID. Most of it is LPIPS: five minutes on two cores. Of 1,000
held-out emoji (`jdiff evaluate --features=inception --num=1000`) the reconstructions, blurred and
in few colours, have 15.7 dB, SSIM 0.49, LPIPS 0.30 and an rFID of 110 (other real images 50.7,
noise 414).
"""

import ml_collections

from jdiff.errors import UserError
from jdiff.first_stage import defaults

#: Channels of the levels, and of the latents of a KL autoencoder or a codebook.
WIDTHS = {"f4": (64, 128, 256), "f8": (64, 128, 256, 256), "f16": (64, 128, 256, 256, 256)}
CHANNELS = {"f4": 3, "f8": 4, "f16": 16}
FAMILIES = {
    "kl": lambda channels: {"channels": channels},
    "vq": lambda channels: {"channels": channels, "codes": 2048, "decay": 0.99},
    "fsq": lambda channels: {"levels": (8, 8, 6, 5)},
}


def get_config(words: str = "64,f4,kl") -> ml_collections.ConfigDict:
    size, factor, family, small = _read(words)
    c = defaults()
    c.name = f"emoji autoencoder {size} px, {factor}, {family}"
    c.data.name = "emoji"
    c.data.size = size
    c.data.resample = "box"
    c.data.flip = True
    c.data.threads = 8
    c.model.update({"name": family, "widths": WIDTHS[factor], **FAMILIES[family](CHANNELS[factor])})
    c.optimizer.learning_rate = 2e-4
    c.optimizer.arguments = {"b1": 0.5, "b2": 0.9}  # of both players
    c.optimizer.warmup = 500
    c.ema = {"ema": {"kind": "constant", "decay": 0.999, "warmup": 0.05}}
    c.train.update(
        {"batch_size": 64, "steps": 50_000, "log_every": 100, "sample_every": 2500,
         "checkpoint_every": 2500}
    )  # fmt: skip
    c.loss.start = c.train.steps // 10
    c.evaluation.num = 5000
    c.evaluation.features = "inception"
    if small:
        c.data.threads = 2
        c.model.update(
            {"widths": tuple(width // 4 for width in WIDTHS[factor]), "blocks": 1, "groups": None,
             "attention": False}
        )  # fmt: skip
        if family == "vq":
            c.model.codes = 256
        c.optimizer.learning_rate = 1e-3
        c.optimizer.warmup = 20
        c.discriminator.update({"channels": 16, "layers": 2})
        c.train.update(
            {"batch_size": 8, "steps": 400, "log_every": 20, "sample_every": 100,
             "checkpoint_every": 200}
        )  # fmt: skip
        c.loss.start = 200
        c.evaluation.num = 256
        c.evaluation.features = "pixels"
    return c


def _read(words: str) -> tuple[int, str, str, bool]:
    """Size, factor, family and whether it is the first try."""
    given = [word for word in words.split(",") if word]
    known = ("64", "128", *WIDTHS, *FAMILIES, "small")
    for word in given:
        if word not in known:
            raise UserError(f"configs/autoencoder_emoji.py: {word!r} given; of {', '.join(known)}.")
    pick = lambda among, usual: next((word for word in given if word in among), usual)
    small = "small" in given
    size = int(pick(("64", "128"), "32" if small else "64"))
    return size, pick(WIDTHS, "f4"), pick(FAMILIES, "kl"), small
