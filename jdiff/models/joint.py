"""Joint attention of text and image: each stream has weights of its own, one softmax sees both.

The blocks of SD3 (Esser et al., 2024) and FLUX: streams are modulated by a common vector c as in
adaLN-Zero, project queries, keys and values with their own weights, and meet in one `Attention`,
text first. What else the families share is here too: the vector c, and the checks of conditions.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.models import layers, stacked
from jdiff.models.attention import Attention
from jdiff.models.initializers import Init, normal, xavier_uniform, zeros
from jdiff.models.layers import Linear, RMSNorm, layer_norm, together
from jdiff.models.module import Module
from jdiff.models.rope import rotate
from jdiff.models.scalars import Scalars
from jdiff.parallel import tokens
from jdiff.parallel.tokens import hold

#: Channels of the sinusoids of t.
WAVES = 256


def linear(
    features_in: int,
    features_out: int | tuple[int, int],
    *axes: str | None,
    init: Init | None = None,
    bias: bool = True,
    dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
) -> Linear:
    """A linear layer of these logical axes; Xavier-uniform unless told otherwise, as in DiT."""
    wide = features_out if isinstance(features_out, int) else math.prod(features_out)
    fields = {"init": init or xavier_uniform(features_in, wide), "axes": axes}
    fields |= {"bias_init": zeros if bias else None, "dtype": dtype, "rngs": rngs}
    return Linear(features_in, features_out, **fields)


class Conditions(Module):
    """The vector that modulates every block: silu(time + pooled text + further numbers).

    There is no pooled text if `pooled_width` is 0. Always float32: 999 and 1000 are one number in
    bfloat16.
    """

    def __init__(
        self,
        width: int,
        pooled_width: int = 0,
        *,
        scalars: Sequence[str] = (),
        time_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        dense = functools.partial(linear, init=normal(0.02), rngs=rngs)
        time = lambda: (dense(WAVES, width, None, "embed"), dense(width, width, None, "embed"))
        self.pooled_width, self.time_scale = pooled_width, time_scale
        self.time1, self.time2 = time()
        self.pooled1 = dense(pooled_width, width, "text", "embed") if pooled_width else None
        self.pooled2 = dense(width, width, None, "embed") if pooled_width else None
        self.scalars = Scalars(scalars, time) if scalars else None

    def __call__(self, t: jax.Array, cond: Mapping[str, jax.Array]) -> jax.Array:
        """[B, width] from t [B] and cond["pooled"] [B, pooled_width], and the scalars."""
        waves = functools.partial(layers.sinusoidal, channels=WAVES, scale=self.time_scale)
        c = self.time2(jax.nn.silu(self.time1(waves(t))))
        if self.pooled1 is not None:
            c = c + self.pooled2(jax.nn.silu(self.pooled1(cond["pooled"])))
        if self.scalars is not None:
            c = c + self.scalars(t, cond, waves)
        return jax.nn.silu(c)


class QKV(Module):
    """Queries, keys and values of one stream, normed and turned head by head."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_norm: bool,
        eps: float = 1e-6,
        bias: bool = True,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        dense = functools.partial(linear, bias=bias, dtype=dtype, rngs=rngs)
        self.q, self.k, self.v = (dense(width, width, "embed", "heads") for _ in range(3))
        norm = functools.partial(RMSNorm, width // heads, eps=eps, rngs=rngs)
        self.norm_q, self.norm_k = (norm(), norm()) if qk_norm else (None, None)

    def __call__(
        self, y: jax.Array, angles: jax.Array | None = None, *others: Linear
    ) -> tuple[jax.Array, ...]:
        """Three arrays like y [B, N, width]; `angles` of the tokens as in `rope.rotate`.

        What `others` make of y, in parts of the same width, follows.
        """

        def finish(x: jax.Array, norm: RMSNorm | None) -> jax.Array:
            heads = x.reshape(*x.shape[:-1], self.heads, -1)
            heads = heads if norm is None else norm(heads)
            heads = heads if angles is None else rotate(heads, angles)
            return heads.reshape(x.shape)

        q, k, *rest = together(y, self.q, self.k, self.v, *others)
        return finish(q, self.norm_q), finish(k, self.norm_k), *rest


class Stream(Module):
    """What one kind of token has of its own in a joint block."""

    parts = 6  #: vectors that c is mapped to: shift, scale, gate of the attention and of the MLP

    def __init__(self, width: int, heads: int, *, qk_norm: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        dense = functools.partial(linear, dtype=dtype, rngs=rngs)
        self.modulation = dense(width, self.parts * width, "embed", None, init=zeros)
        self.qkv = QKV(width, heads, qk_norm=qk_norm, dtype=dtype, rngs=rngs)
        self.project = dense(width, width, "heads", "embed")
        self.mlp1 = dense(width, 4 * width, "embed", "mlp")
        self.mlp2 = dense(4 * width, width, "mlp", "embed")

    def modulate(self, c: jax.Array) -> list[jax.Array]:
        """`parts` vectors [B, 1, width]."""
        return jnp.split(self.modulation(c)[:, None], self.parts, axis=-1)

    def enter(
        self, h: jax.Array, vectors: Sequence[jax.Array], angles: jax.Array | None
    ) -> tuple[jax.Array, ...]:
        """Queries, keys and values of the tokens h [B, N, width]."""
        shift, scale = vectors[:2]
        return self.qkv(layer_norm(h) * (1 + scale) + shift, angles)

    def leave(self, h: jax.Array, attended: jax.Array, vectors: Sequence[jax.Array]) -> jax.Array:
        """The tokens with what they have seen, and the MLP's residual."""
        gate1, shift, scale, gate2 = vectors[2:6]
        h = hold(h + gate1 * self.project(attended))
        y = layer_norm(h) * (1 + scale) + shift
        return hold(h + gate2 * self.mlp2(jax.nn.gelu(self.mlp1(y), approximate=True)))


class JointBlock(layers.ResidualBlock):
    """A block on (image, text): attention over both, an MLP each; the identity at the start.

    Args:
        image, text: the streams' classes.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_norm: bool,
        image: type[Stream] = Stream,
        text: type[Stream] = Stream,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.attention = Attention(heads)
        self.image = image(width, heads, qk_norm=qk_norm, dtype=dtype, rngs=rngs)
        self.text = text(width, heads, qk_norm=qk_norm, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        h: tuple[jax.Array, jax.Array],
        c: jax.Array,
        mask: jax.Array | None = None,
        angles: tuple[jax.Array | None, jax.Array | None] = (None, None),
    ) -> tuple[jax.Array, jax.Array]:
        """(image [B, N, width], text [B, L, width]) to the same.

        Args:
            h: image and text tokens.
            c: what modulates them, [B, width].
            mask: of the L + N places, text first, as `tokens.mask` makes it.
            angles: of the image's and the text's tokens, as in `rope.rotate`; None: not turned.
        """
        image, text = h
        of_image, of_text = self.image.modulate(c), self.text.modulate(c)
        pairs = zip(
            self.text.enter(text, of_text, angles[1]), self.image.enter(image, of_image, angles[0])
        )
        q, k, v = (tokens.join(*pair) for pair in pairs)
        seen = tokens.part(self.attention(q, k, v, mask), text.shape[1])
        image = self.image.leave(image, seen[1], of_image)
        return image, self.text.leave(text, seen[0], of_text)


def through(blocks: nnx.Module | stacked.Varied, h, *inputs, remat: bool | str):
    """h through the blocks of `stacked.repeated`, one after the other."""
    if not isinstance(blocks, nnx.List):
        return stacked.scan(blocks, h, *inputs, remat=remat)
    for block in blocks:
        h = layers.run(block, h, *inputs, remat=remat)
    return h


def text_tokens(cond: Mapping[str, jax.Array], places: int) -> tuple[jax.Array, jax.Array | None]:
    """cond["text"] [B, L, width], and the mask of it and `places` image tokens, or None.

    Where cond["text_mask"] is False, no token sees the text token; without one, all are seen. Text
    that does not divide over the devices that tokens are split over is filled up, unseen.
    """
    text, seen = tokens.fill(cond["text"], cond.get("text_mask"))
    return hold(text), tokens.mask(text.shape[1] if seen is None else seen, places)


def check_text(
    network: nnx.Module, cond: Mapping[str, jax.Array], batch: int, *, width: int, pooled: int = 0
) -> None:
    """Raise a ValueError that names the entry, if cond lacks a text of these widths.

    No pooled text is asked for if `pooled` is 0.
    """
    name = type(network).__name__
    text, mask = cond.get("text"), cond.get("text_mask")
    shapes = {"text": f"[{batch}, L, {width}]"}
    if pooled:
        shapes["pooled"] = f"[{batch}, {pooled}]"
    for entry, shape in shapes.items():
        if entry not in cond:
            raise ValueError(
                f"{name} needs cond[{entry!r}] of shape {shape}; cond has {sorted(cond)}"
            )
    if text.ndim != 3 or (text.shape[0], text.shape[2]) != (batch, width):
        raise ValueError(f"{name} takes cond['text'] {shapes['text']}, not {list(text.shape)}")
    if pooled and cond["pooled"].shape != (batch, pooled):
        found = list(cond["pooled"].shape)
        raise ValueError(f"{name} takes cond['pooled'] {shapes['pooled']}, not {found}")
    if mask is not None and (mask.shape != text.shape[:2] or mask.dtype != jnp.bool_):
        raise ValueError(
            f"{name} takes cond['text_mask'] as bool {list(text.shape[:2])}, True where a token "
            f"is read, not {mask.dtype} {list(mask.shape)}"
        )
