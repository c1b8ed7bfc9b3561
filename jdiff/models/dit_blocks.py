"""The four ways a DiT block is told t and the class (Peebles and Xie 2023, section 3.2, figure 3).

A block class says how the conditions enter, what each block does with them, and how the image comes
out again:

- `enter(h, tokens)`: h `[B, rows, columns, width]` and the embeddings of t and of the class, each
  `[B, width]`, to what the blocks work on and what each of them is given besides;
- `leave(h, rows, columns)`: the image tokens, `[B, rows, columns, width]`;
- `modulated`: whether the network's last norm is modulated like the blocks' norms, or learned.

Only the code of adaLN-Zero was published. The others follow the text and have the parameter counts
that its figure of Gflops implies; their layers start as those of adaLN-Zero do.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.models import layers
from jdiff.models.attention import Attention
from jdiff.models.initializers import Init, xavier_uniform, zeros
from jdiff.models.layers import LayerNorm, Linear, layer_norm
from jdiff.parallel import tokens as sequences
from jdiff.parallel.tokens import hold


def linear(
    features_in: int, features_out: int | tuple[int, int], *, init: Init | None = None, **changes
) -> Linear:
    """A linear layer that starts Xavier-uniform as one matrix, unless `init` is given."""
    wide = features_out if isinstance(features_out, int) else math.prod(features_out)
    init = init or xavier_uniform(features_in, wide)
    return Linear(features_in, features_out, init=init, **changes)


class _Block(layers.ResidualBlock):
    """What the four have in common: self-attention and a two-layer perceptron."""

    modulated: bool

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        mlp_eps: float = 1e-6,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "rngs": rngs}
        self.mlp_eps = mlp_eps
        self.attention = Attention(heads)
        self.qkv = linear(width, (3, width), axes=("embed", None, "heads"), **kinds)
        self.project = linear(width, width, axes=("heads", "embed"), **kinds)
        self.mlp1 = linear(width, hidden, axes=("embed", "mlp"), **kinds)
        self.mlp2 = linear(hidden, width, axes=("mlp", "embed"), **kinds)

    @staticmethod
    def leave(h: jax.Array, rows: int, columns: int) -> jax.Array:
        """The tokens of the image, [B, rows, columns, width]."""
        return h

    def _attend(self, y: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        return self.project(self.attention(*jnp.unstack(self.qkv(y), axis=-2), mask))

    def _mlp(self, y: jax.Array) -> jax.Array:
        return self.mlp2(jax.nn.gelu(self.mlp1(y), approximate=True))


class AdaLN(_Block):
    """The norms are shifted and scaled by a linear map of c, the sum of the embeddings."""

    modulated = True
    vectors = 4
    init: Init | None = None

    def __init__(self, width: int, *fields, dtype, rngs, **changes):
        super().__init__(width, *fields, dtype=dtype, rngs=rngs, **changes)
        kinds = {"init": self.init, "axes": ("embed", None), "dtype": dtype, "rngs": rngs}
        self.modulation = linear(width, self.vectors * width, **kinds)

    @staticmethod
    def enter(h: jax.Array, tokens: Sequence[jax.Array]) -> tuple[jax.Array, tuple[jax.Array]]:
        """h as it is, and c `[B, width]`."""
        return h, (jax.nn.silu(sum(tokens)),)

    def __call__(self, h: jax.Array, c: jax.Array) -> jax.Array:
        """Tokens h [B, *grid, width] and conditioning c [B, width] to tokens like h."""
        shift1, scale1, shift2, scale2 = self._vectors(h, c)
        h = hold(h + self._attend(layer_norm(h) * (1 + scale1) + shift1))
        return hold(h + self._mlp(layer_norm(h, eps=self.mlp_eps) * (1 + scale2) + shift2))

    def _vectors(self, h: jax.Array, c: jax.Array) -> list[jax.Array]:
        return jnp.split(layers.expand(self.modulation(c), h), self.vectors, axis=-1)


class AdaLNZero(AdaLN):
    """adaLN whose branches are also gated by c; the gates start at zero, the block as identity."""

    vectors = 6
    init = zeros

    def __call__(self, h: jax.Array, c: jax.Array) -> jax.Array:
        """Tokens h [B, *grid, width] and conditioning c [B, width] to tokens like h."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self._vectors(h, c)
        h = hold(h + gate1 * self._attend(layer_norm(h) * (1 + scale1) + shift1))
        y = layer_norm(h, eps=self.mlp_eps) * (1 + scale2) + shift2
        return hold(h + gate2 * self._mlp(y))


class InContext(_Block):
    """The embeddings are two more tokens of the sequence; a block is that of a plain ViT."""

    modulated = False

    def __init__(self, width: int, *fields, dtype, rngs, **changes):
        super().__init__(width, *fields, dtype=dtype, rngs=rngs, **changes)
        self.norm1 = LayerNorm(width, eps=1e-6, rngs=rngs)
        self.norm2 = LayerNorm(width, eps=self.mlp_eps, rngs=rngs)

    @staticmethod
    def enter(h: jax.Array, tokens: Sequence[jax.Array]) -> tuple[jax.Array, tuple]:
        """The sequence of image tokens, row by row, then the others; which of them are seen."""
        h = h.reshape(h.shape[0], -1, h.shape[-1])
        more, seen = sequences.fill(jnp.stack(tokens, axis=1).astype(h.dtype))
        inputs = () if seen is None else (sequences.mask(h.shape[1], seen),)
        return sequences.join(h, more), inputs

    @staticmethod
    def leave(h: jax.Array, rows: int, columns: int) -> jax.Array:
        """The tokens of the image, [B, rows, columns, width]."""
        image, _ = sequences.part(h, rows * columns)
        return image.reshape(h.shape[0], rows, columns, -1)

    def __call__(self, h: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Tokens [B, N, width] to the same; `mask` [B, 1, 1, N], where all look."""
        h = hold(h + self._attend(self.norm1(h), mask))
        return hold(h + self._mlp(self.norm2(h)))


class CrossAttention(InContext):
    """The embeddings are a sequence of their own, which the image attends to after itself."""

    def __init__(
        self, width: int, heads: int, *fields, dtype: jnp.dtype, rngs: nnx.Rngs, **changes
    ):
        super().__init__(width, heads, *fields, dtype=dtype, rngs=rngs, **changes)
        kinds = {"dtype": dtype, "rngs": rngs}
        self.cross_attention = Attention(heads)
        self.cross_norm = LayerNorm(width, eps=1e-6, rngs=rngs)
        self.cross_q = linear(width, width, axes=("embed", "heads"), **kinds)
        self.cross_kv = linear(width, (2, width), axes=("embed", None, "heads"), **kinds)
        self.cross_project = linear(width, width, axes=("heads", "embed"), **kinds)

    @staticmethod
    def enter(h: jax.Array, tokens: Sequence[jax.Array]) -> tuple[jax.Array, tuple[jax.Array]]:
        """h as it is, and the sequence `[B, 2, width]`."""
        return h, (jnp.stack(tokens, axis=1),)

    leave = staticmethod(_Block.leave)

    def __call__(self, h: jax.Array, tokens: jax.Array) -> jax.Array:
        """Tokens h [B, *grid, width] and others [B, places, width] to tokens like h."""
        h = hold(h + self._attend(self.norm1(h)))
        k, v = jnp.unstack(self.cross_kv(tokens), axis=-2)
        seen = self.cross_attention(self.cross_q(self.cross_norm(h)), k, v)
        h = hold(h + self.cross_project(seen))
        return hold(h + self._mlp(self.norm2(h)))


#: The blocks by name, as the field `block` gives them.
BLOCKS: dict[str, type[_Block]] = {
    "in_context": InContext,
    "cross_attention": CrossAttention,
    "adaln": AdaLN,
    "adaln_zero": AdaLNZero,
}
