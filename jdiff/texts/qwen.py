"""Qwen's language models as readers: Qwen2.5-VL's text tower (Qwen-Image) and Qwen3 (Z-Image).

Causal transformers with rotary positions, root-mean-square norms, gated perceptrons and fewer heads
of keys and values than of queries (Bai et al., 2025; Yang et al., 2025). Qwen2.5's maps to queries,
keys and values have biases; Qwen3's have none, and norm each head's queries and keys.

Qwen2.5-VL turns a head's planes by three positions, in time, height and width. Words have the same
one in all three, so that a text alone is turned as by one position.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdiff.errors import choose
from jdiff.models import layers, rope, stacked
from jdiff.models.attention import Attention
from jdiff.models.initializers import normal, param, zeros
from jdiff.models.layers import Linear, RMSNorm
from jdiff.models.remat import named
from jdiff.parallel.layout import TRANSFORMER, constrain
from jdiff.texts import base
from jdiff.texts.base import ACTIVATIONS, Read, TextNetwork


class QwenText(TextNetwork):
    """A language model of Qwen's without its last map to tokens; nothing is pooled.

    Each token sees those before it. Positions are counted from the first place, also of a text that
    is padded there: scores depend on their differences alone.

    Args:
      vocab: number of tokens.
      width: channels of a token.
      depth: number of blocks.
      heads: of queries.
      kv_heads: of keys and values, a divisor of `heads`: as many queries share each.
      head_width: channels of a head, even; heads * head_width need not be the width.
      hidden: channels inside the perceptrons.
      activation: of their gates, a name in `texts.base.ACTIVATIONS`.
      bias: whether queries, keys and values have one.
      qk_norm: whether queries and keys are normed, head by head.
      theta: base of the wavelengths of positions.
      eps: of the norms.
      dtype: of the activations; parameters, norms, softmax and angles stay float32.
      scan: stack the blocks and scan over them.
      remat: a policy of `jdiff.models.remat`.

    Raises:
      ValueError: a field is out of range.
    """

    rules = TRANSFORMER  # how it is split over devices
    length = None

    def __init__(
        self,
        *,
        vocab: int = 151_936,
        width: int = 2560,
        depth: int = 36,
        heads: int = 32,
        kv_heads: int = 8,
        head_width: int = 128,
        hidden: int = 9728,
        activation: str = "silu",
        bias: bool = False,
        qk_norm: bool = True,
        theta: float = 1e6,
        eps: float = 1e-6,
        dtype: str | jnp.dtype = "float32",
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        layers.check_positive(vocab=vocab, width=width, depth=depth, hidden=hidden)
        layers.check_positive(theta=theta, eps=eps, heads=heads)
        layers.check_heads(kv_heads, heads, "heads")
        rope.check_dims((head_width,))
        choose("activation", activation, ACTIVATIONS)
        self.vocab, self.width, self.depth = vocab, width, depth
        self.head_width, self.theta = head_width, theta
        self.dtype, self.scan, self.remat = layers.float_dtype(dtype), scan, named(remat)
        self.tokens = param(rngs, (vocab, width), normal(0.02), (None, "embed"))
        block = functools.partial(
            Block, width, heads, kv_heads, head_width, hidden, activation, bias=bias,
            qk_norm=qk_norm, eps=eps, dtype=self.dtype,
        )  # fmt: skip
        self.blocks = stacked.repeated(block, depth, scan=scan, rngs=rngs)
        self.norm = RMSNorm(width, eps=eps, rngs=rngs)

    def read(
        self, ids: jax.Array, mask: jax.Array | None = None, *, layers: Sequence[int] = ()
    ) -> Read:
        """What it makes of ids `[B, S]`; see `TextNetwork.read`.

        Its last state, normed, is transformers' `hidden_states[-1]`, and layer -2 is their [-2].
        """
        base.check(self, ids, mask)
        places = np.arange(ids.shape[1])
        seen = jnp.asarray(places[:, None] >= places)[None, None]
        if mask is not None:
            seen = seen & mask[:, None, None, :]
        turns = rope.angles(places[:, None], (self.head_width,), self.theta)
        h = self.tokens[...][ids].astype(self.dtype)
        how = {"layers": layers, "scan": self.scan, "remat": self.remat}
        h, hidden = base.through(self.blocks, self.depth, h, turns, seen, **how)
        return Read(self.finish(h), None, hidden)

    def finish(self, hidden: jax.Array) -> jax.Array:
        """The last norm, in float32, on the states `[B, S, width]` of any layer."""
        return self.norm(hidden.astype(jnp.float32))


class Block(layers.ResidualBlock):
    """Attention and a gated perceptron, each behind a norm."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_width: int,
        hidden: int,
        activation: str,
        *,
        bias: bool,
        qk_norm: bool,
        eps: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.head_width, self.shared, self.activation = head_width, heads // kv_heads, activation
        norm = functools.partial(RMSNorm, eps=eps, rngs=rngs)
        plain = functools.partial(Linear, init=normal(0.02), bias_init=None, dtype=dtype, rngs=rngs)
        into = functools.partial(
            plain, width, axes=("embed", "heads"), bias_init=zeros if bias else None
        )
        self.norm1, self.norm2 = norm(width), norm(width)
        self.q = into(heads * head_width)
        self.k, self.v = into(kv_heads * head_width), into(kv_heads * head_width)
        self.norm_q = norm(head_width) if qk_norm else None
        self.norm_k = norm(head_width) if qk_norm else None
        self.attention = Attention(heads)
        self.project = plain(heads * head_width, width, axes=("heads", "embed"))
        self.gate = plain(width, hidden, axes=("embed", "mlp"))
        self.mlp1 = plain(width, hidden, axes=("embed", "mlp"))
        self.mlp2 = plain(hidden, width, axes=("mlp", "embed"))

    def __call__(self, h: jax.Array, turns: jax.Array, mask: jax.Array) -> jax.Array:
        """Tokens `[B, S, width]` to the same.

        Args:
          turns: `[S, head_width / 2]`, of `rope.angles`.
          mask: bool `[B or 1, 1, S, S]`, where to look.
        """
        h = constrain(
            h + self.project(self._attend(self.norm1(h), turns, mask)), "batch", None, None
        )
        y = self.norm2(h)
        a = ACTIVATIONS[self.activation](self.gate(y)) * self.mlp1(y)
        return constrain(h + self.mlp2(a), "batch", None, None)

    def _attend(self, y: jax.Array, turns: jax.Array, mask: jax.Array) -> jax.Array:
        """What each token receives, `[B, S, heads * head_width]`."""
        split = lambda a: a.reshape(*a.shape[:-1], -1, self.head_width)
        join = lambda a: a.reshape(*a.shape[:-2], -1)
        q, k, v = (split(linear(y)) for linear in (self.q, self.k, self.v))
        if self.norm_q is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k = rope.rotate_halves(q, turns), rope.rotate_halves(k, turns)
        k, v = (jnp.repeat(a, self.shared, axis=-2) for a in (k, v))
        return self.attention(join(q), join(k), join(v), mask)


def qwen3_4b(**changes) -> dict:
    """Fields of Qwen3-4B, which Z-Image reads with: 4,022,468,096 parameters."""
    return dict(changes)


def qwen25_vl_7b(**changes) -> dict:
    """Fields of the text tower of Qwen2.5-VL-7B, which Qwen-Image reads with."""
    fields = {"vocab": 152_064, "width": 3584, "depth": 28, "heads": 28, "kv_heads": 4}
    return fields | {"hidden": 18_944, "bias": True, "qk_norm": False} | changes
