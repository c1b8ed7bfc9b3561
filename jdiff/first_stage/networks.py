"""The autoencoders that can be trained, and how each goes from images to its output and penalty."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdiff.autoencoders.base import Moments, at_least_float32
from jdiff.autoencoders.discrete import counts, perplexity
from jdiff.autoencoders.fsq import FSQ
from jdiff.autoencoders.kl import KL
from jdiff.autoencoders.vq import VQ
from jdiff.first_stage.objective import Pass
from jdiff.first_stage.pixels import logit_laplace_image
from jdiff.models.functional import Apply
from jdiff.pytree import Array, PyTree

#: Where the kernel of the decoder's last convolution lies.
LAST = ("decoder", "out_conv", "kernel")


class Network(NamedTuple):
    """A family.

    Attributes:
      plain: its class.
      logit_laplace: the same with an output of means and scales, whose `decode` gives images.
      through: (apply, weights, images, key, weight of the KL divergence) -> `Pass`.
    """

    plain: type
    logit_laplace: type
    through: Callable[[Apply, PyTree, Array, Array, float], Pass]


class _Means:
    """Decodes to the image that (mu, ln b) stands for."""

    def output(self, z: jax.Array) -> jax.Array:
        """(mu, ln b) [B, H, W, 2 C] of latents: `decode` of the class itself."""
        return super().decode(z)

    def decode(self, z: jax.Array) -> jax.Array:
        """Images [B, H, W, C] of latents."""
        return logit_laplace_image(super().decode(z))


class LogitLaplaceKL(_Means, KL):
    """`KL` whose output is a logit-Laplace distribution."""


class LogitLaplaceVQ(_Means, VQ):
    """`VQ` whose output is a logit-Laplace distribution."""


class LogitLaplaceFSQ(_Means, FSQ):
    """`FSQ` whose output is a logit-Laplace distribution."""


def divergence(moments: Moments) -> Array:
    """KL(N(mean, std^2) || N(0, 1)) of an image's latents, the sum of all entries, [B] in nats."""
    mean, std = moments
    terms = jnp.square(mean) + jnp.square(std) - 1 - 2 * jnp.log(std)
    return 0.5 * terms.sum((1, 2, 3))


def _drawn(apply: Apply, weights: PyTree, x: Array, key: Array, kl: float) -> Pass:
    """Through latents drawn from their distribution."""
    moments = apply.method("encode")(weights, x)
    noise = jax.random.normal(key, moments.mean.shape, moments.mean.dtype)
    name = "output" if hasattr(apply.skeleton(), "output") else "decode"
    output = apply.method(name)(weights, moments.mean + moments.std * noise)
    nats = divergence(moments)
    # LDM adds up the errors of pixels; here they are averaged, and so is what stands beside them.
    penalty = kl * nats / (x.shape[1] * x.shape[2] * x.shape[3])
    return Pass(at_least_float32(output), penalty, {"kl": nats.mean()})


def _quantized(apply: Apply, weights: PyTree, x: Array, key: Array, kl: float) -> Pass:
    """Through codes."""
    moments = apply.method("encode")(weights, x)
    found = apply.method("quantize")(weights, moments.mean, key)
    output = apply.method("image")(weights, found.z)
    used = counts(found.index, apply.skeleton().codes)
    figures = {"commitment": found.penalty.mean(), "perplexity": perplexity(used)}
    return Pass(at_least_float32(output), found.penalty, figures)


#: What config.model.name names.
BY_NAME: dict[str, Any] = {
    "kl": Network(KL, LogitLaplaceKL, _drawn),
    "vq": Network(VQ, LogitLaplaceVQ, _quantized),
    "fsq": Network(FSQ, LogitLaplaceFSQ, _quantized),
}
