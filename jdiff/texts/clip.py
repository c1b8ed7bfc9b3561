"""CLIP's text tower (Radford et al. 2021, section 2.4): a causal transformer read at its last id.

OpenAI's ViT-L (Stable Diffusion 1) and OpenCLIP's H and bigG (Stable Diffusion 2, SDXL) differ in
size and in the activation; SDXL's second tower is projected to the space of images.
"""

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

#: The `eos` of configs that give no true one: a text ends at its largest id, as in CLIP's own code.
LARGEST = 2


class ClipText(TextNetwork):
    """CLIP's text tower; `pooled` is the state of the token that ends the text.

    Args:
      vocab: number of tokens.
      length: most tokens of a text.
      width: channels of a token.
      depth: number of blocks.
      heads: of attention; they divide the width.
      hidden: channels inside the perceptrons.
      activation: of the perceptrons, a name in `texts.base.ACTIVATIONS`.
      projection: channels that the pooled state is mapped to; None: it is left as it is.
      eos: the id that ends a text, at its first place; 2 stands for the largest id there is.
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
        vocab: int = 49408,
        length: int = 77,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        activation: str = "quick_gelu",
        projection: int | None = None,
        eos: int = 49407,
        eps: float = 1e-5,
        dtype: str | jnp.dtype = "float32",
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        layers.check_positive(vocab=vocab, length=length, eps=eps)
        self.vocab, self.length, self.width, self.depth, self.eos = vocab, length, width, depth, eos
        self.dtype, self.scan, self.remat = layers.float_dtype(dtype), scan, named(remat)
        self.tokens = param(rngs, (vocab, width), normal(0.02), (None, "embed"))
        self.positions = param(rngs, (length, width), normal(0.01), (None, "embed"))
        self.blocks = blocks(
            width, depth, heads, hidden, activation, eps=eps, dtype=self.dtype, scan=scan, rngs=rngs
        )
        self.norm = LayerNorm(width, eps=eps, rngs=rngs)
        self.projection = None
        if projection is not None:
            self.projection = project(width, projection, dtype=self.dtype, rngs=rngs)

    def read(
        self, ids: jax.Array, mask: jax.Array | None = None, *, layers: Sequence[int] = ()
    ) -> Read:
        """What it makes of ids `[B, S]`; see `TextNetwork.read`.

        The pipelines of Stable Diffusion give no mask: their padding is seen.
        """
        base.check(self, ids, mask)
        places = jnp.arange(ids.shape[1])
        seen = (places[:, None] >= places)[None, None]
        if mask is not None:
            seen = seen & mask[:, None, None, :]
        h = (self.tokens[...][ids] + self.positions[...][: ids.shape[1]]).astype(self.dtype)
        how = {"layers": layers, "scan": self.scan, "remat": self.remat}
        h, hidden = base.through(self.blocks, self.depth, h, seen, **how)
        last = self.finish(h)
        end = (ids if self.eos == LARGEST else ids == self.eos).argmax(axis=1)
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        if self.projection is not None:
            pooled = self.projection(pooled).astype(jnp.float32)
        return Read(last, pooled, hidden)

    def finish(self, hidden: jax.Array) -> jax.Array:
        """The last norm, in float32, on the states `[B, S, width]` of any layer."""
        return self.norm(hidden.astype(jnp.float32))


class Block(layers.ResidualBlock):
    """Attention and a perceptron, each behind a norm; the block of both of CLIP's towers.

    Weights start as in CLIP's code: branches by width and, where they end, by depth.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        activation: str,
        *,
        eps: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "rngs": rngs}
        inner, ending = normal(width**-0.5), normal((2 * width * depth) ** -0.5)
        self.activation = activation
        self.norm1 = LayerNorm(width, eps=eps, rngs=rngs)
        self.norm2 = LayerNorm(width, eps=eps, rngs=rngs)
        self.attention = Attention(heads)
        self.qkv = Linear(
            width, (3, width), init=inner, bias_init=zeros, axes=("embed", None, "heads"), **kinds
        )
        self.project = Linear(width, width, init=ending, axes=("heads", "embed"), **kinds)
        self.mlp1 = Linear(
            width, hidden, init=normal((2 * width) ** -0.5), axes=("embed", "mlp"), **kinds
        )
        self.mlp2 = Linear(hidden, width, init=ending, axes=("mlp", "embed"), **kinds)

    def __call__(self, h: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Tokens `[B, S, width]` to the same; `mask` `[B or 1, 1, 1 or S, S]` where to look."""
        q, k, v = jnp.unstack(self.qkv(self.norm1(h)), axis=-2)
        h = constrain(h + self.project(self.attention(q, k, v, mask)), "batch", None, None)
        y = ACTIVATIONS[self.activation](self.mlp1(self.norm2(h)))
        return constrain(h + self.mlp2(y), "batch", None, None)


def blocks(
    width: int,
    depth: int,
    heads: int,
    hidden: int,
    activation: str,
    *,
    eps: float,
    dtype: jnp.dtype,
    scan: bool,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """A tower's blocks, listed or stacked."""
    layers.check_positive(width=width, depth=depth, hidden=hidden)
    layers.check_heads(heads, width, "width")
    choose("activation", activation, ACTIVATIONS)
    build = lambda rngs: Block(
        width, depth, heads, hidden, activation, eps=eps, dtype=dtype, rngs=rngs
    )
    return stacked.repeated(build, depth, scan=scan, rngs=rngs)


def project(width: int, out: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> Linear:
    """The map to the space that texts and images share; without a bias."""
    layers.check_positive(projection=out)
    axes, init = ("embed", None), normal(width**-0.5)
    return Linear(width, out, init=init, bias_init=None, axes=axes, dtype=dtype, rngs=rngs)


def vit_l(**changes) -> dict:
    """Fields of the text tower of OpenAI's ViT-L/14: Stable Diffusion 1's, SDXL's first."""
    return dict(changes)


def vit_h(**changes) -> dict:
    """Fields of the text tower of OpenCLIP's ViT-H/14 without its last block: that of SD 2."""
    fields = {"width": 1024, "depth": 23, "heads": 16, "hidden": 4096, "activation": "gelu"}
    return fields | changes


def big_g(**changes) -> dict:
    """Fields of the text tower of OpenCLIP's ViT-bigG/14: SDXL's second."""
    fields = {"width": 1280, "depth": 32, "heads": 20, "hidden": 5120, "activation": "gelu"}
    return fields | {"projection": 1280} | changes
