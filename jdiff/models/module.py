"""The base class of every layer and network here."""

from typing import Any

from flax import nnx


class Module(nnx.Module):
    """An `nnx.Module` that is not itself a pytree, and so is built about twice as fast.

    nnx otherwise looks through every attribute at every assignment. Nothing here needs it: a
    network is taken apart into `(apply, params)`, and those are the pytrees.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**{"pytree": False} | kwargs)
