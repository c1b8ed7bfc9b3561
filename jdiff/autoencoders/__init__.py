"""Autoencoders: images to latents and back.

Who may live here: the networks, one family a file, each with `encode`, `decode`, `factor` and
`channels` (see `base`), and `Autoencoder`, what everyone else sees of them.
"""

from jdiff.autoencoders.autoencoder import Autoencoder, autoencoder
from jdiff.autoencoders.base import Moments, gaussian
from jdiff.autoencoders.tiles import Tile

__all__ = ["Autoencoder", "Moments", "Tile", "autoencoder", "gaussian"]
