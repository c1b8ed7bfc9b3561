"""Finite scalar quantisation: every channel of a latent is rounded to one of a few levels.

Source: Mentzer et al. 2023, section 3 and appendix A.1. There is no codebook, and no loss of its
own. Here 0 is mapped to 0 exactly, by atanh where the paper's listing has tan.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdiff.autoencoders.discrete import Discrete, Quantized, straight_through
from jdiff.models.module import Module
from jdiff.pytree import Array

#: The bound lies this share beyond the outermost levels, so that a tanh reaches them.
_MARGIN = 1e-3


def bound(h: Array, levels: Sequence[int]) -> Array:
    """h [..., C] in the range of the levels: channel c in about [-L_c / 2, (L_c - 1) / 2].

    0 stays 0; rounding gives L_c integers. Divided by L_c // 2 they lie in [-1, 1].
    """
    levels = np.asarray(levels)
    half = (levels - 1) * (1 + _MARGIN) / 2
    offset = np.where(levels % 2 == 1, 0.0, 0.5)  # an even number of integers is not symmetric
    shift = np.arctanh(offset / half).astype(h.dtype)
    return jnp.tanh(h + shift) * half.astype(h.dtype) - offset.astype(h.dtype)


def rounded(z: Array, levels: Sequence[int]) -> Array:
    """The nearest levels, as vectors like z in [-1, 1], [..., C]; the gradient is that of z."""
    half = _half(levels)
    low, high = -half, (np.asarray(levels) - 1) // 2
    q = jnp.clip(jnp.round(z * half), low, high)
    return straight_through(z, (q / half).astype(z.dtype))


def index_of(q: Array, levels: Sequence[int]) -> Array:
    """The number of a code, int [...] in 0 ... prod(levels) - 1, of its vector q [..., C]."""
    half = _half(levels)
    digits = jnp.round(q * half).astype(jnp.int32) + half.astype(np.int32)
    return (digits * _basis(levels)).sum(-1)


def code_of(index: Array, levels: Sequence[int]) -> Array:
    """The vector [..., C] of a code's number: inverse of `index_of`."""
    digits = index[..., None] // _basis(levels) % np.asarray(levels)
    half = _half(levels)
    return (digits - half) / half


class Levels(Module):
    """The quantiser of these levels."""

    def __init__(self, levels: tuple[int, ...]):
        self.levels = levels

    def encoded(self, h: jax.Array) -> jax.Array:
        """h [..., C] bounded, in units in which the outermost levels are about -1 and 1."""
        return bound(h, self.levels) / _half(self.levels).astype(h.dtype)

    def quantize(self, z: jax.Array, key: jax.Array | None) -> Quantized:
        """Every entry of z [B, h, w, C] at its nearest level."""
        q = rounded(z, self.levels)
        return Quantized(q, index_of(q, self.levels), jnp.zeros(len(z), z.dtype))


class FSQ(Discrete):
    """An autoencoder whose latents have len(levels) channels, channel c with levels[c] values.

    Args:
      levels: e.g. (8, 5, 5, 5) for 1000 codes, (8, 8, 8, 5, 5, 5) for 64,000; each at least 2.
      widths, blocks, in_channels, out_channels, groups, attention, dtype, remat: as of `kl.KL`.
    """

    def __init__(
        self,
        *,
        levels: Sequence[int] = (8, 5, 5, 5),
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
        levels = tuple(levels)
        if not levels or min(levels) < 2:
            raise ValueError(f"levels={levels} given; each has to be at least 2")
        super().__init__(
            Levels(levels), channels=len(levels), codes=math.prod(levels), widths=widths,
            blocks=blocks, in_channels=in_channels, out_channels=out_channels, groups=groups,
            attention=attention, dtype=dtype, remat=remat, rngs=rngs,
        )  # fmt: skip


def _half(levels: Sequence[int]) -> np.ndarray:
    return np.asarray(levels) // 2


def _basis(levels: Sequence[int]) -> np.ndarray:
    return np.cumprod([1, *levels[:-1]])
