"""What a block keeps of its forward pass for the backward pass, by name.

The gradient is the same under every policy; only memory and time change. Anything not kept is
computed again when the backward pass comes to the block (Chen et al. 2016).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jdiff.errors import UserError, choose
from jdiff.parallel import fetch

#: The primitives worth keeping: their results cost far more to compute than to store.
PRODUCTS = ("dot_general", "conv_general_dilated")
#: Those whose results are computed again as fast as they are read.
CHEAP = (
    "add", "sub", "mul", "div", "neg", "max", "select_n", "convert_element_type",
    "broadcast_in_dim", "reshape", "transpose", "squeeze",
)  # fmt: skip


def _products(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether to keep a result: those of matrix products and convolutions."""
    return primitive.name in PRODUCTS


def _products_with_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    """The same, without batches of products: the attention maps, quadratic in the tokens."""
    if not _products(primitive):
        return False
    dims = params.get("dimension_numbers")
    return primitive.name != "dot_general" or not (dims[1][0] or dims[1][1])


def _dear(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether to keep a result: all but weights fetched from other devices, and what is cheap."""
    return primitive.name not in (fetch.NAME, *CHEAP)


#: Policies from the most memory to the least.
POLICIES: Mapping[str, Callable[..., bool] | None] = {
    "none": None,  # no recomputation: jax keeps what the backward pass reads
    "dots": _products,
    "dots_no_batch": _products_with_weights,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def named(remat: bool | str) -> str:
    """The name in `POLICIES` that `remat` means: False is "none" and True is "full".

    Raises:
        UserError: for a name not in `POLICIES`, with the nearest.
    """
    if isinstance(remat, bool):
        return "full" if remat else "none"
    if not isinstance(remat, str):
        raise UserError(
            f"remat={remat!r} must be True, False or a name: {', '.join(sorted(POLICIES))}."
        )
    return choose("remat", remat, POLICIES)


def checkpoint(function: Callable, remat: bool | str, *, scanned: bool = False) -> Callable:
    """`function`, of whose forward pass only what the policy `remat` names is kept.

    Args:
        function: of pytrees of arrays.
        remat: see `named`.
        scanned: whether it is the body of a scan. There the compiler cannot merge the recomputation
            with the forward pass, so the barriers against that, which cost fusions, are left out.
    """
    policy = POLICIES[named(remat)]
    if policy is None and not fetch.fetches():
        return function
    policy = policy or _dear  # a block's weights are fetched again, not kept
    return jax.checkpoint(function, policy=policy, prevent_cse=not scanned)
