"""Networks with some of their modules replaced, on the very same weights.

    weak = replace(apply, "middle", swap_kernel(identity_map), kind=Attention)
    weak(params, x, t, cond)                       # params as they are: nothing copied or renamed

The replacement happens on the module that `apply` puts together when it is traced, so no block
carries a flag and the plain network is the same program as before. `Apply.with_attention` and
`Apply.without_blocks` are the two uses that guidance makes of it.

Modules are named by their path, "decoder/2/blocks/0/attention"; layers of a scanned stack have
their number, "blocks/7/attention", as if they were not stacked.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from jdiff.errors import UserError
from jdiff.models.attention import Attention, Kernel
from jdiff.models.layers import ResidualBlock
from jdiff.models.module import Module
from jdiff.models.stacked import Varied

#: Makes of a module what is called in its place; hashable, and equal for equal replacements.
How = Callable[[nnx.Module], nnx.Module]


@dataclasses.dataclass(frozen=True)
class Edit:
    """A replacement: of the modules of this kind, those on these paths, by `how(module)`."""

    where: str
    how: How
    kind: type = nnx.Module

    def paths(self, model: nnx.Module) -> list[str]:
        """The modules of a network that are meant."""
        return find(model, self.where, self.kind)


def replace(apply: Any, where: str, how: How, kind: type = nnx.Module) -> Any:
    """Another `Apply`, of the same params, in which `how(module)` is called in a module's place.

    Args:
        apply: what `models.split` or `models.init` returned.
        where: regular expression for one or more whole steps of a path: "middle" and "blocks/[78]"
            mean all modules below, "blocks/1" does not mean block 12, and ".*" means all.
        how: makes the replacement from the module, whose parameters it may use; what it does not
            use is ignored. Hashable; a function of a module's level, so that equal means equal.
        kind: the type of the modules that are meant.

    Raises:
        UserError: if there is no such module; the paths that exist are named.
    """
    edit = Edit(where, how, kind)
    skeleton = dataclasses.replace(apply, edits=()).skeleton()
    if not edit.paths(skeleton):
        there = find(skeleton, ".*", kind)
        names = ", ".join(there[:12]) + (f" and {len(there) - 12} more" if there[12:] else "")
        raise UserError(
            f"replace: no {kind.__name__} of the network is at where={where!r}. "
            f"There are: {names or 'none'}."
        )
    return dataclasses.replace(apply, edits=(*apply.edits, edit))


def find(model: nnx.Module, where: str = ".*", kind: type = nnx.Module) -> list[str]:
    """Paths of the modules of this kind that `where` means (see `replace`), in order."""
    try:
        wanted = re.compile(rf"(^|/)(?:{where})(/|$)")
    except re.error as error:
        raise UserError(f"where={where!r} is no regular expression: {error}.") from error
    return [
        path for path, module in _walk(model) if isinstance(module, kind) and wanted.search(path)
    ]


def edit_modules(model: nnx.Module, edits: tuple[Edit, ...]) -> nnx.Module:
    """The network with the edits made, in order; what an earlier one has replaced stays so."""
    for edit, paths in [(edit, edit.paths(model)) for edit in edits]:
        for path in paths:
            model = Put(path, edit.how)(model)
    return model


@dataclasses.dataclass(frozen=True)
class Put:
    """Replaces the module at a path by `how(module)`; "" is the module itself."""

    path: str
    how: How

    def __call__(self, model: nnx.Module) -> nnx.Module:
        """The same model, changed in place, or its replacement."""
        if not self.path:
            return self.how(model)
        name, _, rest = self.path.partition("/")
        child = vars(model).get(name)
        if getattr(child, "stacked", 0):
            child = Varied(child)
            setattr(model, name, child)
        if isinstance(child, Varied):
            layer, _, rest = rest.partition("/")
            child.changes[int(layer)].append(Put(rest, self.how))
        elif child is not None:  # None: below a module that was replaced
            changed = Put(rest, self.how)(child)
            if changed is not child:
                setattr(model, name, changed)
        return model


@dataclasses.dataclass(frozen=True)
class SwapKernel:
    """Replaces an `Attention` by one with another kernel."""

    kernel: Kernel

    def __call__(self, module: Attention) -> Attention:
        """The replacement, with as many heads."""
        return Attention(module.heads, self.kernel)


class Skipped(Module):
    """In a residual block's place: h -> h."""

    def __init__(self, block: ResidualBlock):
        self.block = block

    def __call__(self, h: jax.Array, *inputs: jax.Array | None) -> jax.Array:
        """h, an array or several, if the block would return its shape."""
        before, after = (
            jax.tree.map(lambda a: list(a.shape), tree)
            for tree in (h, jax.eval_shape(self.block, h, *inputs))
        )
        if before != after:
            raise UserError(
                f"a block that maps {before} to {after} cannot be skipped; choose blocks that keep "
                "the shape."
            )
        return h


def _walk(module: nnx.Module, prefix: str = "") -> Iterator[tuple[str, nnx.Module]]:
    """All modules below one, with their paths."""
    for name, child in vars(module).items():
        if not isinstance(child, nnx.Module):
            continue
        for layer in range(getattr(child, "stacked", 0)) or ("",):
            path = "/".join(part for part in (prefix, name, str(layer)) if part)
            yield path, child
            yield from _walk(child, path)
