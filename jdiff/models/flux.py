"""FLUX.1's network (Black Forest Labs, 2024): dual-stream blocks, then single-stream ones.

The dual blocks are those of SD3 (`joint`), with rotary positions in place of a table and normed
queries and keys. The single blocks run on text and image as one sequence, attention and MLP side by
side. The released dev model is distilled: the guidance scale is an input, embedded like t.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdiff.models import joint, layers, rope, stacked
from jdiff.models.attention import Attention
from jdiff.models.dit import patchify, unpatchify
from jdiff.models.initializers import param, xavier_uniform, zeros
from jdiff.models.joint import QKV, JointBlock
from jdiff.models.layers import layer_norm
from jdiff.models.module import Module
from jdiff.models.remat import named
from jdiff.parallel import tokens
from jdiff.parallel.layout import TRANSFORMER
from jdiff.parallel.tokens import hold


class Flux(Module):
    """A FLUX `model(x [B, H, W, C], t [B], cond, key=None) -> [B, H, W, out_channels]` float32.

    `cond` holds "text" [B, L, text_width], "pooled" [B, pooled_width], the `scalars` (of the dev
    model "guidance" [B], usually 3.5) and, if some of the text is padding that must not be seen,
    "text_mask" bool [B, L]. Patches are cut inside, H and W are multiples of `patch`. There is no
    dropout: `key` has no effect. t runs from 0 to 1, where it is noise.

    Args:
        patch: side of a patch in latent pixels.
        width: channels of a token; a multiple of `heads`.
        depth: number of dual-stream blocks.
        single_depth: number of single-stream blocks.
        rope_dims: channels of a head that tell the frame (always 0), the row and the column.
        theta: base of their wavelengths.
        scalars: further numbers in `cond`, embedded like t. See `Scalars`.
        time_scale: multiplies t and the scalars ahead of their embedding.
        dtype: of the activations; parameters, norms, softmax, angles and c stay float32.
        scan: stack the equal blocks and scan over them; `stack_blocks` with ("blocks", "singles")
            converts weights.
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
        depth: int = 19,
        single_depth: int = 38,
        heads: int = 24,
        text_width: int = 4096,
        pooled_width: int = 768,
        rope_dims: Sequence[int] = (16, 56, 56),
        theta: float = 10_000.0,
        scalars: Sequence[str] = (),
        time_scale: float = 1000.0,
        dtype: str | jnp.dtype = "float32",
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        layers.check_positive(in_channels=in_channels, patch=patch, width=width, theta=theta)
        layers.check_positive(text_width=text_width, pooled_width=pooled_width)
        layers.check_heads(heads, width, "width")
        if depth < 0 or single_depth < 0 or not depth + single_depth:
            raise ValueError(f"depth={depth} and single_depth={single_depth} leave no block")
        rope.check_dims(rope_dims, head=width // heads)
        if len(rope_dims) != 3:
            raise ValueError(f"rope_dims={tuple(rope_dims)} must be for frame, row and column")
        self.in_channels, self.out_channels = in_channels, out_channels or in_channels
        self.patch, self.text_width, self.pooled_width = patch, text_width, pooled_width
        self.rope_dims, self.theta = tuple(rope_dims), theta
        self.dtype = dtype = layers.float_dtype(dtype)
        self.remat = named(remat)

        linear = functools.partial(joint.linear, dtype=dtype, rngs=rngs)
        self.embed_patches = linear(patch**2 * in_channels, width, None, "embed")
        self.embed_text = linear(text_width, width, "text", "embed")
        self.conditions = joint.Conditions(
            width, pooled_width, scalars=scalars, time_scale=time_scale, rngs=rngs
        )
        dual = functools.partial(JointBlock, width, heads, qk_norm=True, dtype=dtype)
        single = functools.partial(SingleBlock, width, heads, dtype=dtype)
        self.blocks = stacked.repeated(dual, depth, scan=scan, rngs=rngs)
        self.singles = stacked.repeated(single, single_depth, scan=scan, rngs=rngs)
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
        joint.check_text(self, cond, len(x), width=self.text_width, pooled=self.pooled_width)
        rows, columns = x.shape[1] // self.patch, x.shape[2] // self.patch
        text, mask = joint.text_tokens(cond, rows * columns)
        length = text.shape[1]
        positions = np.pad(rope.grid([0], range(rows), range(columns)), [(length, 0), (0, 0)])
        angles = rope.angles(positions, self.rope_dims, self.theta)  # text is at the origin
        c = self.conditions(t, cond)

        h = (hold(self.embed_patches(patchify(x, self.patch))), hold(self.embed_text(text)))
        turns = (angles[length:], None)
        image, text = joint.through(self.blocks, h, c, mask, turns, remat=self.remat)
        h = hold(tokens.join(text, image))
        turn = tokens.join(angles[None, :length], angles[None, length:])[0]
        h = joint.through(self.singles, h, c, mask, turn, remat=self.remat)
        _, h = tokens.part(h, length)
        scale, shift = jnp.split(self.modulation(c)[:, None], 2, axis=-1)
        h = self.out(layer_norm(h) * (1 + scale) + shift)
        return unpatchify(h, self.patch, rows, columns).astype(jnp.float32)


class SingleBlock(layers.ResidualBlock):
    """Attention and an MLP side by side on one modulated norm of all tokens (Dehghani et al. 2023).

    The identity at the start.
    """

    def __init__(self, width: int, heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        linear = functools.partial(joint.linear, dtype=dtype, rngs=rngs)
        self.attention = Attention(heads)
        self.modulation = linear(width, 3 * width, "embed", None, init=zeros)
        self.qkv = QKV(width, heads, qk_norm=True, dtype=dtype, rngs=rngs)
        self.mlp = linear(width, (4, width), "embed", None, "mlp")
        self.out = Joining(width, dtype=dtype, rngs=rngs)

    def __call__(
        self, h: jax.Array, c: jax.Array, mask: jax.Array | None, angles: jax.Array
    ) -> jax.Array:
        """Tokens h [B, N, width], text first, to the same; see `JointBlock`."""
        shift, scale, gate = jnp.split(self.modulation(c)[:, None], 3, axis=-1)
        y = layer_norm(h) * (1 + scale) + shift
        q, k, v, *hidden = self.qkv(y, angles, self.mlp)
        attended = self.attention(q, k, v, mask)
        hidden = [jax.nn.gelu(part, approximate=True) for part in hidden]
        return hold(h + gate * self.out(jnp.stack([attended, *hidden], axis=-2)))


class Joining(Module):
    """A linear map of five vectors side by side, each of which may be split over devices."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        rule = xavier_uniform(5 * width, width)
        self.kernel = param(rngs, (5, width, width), rule, (None, "mlp", "embed"))
        self.bias = param(rngs, (width,), zeros, ("embed",))

    def __call__(self, parts: jax.Array) -> jax.Array:
        """Map [..., 5, width] to [..., width]."""
        kernel = self.kernel.fetched(lambda w: w.astype(self.dtype))
        return jnp.tensordot(parts.astype(self.dtype), kernel, 2) + self.bias[...].astype(
            self.dtype
        )


def flux_dev(**changes) -> dict:
    """Fields of FLUX.1-dev, which takes cond["guidance"]: 11,901,408,320 parameters."""
    return {"scalars": ("guidance",)} | changes


def flux_schnell(**changes) -> dict:
    """Fields of FLUX.1-schnell: 11,891,178,560 parameters."""
    return dict(changes)
