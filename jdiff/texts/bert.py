"""BERT (Devlin et al. 2019), and sentence encoders that have its shape, as MiniLM."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.errors import choose
from jdiff.models import layers, stacked
from jdiff.models.attention import Attention
from jdiff.models.initializers import normal, param, zeros
from jdiff.models.layers import LayerNorm, Linear
from jdiff.models.remat import named
from jdiff.parallel.layout import TRANSFORMER, constrain
from jdiff.texts import base
from jdiff.texts.base import ACTIVATIONS, Read, TextNetwork


class Bert(TextNetwork):
    """BERT; `pooled` is its map of the first token's state, through tanh.

    Sentence encoders take the mean of `last` over the tokens seen instead.

    Args:
      vocab: number of tokens.
      length: most tokens of a text.
      types: number of token types, e.g. which of two texts a token is of.
      width: channels of a token.
      depth: number of blocks.
      heads: of attention; they divide the width.
      hidden: channels inside the perceptrons.
      activation: of the perceptrons, a name in `texts.base.ACTIVATIONS`.
      pooling: whether it has the map of the first token; without, `pooled` is None.
      eps: of the norms.
      dtype: of the activations; parameters, norms and softmax stay float32.
      scan: stack the blocks and scan over them.
      remat: a policy of `jdiff.models.remat`.

    Raises:
      ValueError: a field is out of range.
    """

    rules = TRANSFORMER  # how it is split over devices

    def __init__(
        self,
        *,
        vocab: int = 30522,
        length: int = 512,
        types: int = 2,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        activation: str = "gelu",
        pooling: bool = True,
        eps: float = 1e-12,
        dtype: str | jnp.dtype = "float32",
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        layers.check_positive(vocab=vocab, length=length, types=types, width=width, depth=depth)
        layers.check_positive(hidden=hidden, eps=eps)
        layers.check_heads(heads, width, "width")
        choose("activation", activation, ACTIVATIONS)
        self.vocab, self.length, self.width, self.depth = vocab, length, width, depth
        self.dtype, self.scan, self.remat = layers.float_dtype(dtype), scan, named(remat)
        table = lambda count: param(rngs, (count, width), normal(0.02), (None, "embed"))
        self.tokens, self.positions, self.types = table(vocab), table(length), table(types)
        self.norm = LayerNorm(width, eps=eps, rngs=rngs)
        block = functools.partial(
            Block, width, heads, hidden, activation, eps=eps, dtype=self.dtype
        )
        self.blocks = stacked.repeated(block, depth, scan=scan, rngs=rngs)
        self.pool = linear(width, width, ("embed", None), self.dtype, rngs) if pooling else None

    def read(
        self,
        ids: jax.Array,
        mask: jax.Array | None = None,
        *,
        layers: Sequence[int] = (),
        types: jax.Array | None = None,
    ) -> Read:
        """What it makes of ids `[B, S]`; see `TextNetwork.read`.

        Args:
          types: integers `[B, S]`, the tokens' types; None: all of type 0.
        """
        base.check(self, ids, mask)
        of_type = self.types[...][0 if types is None else types]
        h = self.tokens[...][ids] + of_type + self.positions[...][: ids.shape[1]]
        h = self.norm(h.astype(jnp.float32)).astype(self.dtype)
        seen = None if mask is None else mask[:, None, None, :]
        how = {"layers": layers, "scan": self.scan, "remat": self.remat}
        h, hidden = base.through(self.blocks, self.depth, h, seen, **how)
        last = h.astype(jnp.float32)
        pooled = None
        if self.pool is not None:
            pooled = jnp.tanh(self.pool(last[:, 0]).astype(jnp.float32))
        return Read(last, pooled, hidden)

    def finish(self, hidden: jax.Array) -> jax.Array:
        """The states as they are: each block ends with its norm."""
        return hidden.astype(jnp.float32)


class Block(layers.ResidualBlock):
    """Attention and a perceptron, a norm behind each sum."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        activation: str,
        *,
        eps: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.attention = Attention(heads)
        self.qkv = linear(width, (3, width), ("embed", None, "heads"), dtype, rngs)
        self.project = linear(width, width, ("heads", "embed"), dtype, rngs)
        self.norm1 = LayerNorm(width, eps=eps, rngs=rngs)
        self.mlp1 = linear(width, hidden, ("embed", "mlp"), dtype, rngs)
        self.mlp2 = linear(hidden, width, ("mlp", "embed"), dtype, rngs)
        self.norm2 = LayerNorm(width, eps=eps, rngs=rngs)

    def __call__(self, h: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Tokens `[B, S, width]` to the same; `mask` `[B, 1, 1, S]` where to look."""
        q, k, v = jnp.unstack(self.qkv(h), axis=-2)
        h = self.norm1(h + self.project(self.attention(q, k, v, mask)))
        y = ACTIVATIONS[self.activation](self.mlp1(constrain(h, "batch", None, None)))
        return constrain(self.norm2(h + self.mlp2(y)), "batch", None, None)


def linear(
    features_in: int, features_out: int | tuple[int, int], axes: tuple, dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> Linear:  # fmt: skip
    """A linear layer that starts as BERT's: N(0, 0.02^2), no bias yet."""
    init = normal(0.02)
    return Linear(
        features_in, features_out, init=init, bias_init=zeros, axes=axes, dtype=dtype, rngs=rngs
    )


def minilm_l6(**changes) -> dict:
    """Fields of MiniLM with six layers (Wang et al. 2020): all-MiniLM-L6-v2's."""
    return {"width": 384, "depth": 6, "hidden": 1536} | changes
