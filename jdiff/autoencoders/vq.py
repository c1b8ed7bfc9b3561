"""Vector quantisation: each latent becomes the nearest of a learned set of vectors.

Sources: van den Oord et al. 2017 (VQ-VAE), equation 3 and appendix A.1; Esser et al. 2021 (VQGAN).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.autoencoders.discrete import Discrete, Quantized, counts, straight_through
from jdiff.models import layers
from jdiff.models.initializers import Init, ones, param
from jdiff.models.module import Module
from jdiff.pytree import Array

#: Below this share of the mean use a code counts as none, so that its mean is not 0 / 0.
_UNUSED = 1e-5


def nearest(z: Array, codebook: Array) -> Array:
    """Which row of the codebook [K, C] each of z [..., C] is nearest to, int [...]."""
    inner = jnp.einsum("...c,kc->...k", z, codebook, precision="highest")
    return jnp.argmin(jnp.square(codebook).sum(-1) - 2 * inner, axis=-1)  # |z|^2 is the same to all


def averaged(
    count: Array, total: Array, z: Array, index: Array, decay: float, revive: float, key: Array
) -> tuple[Array, Array]:
    """The averages of use [K] and of latents [K, C] after one batch, from those before it.

    Code k is total[k] / count[k], the moving mean of what was assigned to it (van den Oord et al.
    2017, appendix A.1). Counts are relative to the mean use, so that they are about 1 whatever the
    size of a batch.

    Args:
      z, index: the latents [N, C] and the codes that they were assigned to.
      decay: what is kept of the averages.
      revive: codes of less use than this become latents of the batch, drawn at random.
    """
    codes, scale = len(count), len(count) / len(z)
    count = decay * count + (1 - decay) * scale * counts(index, codes)
    sums = jnp.zeros_like(total).at[index].add(z)
    total = decay * total + (1 - decay) * scale * sums
    drawn = z[jax.random.randint(key, (codes,), 0, len(z))]
    dead = count < revive
    return jnp.where(dead, 1.0, count), jnp.where(dead[:, None], drawn, total)


class Codebook(Module):
    """`codes` vectors that are learned by the gradient of |sg(z) - code|^2."""

    def __init__(self, codes: int, channels: int, commitment: float, *, rngs: nnx.Rngs):
        self.commitment = commitment
        self.vectors = param(rngs, (codes, channels), Init("uniform", 1 / codes))

    def encoded(self, h: jax.Array) -> jax.Array:
        """The latents: h itself."""
        return h

    def quantize(self, z: jax.Array, key: jax.Array | None) -> Quantized:
        """The nearest codes of z [B, h, w, C]; VQ-VAE's equation 3, a mean over entries."""
        vectors = self.vectors[...]
        index = nearest(jax.lax.stop_gradient(z), vectors)
        q = vectors[index]
        fixed = jax.lax.stop_gradient
        penalty = _mean(jnp.square(fixed(z) - q)) + self.commitment * _mean(
            jnp.square(z - fixed(q))
        )
        return Quantized(straight_through(z, q), index, penalty)


class MovingCodebook(Module):
    """`codes` vectors that are moving means of the latents assigned to them, without a gradient.

    What they move by stands in the penalty as a term of value 0, whose gradient by the averages is
    the averages before less those after: a step of plain gradient descent with rate 1 makes it
    (`moved_by_averaging` names these parameters, for the optimiser).
    """

    def __init__(
        self,
        codes: int,
        channels: int,
        commitment: float,
        decay: float,
        revive: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.commitment, self.decay, self.revive = commitment, decay, revive
        self.count = param(rngs, (codes,), ones)
        self.total = param(rngs, (codes, channels), Init("uniform", 1 / codes))

    def encoded(self, h: jax.Array) -> jax.Array:
        """The latents: h itself."""
        return h

    def quantize(self, z: jax.Array, key: jax.Array | None) -> Quantized:
        """The nearest codes of z [B, h, w, C]; with a key the averages move."""
        fixed = jax.lax.stop_gradient
        count, total = self.count[...], self.total[...]
        vectors = fixed(total / jnp.maximum(count, _UNUSED)[:, None])
        index = nearest(fixed(z), vectors)
        q = vectors[index]
        penalty = self.commitment * _mean(jnp.square(z - q))
        if key is not None:
            flat = fixed(z).reshape(-1, z.shape[-1])
            after = averaged(
                fixed(count), fixed(total), flat, index.reshape(-1), self.decay, self.revive, key
            )
            terms = [(a * fixed(a - b)).sum() for a, b in zip((count, total), after)]
            penalty = penalty + sum(term - fixed(term) for term in terms)
        return Quantized(straight_through(z, q), index, penalty)


class VQ(Discrete):
    """An autoencoder with a codebook.

    Args:
      codes: vectors in the codebook.
      channels: of a latent and of a vector.
      decay: None trains the vectors by gradients; else they are moving means with this decay.
      revive: of moving means: see `averaged`; 0 leaves unused codes alone.
      commitment: weight of |z - sg(code)|^2, by which latents stay near their codes.
      widths, blocks, in_channels, out_channels, groups, attention, dtype, remat: as of `kl.KL`.
    """

    #: Parameters that a step of gradient descent with rate 1 moves, whatever the optimiser.
    moved_by_averaging = (("quantizer", "count"), ("quantizer", "total"))

    def __init__(
        self,
        *,
        codes: int = 1024,
        channels: int = 4,
        decay: float | None = None,
        revive: float = 0.03,
        commitment: float = 0.25,
        widths: Sequence[int] = (128, 256, 512, 512),
        blocks: int = 2,
        in_channels: int = 3,
        out_channels: int = 3,
        groups: int | None = 32,
        attention: bool = True,
        dtype: str | jnp.dtype = "float32",
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        layers.check_positive(codes=codes)
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"decay={decay} given; it lies in (0, 1), or is None for gradients")
        sizes: dict[str, Any] = {"codes": codes, "channels": channels}
        quantizer = (
            Codebook(**sizes, commitment=commitment, rngs=rngs)
            if decay is None
            else MovingCodebook(
                **sizes, commitment=commitment, decay=decay, revive=revive, rngs=rngs
            )
        )
        super().__init__(
            quantizer, **sizes, widths=widths, blocks=blocks, in_channels=in_channels,
            out_channels=out_channels, groups=groups, attention=attention, dtype=dtype,
            remat=remat, rngs=rngs,
        )  # fmt: skip


def _mean(squares: Array) -> Array:
    """Over all but the batch, [B]."""
    return squares.mean(tuple(range(1, squares.ndim)))
