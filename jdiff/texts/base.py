"""What a text network is: tokens in, the states of its layers and a vector of the whole text out.

Text networks are modules that are frozen as a rule: opened by `interop.load_component(folder)`,
called by `component.apply.method("read")(component.params, ids, mask)`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.errors import UserError
from jdiff.models import stacked
from jdiff.models.layers import run
from jdiff.models.module import Module


class Read(NamedTuple):
    """What a text network makes of tokens `[B, S]`; all float32.

    Attributes:
      last: what the network ends with, after its last norm, `[B, S, width]`.
      pooled: one vector a text, `[B, P]`; None where the network has none.
      hidden: the states that were asked for by `layers`, each `[B, S, width]`, before the last
        norm (`finish` applies it).
    """

    last: jax.Array
    pooled: jax.Array | None = None
    hidden: tuple[jax.Array, ...] = ()


class TextNetwork(Module):
    """A text network: `read(ids, mask) -> Read`.

    Attributes:
      vocab: how many tokens it knows; ids are 0 to vocab - 1.
      length: the most tokens that it has positions for; None: any number.
      width: channels of its states.
      depth: number of layers.
    """

    vocab: int
    length: int | None
    width: int
    depth: int

    def read(
        self, ids: jax.Array, mask: jax.Array | None = None, *, layers: Sequence[int] = ()
    ) -> Read:
        """What it makes of these tokens.

        Args:
          ids: integers `[B, S]`.
          mask: bool `[B, S]`, True for the tokens to see; None for all.
          layers: whose states are kept: 0 is what enters the first layer, n what leaves the n-th;
            -1 the last, -2 the one before.
        """
        raise NotImplementedError

    def finish(self, hidden: jax.Array) -> jax.Array:
        """The network's last norm, on the states of any layer."""
        raise NotImplementedError


def check(network: TextNetwork, ids: jax.Array, mask: jax.Array | None) -> None:
    """Refuses tokens and masks that do not fit, by shape and dtype; values are not looked at.

    Raises:
      UserError: ids that are no integers `[B, S]`, more of them than positions, or a mask that is
        not bool `[B, S]`.
    """
    name = type(network).__name__
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise UserError(f"{name} reads ids as integers [B, S], not {ids.dtype} {list(ids.shape)}.")
    if network.length is not None and ids.shape[1] > network.length:
        raise UserError(
            f"{name} has positions for {network.length} tokens a text, not {ids.shape[1]}."
        )
    if mask is not None and (mask.shape != ids.shape or mask.dtype != bool):
        raise UserError(
            f"{name} takes the mask as bool [B, S] = {list(ids.shape)}, "
            f"not {mask.dtype} {list(mask.shape)}."
        )


def through(
    blocks: nnx.Module,
    depth: int,
    h: jax.Array,
    *inputs: jax.Array | None,
    layers: Sequence[int] = (),
    scan: bool = False,
    remat: bool | str = False,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """h after all blocks, `h = block(h, *inputs)`, and the states of `layers` as float32.

    Raises:
      UserError: a layer that is not there.
    """
    wanted = [n + depth + 1 if n < 0 else n for n in layers]
    for n, given in zip(wanted, layers):
        if not 0 <= n <= depth:
            raise UserError(f"layers: {given} given, allowed {-depth - 1} to {depth}.")
    states = {0: h}
    if scan and wanted:
        h, after = stacked.scan_down(blocks, h, *inputs, remat=remat)
        states |= {n: after[n - 1] for n in wanted if n}
    elif scan:
        h = stacked.scan(blocks, h, *inputs, remat=remat)
    else:
        for n, block in enumerate(blocks, 1):
            h = run(block, h, *inputs, remat=remat)
            if n in wanted:
                states[n] = h
    return h, tuple(states[n].astype(jnp.float32) for n in wanted)


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x): the approximation of GELU (Hendrycks and Gimpel 2016) that CLIP has."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), with the normal distribution function itself."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """x Phi(x), with the distribution function approximated by a tanh."""
    return jax.nn.gelu(x, approximate=True)


#: Activations by the names that configs have.
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
