"""MM-DiT: the network of Stable Diffusion 3 and 3.5 (Esser et al., 2024, 2403.03206).

Text and image are two streams of tokens that meet in joint attention in every block (`joint`); time
and a pooled text vector modulate them. The last block's text is not needed any more, so it only
lends its keys and values. SD3.5-medium's first blocks attend a second time, image to image.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdiff.models import joint, layers, stacked
from jdiff.models.attention import Attention
from jdiff.models.dit import patchify, unpatchify
from jdiff.models.initializers import param, zeros
from jdiff.models.joint import QKV, JointBlock, Stream
from jdiff.models.layers import layer_norm, run
from jdiff.models.module import Module
from jdiff.models.remat import named
from jdiff.parallel.layout import TRANSFORMER
from jdiff.parallel.tokens import hold


class MMDiT(Module):
    """An MM-DiT `model(x [B, H, W, C], t [B], cond, key=None) -> [B, H, W, out_channels]` float32.

    `cond` holds "text" [B, L, text_width], "pooled" [B, pooled_width] and, if some of the text is
    padding that must not be seen, "text_mask" bool [B, L]. There is no dropout: `key` has no
    effect. As in the checkpoints t runs to 1000, where it is noise (see `time_scale`).

    Args:
        patch: side of a patch in latent pixels.
        width: channels of a token; a multiple of 4 and of `heads`.
        depth: number of blocks, the last of which drops the text.
        dual_depth: how many of them, the first ones, attend to the image a second time.
        qk_norm: root-mean-square norm of queries and keys, head by head.
        image_size: side in latent pixels that the table of positions spans: its coordinates run
            from 0 to image_size / patch, however fine it is.
        positions: side of the table of positions in patches: the largest image. Smaller images use
            its middle.
        stored_positions: the table is a parameter that gets no gradient, read from a checkpoint,
            instead of computed. Checkpoints hold theirs; it need not be the computed one.
        scalars: further numbers in `cond`, embedded like t. See `Scalars`.
        time_scale: multiplies t (and the scalars) ahead of its embedding.
        dtype: of the activations; parameters, norms, softmax and c stay float32.
        scan: stack the equal blocks and scan over them; `stack_blocks` with "blocks" and, if there
            are any, "dual_blocks" converts weights.
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
        width: int = 1536,
        depth: int = 24,
        heads: int = 24,
        dual_depth: int = 0,
        qk_norm: bool = False,
        text_width: int = 4096,
        pooled_width: int = 2048,
        image_size: int = 128,
        positions: int = 192,
        stored_positions: bool = False,
        scalars: Sequence[str] = (),
        time_scale: float = 1.0,
        dtype: str | jnp.dtype = "float32",
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        layers.check_positive(in_channels=in_channels, patch=patch, depth=depth, width=width)
        layers.check_positive(text_width=text_width, pooled_width=pooled_width)
        layers.check_positive(image_size=image_size, positions=positions)
        layers.check_heads(heads, width, "width")
        layers.grid_embedding(1, 1, width)  # raises if the width has none
        if not 0 <= dual_depth < depth:
            raise ValueError(f"dual_depth={dual_depth} must be from 0 to depth - 1 = {depth - 1}")
        self.in_channels, self.out_channels = in_channels, out_channels or in_channels
        self.patch, self.width, self.positions = patch, width, positions
        self.base = image_size // patch
        self.text_width, self.pooled_width = text_width, pooled_width
        self.dtype = dtype = layers.float_dtype(dtype)
        self.remat = named(remat)

        linear = functools.partial(joint.linear, dtype=dtype, rngs=rngs)
        self.embed_patches = linear(patch**2 * in_channels, width, None, "embed")
        table = (positions, positions, width)
        self.table = param(rngs, table, zeros) if stored_positions else None
        self.embed_text = linear(text_width, width, "text", "embed")
        self.conditions = joint.Conditions(
            width, pooled_width, scalars=scalars, time_scale=time_scale, rngs=rngs
        )
        block = functools.partial(JointBlock, width, heads, qk_norm=qk_norm, dtype=dtype)
        repeat = functools.partial(stacked.repeated, scan=scan, rngs=rngs)
        self.dual_blocks = repeat(functools.partial(block, image=DualStream), dual_depth)
        self.blocks = repeat(block, depth - 1 - dual_depth)
        self.last = block(text=LastText, rngs=rngs)
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
        c = self.conditions(t, cond)
        image = self.embed_patches(patchify(x, self.patch))
        image = image + self._positions(rows, columns).astype(self.dtype)
        text, mask = joint.text_tokens(cond, rows * columns)
        h = (hold(image), hold(self.embed_text(text)))
        for blocks in (self.dual_blocks, self.blocks):
            h = joint.through(blocks, h, c, mask, remat=self.remat)
        h, _ = run(self.last, h, c, mask, remat=self.remat)
        scale, shift = jnp.split(self.modulation(c)[:, None], 2, axis=-1)
        h = self.out(layer_norm(h) * (1 + scale) + shift)
        return unpatchify(h, self.patch, rows, columns).astype(jnp.float32)

    def _positions(self, rows: int, columns: int) -> np.ndarray | jax.Array:
        """The middle of the table of positions, [rows * columns, width]."""
        if max(rows, columns) > self.positions:
            most = self.positions * self.patch
            raise ValueError(
                f"MMDiT with positions={self.positions} takes images up to {most} x {most}, not "
                f"{rows * self.patch} x {columns * self.patch}"
            )
        top, left = (self.positions - rows) // 2, (self.positions - columns) // 2
        if self.table is None:
            # Channels of the column, then of the row: their lines suffice, the table is large.
            spacing, half = (self.base / self.positions,) * 2, self.width // 2
            line = functools.partial(layers.grid_embedding, channels=self.width, spacing=spacing)
            column = line(1, left + columns)[None, left:, :half]
            row = line(top + rows, 1)[top:, None, half:]
            parts = [np.broadcast_to(part, (rows, columns, half)) for part in (column, row)]
            return np.concatenate(parts, axis=-1).reshape(-1, self.width)
        table = jax.lax.stop_gradient(self.table[...])[top : top + rows, left : left + columns]
        return table.reshape(-1, self.width)


class DualStream(Stream):
    """An image stream that also attends to itself alone, beside the joint attention (SD3.5)."""

    parts = 9  #: those of `Stream`, then shift, scale and gate of the second attention

    def __init__(self, width: int, heads: int, *, qk_norm: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(width, heads, qk_norm=qk_norm, dtype=dtype, rngs=rngs)
        self.attention = Attention(heads)
        self.qkv2 = QKV(width, heads, qk_norm=qk_norm, dtype=dtype, rngs=rngs)
        self.project2 = joint.linear(width, width, "heads", "embed", dtype=dtype, rngs=rngs)

    def leave(self, h: jax.Array, attended: jax.Array, vectors: Sequence[jax.Array]) -> jax.Array:
        """As `Stream`, with the second attention's residual."""
        shift, scale, gate = vectors[6:]
        y = layer_norm(h) * (1 + scale) + shift
        own = self.project2(self.attention(*self.qkv2(y)))
        return super().leave(h + gate * own, attended, vectors)


class LastText(Module):
    """The text of the last block: it is seen and goes no further.

    Checkpoints have queries for it, which nothing reads: their gradient is zero.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        dense = functools.partial(joint.linear, dtype=dtype, rngs=rngs)
        self.modulation = dense(width, 2 * width, "embed", None, init=zeros)
        self.qkv = QKV(width, heads, qk_norm=qk_norm, dtype=dtype, rngs=rngs)

    def modulate(self, c: jax.Array) -> list[jax.Array]:
        """The scale, then the shift: [B, 1, width] each."""
        return jnp.split(self.modulation(c)[:, None], 2, axis=-1)

    def enter(
        self, h: jax.Array, vectors: Sequence[jax.Array], angles: jax.Array | None
    ) -> tuple[jax.Array, ...]:
        """Queries, keys and values of the tokens h [B, L, width]."""
        scale, shift = vectors
        return self.qkv(layer_norm(h) * (1 + scale) + shift, angles)

    def leave(self, h: jax.Array, attended: jax.Array, vectors: Sequence[jax.Array]) -> jax.Array:
        """The tokens as they were."""
        del attended, vectors
        return h


def mmdit(depth: int = 24, **changes) -> dict:
    """Fields of the SD3 paper's family (section 5.3): `depth` blocks and heads, width 64 depth."""
    return {"depth": depth, "heads": depth, "width": 64 * depth} | changes


def sd3_medium(**changes) -> dict:
    """Fields of Stable Diffusion 3 medium: 2,028,328,000 parameters."""
    return mmdit(24) | changes


def sd35_medium(**changes) -> dict:
    """Fields of Stable Diffusion 3.5 medium: 2,243,171,520 parameters."""
    return mmdit(24, qk_norm=True, dual_depth=13, positions=384) | changes


def sd35_large(**changes) -> dict:
    """Fields of Stable Diffusion 3.5 large: 8,056,627,520 parameters."""
    return mmdit(38, qk_norm=True) | changes
