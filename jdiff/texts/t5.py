"""T5's encoder (Raffel et al. 2020), in its version 1.1 (Shazeer 2020: gated perceptrons) or 1.0.

Norms divide by the root mean square alone, scores are not scaled, and where a token stands enters
as a learned number a head that is added to the scores: one table, that all layers share.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdiff.errors import choose
from jdiff.models import layers, stacked
from jdiff.models.initializers import normal, param
from jdiff.models.layers import Linear, RMSNorm, together
from jdiff.models.remat import named
from jdiff.parallel.layout import TRANSFORMER, constrain
from jdiff.texts import base
from jdiff.texts.base import ACTIVATIONS, Read, TextNetwork


class T5Encoder(TextNetwork):
    """T5's encoder; there is nothing pooled.

    What is added up from block to block is float32 whatever the `dtype`: it leaves float16's range.

    Args:
      vocab: number of tokens; 32128 in the published files, more than the tokenizer has.
      width: channels of a token.
      depth: number of blocks.
      heads: of attention.
      head_width: channels of a head; heads * head_width need not be the width.
      hidden: channels inside the perceptrons.
      activation: of the perceptrons, a name in `texts.base.ACTIVATIONS`.
      gated: whether they multiply it with a second map, as version 1.1 does.
      buckets: of distances between tokens: half of them for each direction, and of those half for
        the first distances one by one, the others in a geometric row up to `distance`.
      distance: from here on all are one.
      eps: of the norms.
      dtype: of the activations; parameters, norms and softmax stay float32.
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
        vocab: int = 32128,
        width: int = 4096,
        depth: int = 24,
        heads: int = 64,
        head_width: int = 64,
        hidden: int = 10240,
        activation: str = "gelu_new",
        gated: bool = True,
        buckets: int = 32,
        distance: int = 128,
        eps: float = 1e-6,
        dtype: str | jnp.dtype = "float32",
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        layers.check_positive(vocab=vocab, width=width, depth=depth, heads=heads, hidden=hidden)
        layers.check_positive(head_width=head_width, eps=eps, distance=distance)
        if buckets < 4 or buckets % 4:
            raise ValueError(f"buckets={buckets} must be a multiple of 4")
        choose("activation", activation, ACTIVATIONS)
        self.vocab, self.width, self.depth = vocab, width, depth
        self.buckets, self.distance = buckets, distance
        self.scan, self.remat = scan, named(remat)
        self.tokens = param(rngs, (vocab, width), normal(1.0), (None, "embed"))
        self.relative = param(rngs, (buckets, heads), normal(width**-0.5), (None, "heads"))
        block = functools.partial(
            Block, width, heads, head_width, hidden, activation, gated=gated, eps=eps,
            dtype=layers.float_dtype(dtype),
        )  # fmt: skip
        self.blocks = stacked.repeated(block, depth, scan=scan, rngs=rngs)
        self.norm = RMSNorm(width, eps=eps, rngs=rngs)

    def read(
        self, ids: jax.Array, mask: jax.Array | None = None, *, layers: Sequence[int] = ()
    ) -> Read:
        """What it makes of ids `[B, S]`; see `TextNetwork.read`."""
        base.check(self, ids, mask)
        h = self.tokens[...][ids].astype(jnp.float32)
        places = relative_buckets(ids.shape[1], self.buckets, self.distance)
        bias = jnp.moveaxis(self.relative[...].astype(jnp.float32)[places], -1, 0)
        inputs = (bias,) if mask is None else (bias, mask[:, None, None, :])
        how = {"layers": layers, "scan": self.scan, "remat": self.remat}
        h, hidden = base.through(self.blocks, self.depth, h, *inputs, **how)
        return Read(self.norm(h), None, hidden)

    def finish(self, hidden: jax.Array) -> jax.Array:
        """The last norm, in float32, on the states `[B, S, width]` of any layer."""
        return self.norm(hidden.astype(jnp.float32))


def relative_buckets(length: int, buckets: int, distance: int) -> np.ndarray:
    """Which of the `buckets` a query (row) has a key (column) in, by how far it is: int [S, S].

    Section 2.1 of the paper, as its code has it: keys behind the query (and itself) come first,
    those ahead of it in the second half.
    """
    ahead = np.arange(length)[None] - np.arange(length)[:, None]
    half, far = buckets // 2, np.abs(ahead)
    exact = half // 2
    # float32 in this order, as published: an edge between two buckets falls where it fell there.
    ratio = np.maximum(far, 1).astype(np.float32) / np.float32(exact)
    steps = np.log(ratio) / np.float32(math.log(distance / exact)) * np.float32(half - exact)
    coarse = np.minimum(exact + steps.astype(np.int64), half - 1)
    return np.where(ahead > 0, half, 0) + np.where(far < exact, far, coarse)


class Block(layers.ResidualBlock):
    """Attention and a perceptron, each behind a norm; no biases."""

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        hidden: int,
        activation: str,
        *,
        gated: bool,
        eps: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        inner = heads * head_width
        plain = functools.partial(Linear, bias_init=None, rngs=rngs)
        into = functools.partial(plain, width, inner, axes=("embed", "heads"), dtype=dtype)
        up = functools.partial(
            plain, width, hidden, init=normal(width**-0.5), axes=("embed", "mlp"), dtype=dtype
        )
        self.heads, self.activation = heads, activation
        self.norm1 = RMSNorm(width, eps=eps, rngs=rngs)
        self.norm2 = RMSNorm(width, eps=eps, rngs=rngs)
        self.q = into(init=normal((width * head_width) ** -0.5))
        self.k, self.v = into(init=normal(width**-0.5)), into(init=normal(width**-0.5))
        axes = ("heads", "embed")
        self.project = plain(inner, width, init=normal(inner**-0.5), axes=axes, dtype=dtype)
        self.mlp1 = up()
        self.gate = up() if gated else None
        # These sums are beyond float16.
        wide = jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype
        init = normal(hidden**-0.5)
        self.mlp2 = plain(hidden, width, init=init, axes=("mlp", "embed"), dtype=wide)

    def __call__(self, h: jax.Array, bias: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Tokens `[B, S, width]` to the same.

        Args:
          bias: `[heads, S, S]`, added to the scores.
          mask: bool `[B, 1, 1, S]`, where to look.
        """
        q, k, v = together(self.norm1(h), self.q, self.k, self.v)
        h = constrain(h + self.project(self._attend(q, k, v, bias, mask)), "batch", None, None)
        y = self.norm2(h)
        a = ACTIVATIONS[self.activation](self.mlp1(y))
        return constrain(
            h + self.mlp2(a if self.gate is None else a * self.gate(y)), "batch", None, None
        )

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, mask: jax.Array | None
    ) -> jax.Array:
        """softmax(q k + bias) v, softmax in float32."""
        q, k, v = (a.reshape(*a.shape[:-1], self.heads, -1) for a in (q, k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) + bias
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*q.shape[:2], -1)


def xxl(**changes) -> dict:
    """Fields of version 1.1's XXL: the encoder of Imagen, PixArt, Stable Diffusion 3 and FLUX."""
    return dict(changes)


def xl(**changes) -> dict:
    """Fields of version 1.1's XL."""
    return {"width": 2048, "heads": 32, "hidden": 5120} | changes
