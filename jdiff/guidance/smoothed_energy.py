"""Smoothed-energy guidance, SEG (Hong 2024, 2408.00760): attention with blurred queries."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.denoisers import as_denoiser
from jdiff.errors import UserError
from jdiff.guidance.weak import Against, Weak, against, checked
from jdiff.parallel.tokens import parts
from jdiff.pytree import Array, static, struct


def blur(q: Array, sigma: Array | float) -> Array:
    """Gaussian blur of `[B, *grid, heads, D]` along the grid, sigma in tokens, 0 to infinity.

    The image is mirrored at its border without end, which in the cosine basis is the factor
    exp(-(sigma pi k / n)^2 / 2) on the k-th wave: the mean is kept, sigma = 0 changes nothing and
    sigma = inf leaves the mean alone. (The paper's code cuts the kernel at 3 sigma and mirrors
    once.)
    """
    for axis in range(1, q.ndim - 2):
        n = q.shape[axis]
        k, i = np.arange(n)[:, None], np.arange(n)
        waves = np.cos(math.pi / n * (i + 0.5) * k) * np.where(k == 0, 1.0, 2.0**0.5) / n**0.5
        decay = jnp.exp(-0.5 * jnp.square(sigma * (math.pi / n) * np.maximum(k, 1)))
        gain = jnp.where(k == 0, 1.0, decay)  # apart: inf * 0
        matrix = jnp.matmul(waves.T, gain * waves, precision=jax.lax.Precision.HIGHEST)
        q = jnp.moveaxis(jnp.tensordot(matrix.astype(q.dtype), q, (1, axis)), 0, axis)
    return q


def smoothed_attention(
    q: Array, k: Array, v: Array, *, sigma: Array | float, mask: Array | None = None
) -> Array:
    """Softmax attention with queries blurred over the grid, that is with blurred logits.

    Raises:
      UserError: a sequence split over devices, which need not be in order (`parallel.tokens`).
    """
    if q.ndim == 4 and parts() > 1:
        raise UserError(
            f"smoothed-energy guidance blurs along a sequence of {q.shape[1]} tokens that "
            f"mesh.sequence={parts()} has split and joined out of order; sample with "
            "mesh.sequence=1."
        )
    flat = (a.reshape(a.shape[0], -1, *a.shape[-2:]) for a in (blur(q, sigma), k, v))
    return jax.nn.dot_product_attention(*flat, mask=mask).reshape(q.shape)


@struct
class Smoothed(Weak):
    """The denoiser that `smoothed` makes; sigma is a leaf."""

    denoiser: Any
    sigma: Array | float
    where: str = static()

    def edit(self, apply: Any) -> Any:
        """With blurred queries."""
        return apply.with_attention(
            functools.partial(smoothed_attention, sigma=self.sigma), self.where
        )


def smoothed(denoise: Any, sigma: Array | float = math.inf, where: str = ".*") -> Smoothed:
    """The denoiser with blurred queries in the attention layers `where` of its networks."""
    return _smoothed("smoothed", denoise, sigma, where)


def smoothed_energy(
    denoise: Any, scale: Any, sigma: Array | float = math.inf, where: str = ".*"
) -> Against:
    """smoothed + scale (denoise - smoothed); scale = 1 is `denoise`, gamma is ours - 1.

    Blurring the queries flattens the energy whose gradient attention is; sigma = 0 is the model
    itself. Queries are blurred along the axes of the attention's grid: rows and columns in U-Nets
    and DiT. Networks that join text and image in one sequence (SD3, FLUX) have no such axes, and
    the blur runs along the sequence.

    Args:
      denoise: a denoiser with a network inside, on the same weights for both members.
      scale: a number, `[B]`, `per_sample(...)` or one of `guidance.scales`. The paper fixes it and
        varies sigma.
      sigma: of the blur, in tokens; a leaf.
      where: the attention layers, as for `perturbed_attention`.

    Raises:
      UserError: a negative sigma; no network inside, or no attention there.
    """
    return against(_smoothed("smoothed_energy", denoise, sigma, where), scale)


def _smoothed(name: str, denoise: Any, sigma: Array | float, where: str) -> Smoothed:
    if isinstance(sigma, int | float):
        if not sigma >= 0:
            raise UserError(f"{name}: sigma={sigma} given; it is at least 0.")
        sigma = float(sigma)
    return checked(name, Smoothed(as_denoiser(denoise), sigma, where))
