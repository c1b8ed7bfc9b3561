"""What an autoencoder's network gives and takes: the contract of every family here.

A network is a `models.module.Module` with

    encode(x [B, H, W, 3]) -> Moments of [B, H / factor, W / factor, channels]
    decode(z [B, h, w, channels]) -> [B, h factor, w factor, 3]

and the attributes `factor` and `channels`. Images are in [-1, 1]; z is as the network was trained,
neither shifted nor scaled. Both are pure functions of the weights: `apply.method("decode")`.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jdiff.pytree import Array, noise_like

#: Log-variances are clipped to this range, as in the LDM code: standard deviations are positive.
LOG_VARIANCE = (-30.0, 20.0)


class Moments(NamedTuple):
    """The normal distribution of latents [B, h, w, C] that an encoder gives, entry by entry.

    Attributes:
      mean: of the latents; float32.
      std: their standard deviation; zeros where the encoder gives one latent and no distribution.
    """

    mean: Array
    std: Array

    def sample(self, keys: Array) -> Array:
        """Latents [B, h, w, C], each image's drawn from its own key of `keys` [B]."""
        return self.mean + self.std * noise_like(keys, self.mean)


def gaussian(parameters: Array) -> Moments:
    """The moments in an encoder's output [B, h, w, 2 C]: means, then log-variances (clipped)."""
    parameters = at_least_float32(parameters)
    mean, log_variance = jnp.split(parameters, 2, axis=-1)
    return Moments(mean, jnp.exp(0.5 * jnp.clip(log_variance, *LOG_VARIANCE)))


def certain(z: Array) -> Moments:
    """The moments of an encoder that gives latents and no distribution."""
    z = at_least_float32(z)
    return Moments(z, jnp.zeros_like(z))


def at_least_float32(x: Array) -> Array:
    """float32, or float64 where that is what x is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
