"""DiT as diffusers writes it (`DiTTransformer2DModel`): every block embeds t and the label itself.

The published weights were copied into all blocks, but training there moves them apart, so this is a
network of its own, with 27 more embeddings at DiT-XL/2. It also differs from the original in the
lowest frequency of t, which is 1 / 10000 exactly, and in the epsilon of the perceptron's norm.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.models import layers, stacked
from jdiff.models.dit import DiT
from jdiff.models.dit_blocks import AdaLNZero, linear
from jdiff.models.initializers import normal, param
from jdiff.models.replace import Skipped


class EmbeddingBlock(AdaLNZero):
    """An adaLN-Zero block with its own embedding of t and of the label."""

    def __init__(
        self,
        width: int,
        *fields,
        num_classes: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        **changes,
    ):
        super().__init__(width, *fields, dtype=dtype, rngs=rngs, **changes)
        layer = functools.partial(linear, init=normal(0.02), rngs=rngs)
        self.time1 = layer(256, width, axes=(None, "embed"))
        self.time2 = layer(width, width, axes=("embed", None))
        self.label = param(rngs, (num_classes + 1, width), normal(0.02), (None, "embed"))

    @staticmethod
    def enter(h: jax.Array, inputs: Sequence[jax.Array]) -> tuple[jax.Array, tuple]:
        """h, the waves of t `[B, 256]` and the label `[B]`, as they are."""
        return h, tuple(inputs)

    def embed(self, waves: jax.Array, label: jax.Array) -> jax.Array:
        """The conditioning c, [B, width]."""
        time = self.time2(jax.nn.silu(self.time1(waves)))
        return jax.nn.silu(time + jnp.take(self.label[...], label, axis=0, mode="fill"))

    def __call__(self, h: jax.Array, waves: jax.Array, label: jax.Array) -> jax.Array:
        """Tokens h [B, *grid, width] to tokens like h."""
        return super().__call__(h, self.embed(waves, label))


class UntiedDiT(DiT):
    """A `DiT` with labels whose blocks have embeddings of their own; otherwise as `DiT`.

    Args:
        num_classes: number of labels, at least 1; the index `num_classes` is the null label.
        mlp_eps: epsilon of the norm ahead of each block's perceptron.

    Raises:
        ValueError: if a field is out of range or an input does not fit.
    """

    def __init__(self, *, num_classes: int, mlp_eps: float = 1e-5, rngs: nnx.Rngs, **fields):
        layers.check_positive(num_classes=num_classes, mlp_eps=mlp_eps)
        unfit = {"block", "scalars"} & fields.keys()
        if unfit:
            raise ValueError(f"UntiedDiT takes no {sorted(unfit)[0]}")
        self.mlp_eps = mlp_eps
        super().__init__(num_classes=num_classes, rngs=rngs, **fields)

    def find_block(self, name: str) -> tuple[type, dict]:
        """The class of the blocks, and fields of theirs besides the sizes."""
        return EmbeddingBlock, {"num_classes": self.num_classes, "mlp_eps": self.mlp_eps}

    def make_embedders(self, scalars: Sequence[str], rngs: nnx.Rngs) -> None:
        """None: the blocks have them."""

    def embed(self, t: jax.Array, cond: Mapping[str, jax.Array]) -> list[jax.Array]:
        """What the blocks embed: the waves of t `[B, 256]` and the label `[B]`."""
        waves = layers.sinusoidal(t, 256, endpoint=True, scale=self.time_scale)
        return [waves, cond["label"]]

    def last_norm(self, h: jax.Array, *inputs: jax.Array) -> jax.Array:
        """The norm ahead of the output, told t and the label by the first block's embedding."""
        return super().last_norm(h, _first(self.blocks).embed(*inputs))


def _first(blocks: nnx.Module | stacked.Varied) -> EmbeddingBlock:
    """The first block as it is without edits (`jdiff.models.replace`)."""
    blocks = blocks.blocks if isinstance(blocks, stacked.Varied) else blocks
    if getattr(blocks, "stacked", 0):
        graphdef, weights = nnx.split(blocks)
        return nnx.merge(graphdef, jax.tree.map(lambda w: w[0], weights))
    return blocks[0].block if isinstance(blocks[0], Skipped) else blocks[0]
