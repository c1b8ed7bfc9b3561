"""Guidance by a weakened self: the same weights in a network of which a part is perturbed.

Who perturbs says how in a `Weak` denoiser: `perturbed` (PAG), `smoothed` (SEG), `skipping` (SLG).
`Against` extrapolates from it. The network's `apply` must offer the hooks of `models.Apply`:
`with_attention(kernel, where)` and `without_blocks(where)`, which return another apply of the same
params. A weak denoiser is one like any other, so combinations are plain application:

    w of all:      perturbed_attention(cfg(net, g, null), s)     both members are guided; 4 calls
    the papers':   u + g (c - u) + s (c - weak), 3 calls, is
                   product([net, fixed(net, null), perturbed(net)], [g + s, 1 - g, -s])
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jdiff.denoisers import Network, as_denoiser
from jdiff.errors import UserError
from jdiff.guidance.base import Extrapolation, Guided, Pair
from jdiff.guidance.scales import as_scale, hide, read
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, struct


class Weak(Guided):
    """A denoiser whose networks have parts replaced; a subclass says which in `edit`."""

    denoiser: Any

    def edit(self, apply: Any) -> Any:
        """The apply, of the same params, to call in the place of this one."""
        raise NotImplementedError  # abstract

    def __call__(self, x: PyTree, t: Array, cond: PyTree = None) -> Prediction:
        """The prediction of the weakened denoiser."""
        return weaken(self.denoiser, self.edit)(x, t, cond)


@struct
class Against(Extrapolation):
    """weak + scale (denoiser - weak), the denoiser being the one that `weak` weakens."""

    weak: Weak
    scale: Any

    @property
    def denoiser(self) -> Any:
        """The good denoiser."""
        return self.weak.denoiser

    def pair(self, x: PyTree, t: Array, cond: PyTree) -> Pair:
        """One call of each."""
        cond = dict(cond or {})
        w = read(self.scale, self.schedule, t, cond)
        shown = hide(cond, self.scale)
        return Pair(self.weak(x, t, shown), self.denoiser(x, t, shown), w)


def against(weak: Weak, scale: Any) -> Against:
    """Extrapolates from a weakened denoiser; scale = 1 is the denoiser, papers' s is ours - 1.

    The scale is a number, `[B]`, `per_sample(...)` or one of `guidance.scales`.
    """
    return Against(weak, as_scale(scale))


def checked(where: str, weak: Weak) -> Weak:
    """`weak`, after making its edits once.

    Raises:
      UserError: the denoiser holds no network, the network has no such part or no hook.
    """
    try:
        weaken(weak.denoiser, weak.edit)
    except (UserError, AttributeError) as error:
        raise UserError(f"{where}: {error}") from error
    return weak


def weaken(denoise: Any, edit: Callable[[Any], Any]) -> Any:
    """The denoiser with `edit(apply)` in every network inside it, on the same weights.

    Raises:
      UserError: there is no network inside.
    """
    denoise = as_denoiser(denoise)
    is_network = lambda d: isinstance(d, Network)
    if not any(is_network(d) for d in jax.tree.leaves(denoise, is_leaf=is_network)):
        raise UserError(
            f"the denoiser ({type(denoise).__name__}) holds no network whose layers could be "
            "replaced; make it with denoisers.network(...)."
        )
    swap = lambda d: dataclasses.replace(d, apply=edit(d.apply)) if is_network(d) else d
    return jax.tree.map(swap, denoise, is_leaf=is_network)
