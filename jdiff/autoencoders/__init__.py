"""Autoencoders: images to latents and back.

Who may live here: the networks, one family a file, each with `encode`, `decode`, `factor` and
`channels` (see `base`), and `Autoencoder`, what everyone else sees of them.
"""

from jdiff.autoencoders.autoencoder import Autoencoder, autoencoder
from jdiff.autoencoders.base import Moments, gaussian
from jdiff.autoencoders.dc import DCAutoencoder
from jdiff.autoencoders.fsq import FSQ
from jdiff.autoencoders.kl import KL, kl_sd, kl_sd3
from jdiff.autoencoders.qwen import QwenAutoencoder
from jdiff.autoencoders.tiles import Tile
from jdiff.autoencoders.tiny import Tiny, taesd
from jdiff.autoencoders.vq import VQ

__all__ = [
    "BY_NAME",
    "FSQ",
    "KL",
    "VQ",
    "Autoencoder",
    "DCAutoencoder",
    "Moments",
    "QwenAutoencoder",
    "Tile",
    "Tiny",
    "autoencoder",
    "gaussian",
    "kl_sd",
    "kl_sd3",
    "taesd",
]

#: Networks by name, as configs give them.
BY_NAME = {
    "kl": KL, "vq": VQ, "fsq": FSQ, "tiny": Tiny, "qwen": QwenAutoencoder, "dc": DCAutoencoder,
}  # fmt: skip
