"""Numbers besides t that condition a network: a flow map's target time, a guidance scale.

Also the level of the noise on a small image ("aug_level", see docs/cascades.md).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from flax import nnx

from jdiff.models.layers import Linear
from jdiff.models.module import Module


class Scalars(Module):
    """Embeds each number as t is embedded, with weights of its own, and adds them up.

    The name "s" stands for cond["s"] `[B]`; "t-s" for t - cond["s"], where the network is told t
    in the units of s (parameterization.time = "t"). Models scale both as they scale t.

    Args:
        names: of the numbers.
        layers: makes the two linear layers of one number, like those of t.
    """

    def __init__(self, names: Sequence[str], layers: Callable[[], tuple[Linear, Linear]]):
        self.names = tuple(names)
        self.layers = nnx.List([nnx.List(layers()) for _ in self.names])

    def __call__(
        self,
        t: jax.Array,
        cond: Mapping[str, jax.Array],
        waves: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        """The sum of the embeddings, [B, width]; `waves` is t's own first stage, [B] to [B, C].

        Raises:
            ValueError: if an entry is missing from cond or is not [B].
        """
        total = 0.0
        for value, (one, two) in zip(numbers(self.names, t, cond), self.layers):
            total = total + two(jax.nn.silu(one(waves(value))))
        return total


def numbers(
    names: Sequence[str], t: jax.Array, cond: Mapping[str, jax.Array]
) -> Iterator[jax.Array]:
    """The numbers of these names, `[B]` each.

    Raises:
        ValueError: if an entry is missing from cond or is not [B].
    """
    for name in names:
        entry = name.removeprefix("t-")
        if entry not in cond:
            of_maps = "Flow maps are sampled with solvers.flow_map(), which sets cond['s']"
            raise ValueError(
                f"the network takes scalars={tuple(names)}: it needs cond[{entry!r}], numbers of "
                f"shape [B]; cond has {sorted(cond)}. {of_maps if entry == 's' else ''}".strip()
            )
        value = cond[entry]
        if value.shape != t.shape:
            raise ValueError(
                f"cond[{entry!r}] has shape {list(value.shape)}, not [B] = {list(t.shape)}"
            )
        yield value if entry == name else t - value
