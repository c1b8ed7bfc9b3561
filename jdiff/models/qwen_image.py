"""Qwen-Image's network (Wu et al., 2025): 60 dual-stream blocks with rotary positions.

The blocks are FLUX's dual ones (`joint`). Rows and columns of the image are counted from its
centre, and the text lies on the diagonal beyond its corner (the report's MSRoPE), so a larger image
or a longer text only adds positions at the rim.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdiff.models import joint, layers, rope, stacked
from jdiff.models.dit import patchify, unpatchify
from jdiff.models.initializers import zeros
from jdiff.models.joint import JointBlock
from jdiff.models.layers import RMSNorm, layer_norm
from jdiff.models.module import Module
from jdiff.models.remat import named
from jdiff.parallel.layout import TRANSFORMER
from jdiff.parallel.tokens import hold


class QwenImage(Module):
    """A Qwen-Image `model(x [B, H, W, C], t [B], cond, key=None) -> [B, H, W, out_channels]`.

    The output is float32. `cond` holds "text" [B, L, text_width], the `scalars` and, if some of the
    text is padding that must not be seen, "text_mask" bool [B, L]. Patches are cut inside, H and W
    are multiples of `patch`. There is no dropout: `key` has no effect. t runs from 0 to 1, where it
    is noise.

    Args:
        patch: side of a patch in latent pixels.
        width: channels of a token; a multiple of `heads`.
        depth: number of blocks.
        text_width: channels of the text; its root mean square is normed before it is embedded.
        rope_dims: channels of a head that tell the frame, the row and the column.
        theta: base of their wavelengths.
        scalars: further numbers in `cond`, embedded like t. See `Scalars`.
        time_scale: multiplies t and the scalars ahead of their embedding.
        dtype: of the activations; parameters, norms, softmax, angles and c stay float32.
        scan: stack the blocks and scan over them.
        remat: which activations the backward pass recomputes, see `jdiff.models.remat`.

    Raises:
        ValueError: if a field is out of range or an input does not fit.
    """

    rules = TRANSFORMER  # how it is split over devices

    def __init__(
        self,
        *,
        in_channels: int = 16,
        out_channels: int | None = None,
        patch: int = 2,
        width: int = 3072,
        depth: int = 60,
        heads: int = 24,
        text_width: int = 3584,
        rope_dims: Sequence[int] = (16, 56, 56),
        theta: float = 10_000.0,
        scalars: Sequence[str] = (),
        time_scale: float = 1000.0,
        dtype: str | jnp.dtype = "float32",
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        layers.check_positive(in_channels=in_channels, patch=patch, width=width, depth=depth)
        layers.check_positive(text_width=text_width, theta=theta)
        layers.check_heads(heads, width, "width")
        rope.check_dims(rope_dims, head=width // heads)
        if len(rope_dims) != 3:
            raise ValueError(f"rope_dims={tuple(rope_dims)} must be for frame, row and column")
        self.in_channels, self.out_channels = in_channels, out_channels or in_channels
        self.patch, self.text_width = patch, text_width
        self.rope_dims, self.theta = tuple(rope_dims), theta
        self.dtype = dtype = layers.float_dtype(dtype)
        self.remat = named(remat)

        linear = functools.partial(joint.linear, dtype=dtype, rngs=rngs)
        self.embed_patches = linear(patch**2 * in_channels, width, None, "embed")
        self.text_norm = RMSNorm(text_width, eps=1e-6, rngs=rngs)
        self.embed_text = linear(text_width, width, "text", "embed")
        self.conditions = joint.Conditions(width, scalars=scalars, time_scale=time_scale, rngs=rngs)
        block = functools.partial(JointBlock, width, heads, qk_norm=True, dtype=dtype)
        self.blocks = stacked.repeated(block, depth, scan=scan, rngs=rngs)
        self.modulation = linear(width, 2 * width, "embed", None, init=zeros)
        self.out = linear(width, patch**2 * self.out_channels, "embed", None, init=zeros)

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        cond: Mapping[str, jax.Array],
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The network's raw output for noisy latents x at noise conditioning t."""
        del key
        layers.check_inputs(
            self,
            x,
            t,
            cond,
            in_channels=self.in_channels,
            multiple=self.patch,
            reason=f"patch={self.patch}",
            num_classes=0,
        )
        joint.check_text(self, cond, len(x), width=self.text_width)
        rows, columns = x.shape[1] // self.patch, x.shape[2] // self.patch
        text, mask = joint.text_tokens(cond, rows * columns)
        places = positions(rows, columns, text.shape[1])
        turns = tuple(rope.angles(place, self.rope_dims, self.theta) for place in places)
        c = self.conditions(t, cond)

        text = self.embed_text(self.text_norm(text))
        h = (hold(self.embed_patches(patchify(x, self.patch))), hold(text))
        h, _ = joint.through(self.blocks, h, c, mask, turns, remat=self.remat)
        scale, shift = jnp.split(self.modulation(c)[:, None], 2, axis=-1)
        h = self.out(layer_norm(h) * (1 + scale) + shift)
        return unpatchify(h, self.patch, rows, columns).astype(jnp.float32)


def positions(rows: int, columns: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(frame, row, column) of the image's tokens [rows * columns, 3] and the text's [length, 3].

    The first token behind the image's middle is 0; the text starts where the longer side ends and
    goes on in all three coordinates alike.
    """
    sides = (np.arange(side) - (side - side // 2) for side in (rows, columns))
    start = max(rows // 2, columns // 2)
    text = np.arange(start, start + length, dtype=np.float32)
    return rope.grid([0], *sides), np.repeat(text[:, None], 3, axis=1)


def qwen_image(**changes) -> dict:
    """Fields of Qwen-Image: 20,430,401,088 parameters."""
    return dict(changes)
