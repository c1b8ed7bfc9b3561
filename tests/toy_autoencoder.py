"""An autoencoder that is linear and sees nothing beyond a latent's own pixels: tiles are exact."""

import jax

from jdiff import models
from jdiff.autoencoders import autoencoder, gaussian
from jdiff.models.initializers import normal
from jdiff.models.layers import Conv
from jdiff.models.module import Module

FACTOR, CHANNELS = 4, 2


class Toy(Module):
    """Latents of 4 x 4 pixels each; `width` channels on the way to the image."""

    factor, channels = FACTOR, CHANNELS

    def __init__(self, width=8, *, rngs):
        self.down = Conv(3, 2 * CHANNELS, FACTOR, stride=FACTOR, init=normal(0.2), rngs=rngs)
        self.up = Conv(CHANNELS, width * FACTOR**2, 1, init=normal(0.5), rngs=rngs)
        self.out = Conv(width, 3, 1, init=normal(0.5), rngs=rngs)

    def encode(self, x):
        return gaussian(self.down(x))

    def decode(self, z):
        b, h, w, _ = z.shape
        y = self.up(z).reshape(b, h, w, FACTOR, FACTOR, -1).swapaxes(2, 3)
        return self.out(y.reshape(b, FACTOR * h, FACTOR * w, -1))


def toy(width=8, **units):
    """An `Autoencoder` of it."""
    return autoencoder(*models.init(lambda rngs: Toy(width, rngs=rngs), jax.random.key(0)), **units)
