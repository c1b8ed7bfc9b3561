"""CLIP as a whole (Radford et al. 2021): texts and images in one space, to be compared there."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdiff.errors import UserError
from jdiff.models import layers
from jdiff.models.dit import patchify
from jdiff.models.initializers import Init, normal, param
from jdiff.models.layers import LayerNorm, Linear
from jdiff.models.module import Module
from jdiff.models.remat import named
from jdiff.parallel.layout import TRANSFORMER
from jdiff.texts import base
from jdiff.texts.base import Read, TextNetwork
from jdiff.texts.clip import ClipText, blocks, project

#: Of the pixels in [0, 1] that CLIP was trained on, by channel.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def prepare(images: jax.Array, size: int) -> jax.Array:
    """Images in [-1, 1] as CLIP's towers see them: `[B, H, W, 3]` to `[B, size, size, 3]`.

    The shorter side is resized to `size` (bicubic, with the low pass where it shrinks), the middle
    is cut out and channels are standardised. Values are not rounded to 8 bits, so that there is a
    gradient; all else is as in CLIP's code, which resizes each row and then each column.
    """
    batch, height, width, channels = images.shape
    short = min(height, width)
    rows, columns = (size * side // short for side in (height, width))
    pixels = images.astype(jnp.float32) / 2 + 0.5
    for shape in ((height, columns), (rows, columns)):
        if shape != pixels.shape[1:3]:
            pixels = jax.image.resize(pixels, (batch, *shape, channels), "cubic")
            pixels = jnp.clip(pixels, 0, 1)  # bicubic overshoots
    top, left = (rows - size) // 2, (columns - size) // 2
    pixels = pixels[:, top : top + size, left : left + size]
    return (pixels - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)


class ClipVision(Module):
    """CLIP's vision transformer: patches, a class token, pre-norm blocks.

    Args:
      image_size: side of the pictures that it sees.
      patch: side of a patch.

    The others are those of `ClipText`.

    Raises:
      ValueError: a field is out of range.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch: int = 14,
        width: int = 1024,
        depth: int = 24,
        heads: int = 16,
        hidden: int = 4096,
        activation: str = "quick_gelu",
        eps: float = 1e-5,
        dtype: str | jnp.dtype = "float32",
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        layers.check_positive(image_size=image_size, patch=patch, eps=eps)
        self.image_size, self.patch, self.depth = image_size, patch, depth
        self.dtype, self.scan, self.remat = layers.float_dtype(dtype), scan, named(remat)
        count, scale = (image_size // patch) ** 2 + 1, normal(width**-0.5)
        self.embed_patches = Linear(
            3 * patch**2, width, init=normal(0.02), bias_init=None, axes=(None, "embed"),
            dtype=self.dtype, rngs=rngs,
        )  # fmt: skip
        self.label = param(rngs, (width,), scale, ("embed",))
        self.positions = param(rngs, (count, width), scale, (None, "embed"))
        self.norm_in = LayerNorm(width, eps=eps, rngs=rngs)
        self.blocks = blocks(
            width, depth, heads, hidden, activation, eps=eps, dtype=self.dtype, scan=scan, rngs=rngs
        )
        self.norm_out = LayerNorm(width, eps=eps, rngs=rngs)

    def see(self, pixels: jax.Array) -> Read:
        """What it makes of pixels `[B, size, size, 3]` (`prepare`): `last` without the last norm.

        Raises:
          UserError: another size.
        """
        size = self.image_size
        if pixels.shape[1:] != (size, size, 3):
            raise UserError(f"CLIP sees [B, {size}, {size}, 3], not {list(pixels.shape)}: prepare.")
        whole = size // self.patch * self.patch  # what does not fill a patch is not seen
        h = self.embed_patches(patchify(pixels[:, :whole, :whole], self.patch))
        h = h.reshape(h.shape[0], -1, h.shape[-1])
        label = jnp.broadcast_to(self.label[...].astype(h.dtype), (h.shape[0], 1, h.shape[-1]))
        h = jnp.concatenate([label, h], axis=1) + self.positions[...].astype(h.dtype)
        h, _ = base.through(
            self.blocks, self.depth, self.norm_in(h), scan=self.scan, remat=self.remat
        )
        last = h.astype(jnp.float32)
        return Read(last, self.norm_out(last[:, 0]))


class Clip(TextNetwork):
    """Both towers and their maps to one space.

    Args:
      text: fields of `ClipText`.
      vision: fields of `ClipVision`.
      projection: channels of the common space.
      dtype, scan, remat: of both towers.

    Raises:
      ValueError: a field is out of range.
    """

    rules = TRANSFORMER

    def __init__(
        self,
        *,
        text: dict,
        vision: dict,
        projection: int = 768,
        dtype: str | jnp.dtype = "float32",
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        how = {"dtype": dtype, "scan": scan, "remat": remat, "rngs": rngs}
        self.text = ClipText(**text, projection=projection, **how)
        self.vision = ClipVision(**vision, **how)
        width = self.vision.positions.shape[-1]
        self.projection = project(width, projection, dtype=self.vision.dtype, rngs=rngs)
        self.log_scale = param(rngs, (), Init("constant", float(np.log(1 / 0.07))))
        self.vocab, self.length = self.text.vocab, self.text.length
        self.width, self.depth = self.text.width, self.text.depth

    def read(
        self, ids: jax.Array, mask: jax.Array | None = None, *, layers: Sequence[int] = ()
    ) -> Read:
        """What the text tower makes of ids `[B, S]`; `pooled` is in the common space."""
        return self.text.read(ids, mask, layers=layers)

    def finish(self, hidden: jax.Array) -> jax.Array:
        """The text tower's last norm."""
        return self.text.finish(hidden)

    def embed_text(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Texts in the common space, of length 1: `[B, S]` to `[B, projection]` float32."""
        return _unit(self.text.read(ids, mask).pooled)

    def embed_images(self, images: jax.Array) -> jax.Array:
        """Images `[B, H, W, 3]` in [-1, 1] there, of length 1: `[B, projection]` float32."""
        return self.embed_pixels(prepare(images, self.vision.image_size))

    def embed_pixels(self, pixels: jax.Array) -> jax.Array:
        """As `embed_images`, of what `prepare` gives."""
        return _unit(self.projection(self.vision.see(pixels).pooled).astype(jnp.float32))

    def compare(self, texts: jax.Array, images: jax.Array) -> jax.Array:
        """The logits of which belong together: embeddings `[T, P]` and `[I, P]` to `[T, I]`.

        They are cosines times a learned scale; CLIP's scores are the cosines alone.
        """
        return jnp.exp(self.log_scale[...].astype(jnp.float32)) * (texts @ images.T)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
