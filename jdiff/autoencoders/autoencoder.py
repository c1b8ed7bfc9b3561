"""An autoencoder as data: images to latents of about unit scale, and back.

    coder = interop.autoencoder("stable-diffusion/vae")
    latents = coder.encode(images, keys)        # [B, H / 8, W / 8, 4]
    images = coder.tiled(512).decode(latents)   # big images: one tile in memory at a time

A pytree: its weights are an argument of the programs that it is used in.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.autoencoders import tiles
from jdiff.autoencoders.base import Moments, at_least_float32
from jdiff.autoencoders.tiles import Tile
from jdiff.errors import UserError
from jdiff.models.functional import Apply
from jdiff.pytree import Array, PyTree, is_concrete, static, struct

# Below any standard deviation that an encoder gives: stands for none, whose logarithm is infinite.
_NONE = 1e-30


@struct
class Autoencoder:
    """A network that encodes and decodes, with the units of its latents.

    Latents are (z - shift) * scale of the network's z, so that their entries are of about unit
    scale. Made by `autoencoder`, `interop.autoencoder` or `jdiff.load_autoencoder`.

    Attributes:
      params: the network's weights.
      shift: a number or [C], in the network's units.
      scale: a number or [C].
      apply: the network (see `jdiff.autoencoders.base`).
      factor: pixels of a side that are one latent's.
      channels: C of the latents.
      tile: how images are cut into tiles; None: not at all.
      rows: how many images are worked on at a time; None: all.
    """

    params: PyTree
    shift: Array | float
    scale: Array | float
    apply: Apply = static()
    factor: int = static()
    channels: int = static()
    tile: Tile | None = static(None)
    rows: int | None = static(None)

    def encode(self, images: Array, keys: Array | None = None) -> Array:
        """Latents [B, H / factor, W / factor, C] of images [B, H, W, 3] in [-1, 1].

        Args:
          images: floats.
          keys: [B] keys, to draw each image's latents from its distribution; their mean without.

        Raises:
          UserError: images of another shape or dtype, or a size that the factor does not divide.
        """
        moments = self.moments(images)
        return moments.mean if keys is None else moments.sample(keys)

    def moments(self, images: Array) -> Moments:
        """The distribution of the latents of images [B, H, W, 3]: what `encode` draws from.

        Raises:
          UserError: as `encode`.
        """
        images = jnp.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3:
            raise UserError(
                f"autoencoder: images must be of shape [B, H, W, 3], not {list(images.shape)}."
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"autoencoder: images must be floats in [-1, 1], not {images.dtype}: "
                "x / 127.5 - 1 of bytes."
            )
        self.shape(*images.shape[1:3])
        return _moments(self, images)

    def decode(self, latents: Array) -> Array:
        """Images [B, h factor, w factor, 3] of latents [B, h, w, C]: about in [-1, 1], not clipped.

        Raises:
          UserError: latents of another shape.
        """
        latents = jnp.asarray(latents)
        if latents.ndim != 4 or latents.shape[-1] != self.channels:
            raise UserError(
                f"autoencoder: latents must be of shape [B, h, w, {self.channels}], not "
                f"{list(latents.shape)}."
            )
        return _decode(self, latents)

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, C) of the latents of one image of that size.

        Raises:
          UserError: a size that the factor does not divide, with the nearest that it does.
        """
        f = self.factor
        if height % f or width % f or min(height, width) < f:
            nearest = [max(f, f * round(side / f)) for side in (height, width)]
            raise UserError(
                f"autoencoder: an image of {height} x {width} is not divisible by its factor {f}; "
                f"the nearest that is: {nearest[0]} x {nearest[1]}."
            )
        return height // f, width // f, self.channels

    def tiled(self, size: int = 512, overlap: int | None = None) -> "Autoencoder":
        """The same, working through tiles of `size` pixels: one of one image at a time.

        Images that are no larger are not cut. `sliced` sets how many images at a time.

        Args:
          size: of a tile; a multiple of the factor.
          overlap: pixels that neighbours share and are blended over; a quarter unless given.

        Raises:
          UserError: sizes that do not fit the factor, or an overlap of more than half a tile.
        """
        blend = getattr(self.apply.skeleton(), "blend", "in_turn")
        made = tiles.tile(size, overlap, self.factor, blend)
        return dataclasses.replace(self, tile=made, rows=self.rows or 1)

    def sliced(self, rows: int | None = 1) -> "Autoencoder":
        """The same, working on `rows` images at a time, or on all if that is None.

        Raises:
          UserError: rows below 1.
        """
        if rows is not None and rows < 1:
            raise UserError(f"sliced: rows={rows} must be at least 1.")
        return dataclasses.replace(self, rows=rows)


def autoencoder(apply: Apply, params: PyTree, *, shift: Any = 0.0, scale: Any = 1.0) -> Autoencoder:
    """An `Autoencoder` of a network: `apply, params = models.init(lambda rngs: KL(...), key)`.

    Args:
      apply: its factor and channels are the module's.
      params: its weights.
      shift, scale: latents are (z - shift) * scale: numbers, or one a channel.

    Raises:
      UserError: a shift or a scale of another length than the channels, or a scale of 0 or below.
    """
    network = apply.skeleton()
    units = {"shift": jnp.asarray(shift, float), "scale": jnp.asarray(scale, float)}
    for name, value in units.items():
        if value.shape not in ((), (network.channels,)):
            raise UserError(
                f"autoencoder: {name} of shape {list(value.shape)} given; a number, or one for "
                f"each of {network.channels} channels."
            )
    if is_concrete(units["scale"]) and not bool((units["scale"] > 0).all()):
        raise UserError(f"autoencoder: scale={scale} must be positive.")
    factor, channels = network.factor, network.channels
    return Autoencoder(params, **units, apply=apply, factor=factor, channels=channels)


@jax.jit
def _moments(coder: Autoencoder, images: Array) -> Moments:
    def whole(images: Array) -> Moments:
        mean, std = coder.apply.method("encode")(coder.params, images)
        return Moments((mean - coder.shift) * coder.scale, std * coder.scale)

    def logged(images: Array) -> tuple[Array, Array]:
        mean, std = whole(images)
        return mean, jnp.log(jnp.maximum(std, _NONE))

    rows = coder.rows or len(images)
    if not _cut(coder, images.shape[1:3]):
        return tiles.by_rows(whole, images, rows)
    # Log-variances are blended, as networks give them, and not deviations.
    mean, log_std = tiles.through(
        logged, images, coder.tile, rows, factor=coder.factor, cut=coder.factor, put=1
    )
    std = jnp.exp(log_std)
    return Moments(mean, jnp.where(std < 1e3 * _NONE, 0.0, std))


@jax.jit
def _decode(coder: Autoencoder, latents: Array) -> Array:
    def whole(latents: Array) -> Array:
        z = latents / coder.scale + coder.shift
        return at_least_float32(coder.apply.method("decode")(coder.params, z))

    rows = coder.rows or len(latents)
    if not _cut(coder, [side * coder.factor for side in latents.shape[1:3]]):
        return tiles.by_rows(whole, latents, rows)
    return tiles.through(
        whole, latents, coder.tile, rows, factor=coder.factor, cut=1, put=coder.factor
    )


def _cut(coder: Autoencoder, sides: Sequence[int]) -> bool:
    return coder.tile is not None and max(sides) > coder.tile.size
