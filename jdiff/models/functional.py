"""From an NNX module to `(apply, params)`: what the hot path sees, and back.

`params` is a plain nested dict of arrays with string keys; `apply` is what remains of the module
when the arrays are taken out: a frozen callable that compares equal for equal structure, so it can
be a static field of a pytree and jit reuses a program across two builds of one network.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.models import initializers, replace
from jdiff.models.attention import Attention, Kernel, named_kernel
from jdiff.models.layers import ResidualBlock
from jdiff.parallel.layout import Layout, constrain, within

Params = dict[str, Any]
Build = Callable[[nnx.Rngs], nnx.Module]


@dataclasses.dataclass(frozen=True, eq=False)
class Apply:
    """A network without its weights: `apply(params, x, t, cond, key=None) -> [B, H, W, C_out]`.

    Hashable, and equal to any other `Apply` of the same structure.

    Raises:
        ValueError: if `params` lacks an entry of the network, or has one too many.
    """

    graphdef: nnx.GraphDef
    paths: tuple[tuple, ...]  # of every parameter, with the module's own (partly integer) keys
    edits: tuple[replace.Edit, ...] = ()  # modules replaced, see `jdiff.models.replace`
    layout: Layout | None = None  # how activations are split over devices

    def __call__(
        self,
        params: Params,
        x: jax.Array,
        t: jax.Array,
        cond: Mapping[str, jax.Array] | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Run the network with these weights."""
        model = replace.edit_modules(self.merge(params), self.edits)
        with within(self.layout):
            x = constrain(x, "batch", *(None,) * (x.ndim - 1))
            out = model(x, t, {} if cond is None else cond, key=key)
            return constrain(out, "batch", *(None,) * (out.ndim - 1))

    def with_layout(self, layout: Layout | None) -> "Apply":
        """The network, on the same params, with its activations split over a mesh as laid out."""
        return dataclasses.replace(self, layout=layout)

    def with_attention(self, kernel: Kernel | str, where: str = ".*") -> "Apply":
        """The network, on the same params, with another kernel in the attention layers `where`.

        A function, or a name in `attention.KERNELS`: "xla", "by_head", "cudnn", "flash".
        """
        return replace.replace(self, where, replace.SwapKernel(named_kernel(kernel)), Attention)

    def without_blocks(self, where: str) -> "Apply":
        """The network, on the same params, without the residual blocks `where`: they pass h on."""
        return replace.replace(self, where, replace.Skipped, ResidualBlock)

    def method(self, name: str) -> "Method":
        """One of the module's methods as a pure function: `apply.method("encode")(params, x)`."""
        return Method(self, name)

    def merge(self, params: Params) -> nnx.Module:
        """The NNX module with these weights and no edits, the inverse of `split`."""
        given = dict(flatten(params))
        wanted = {tuple(str(part) for part in path): path for path in self.paths}
        if given.keys() != wanted.keys():
            raise ValueError(
                f"params do not fit the network: missing {_names(wanted.keys() - given.keys())}, "
                f"not part of it {_names(given.keys() - wanted.keys())}"
            )
        state = nnx.from_flat_state({path: given[name] for name, path in wanted.items()})
        return nnx.merge(self.graphdef, state)

    def skeleton(self) -> nnx.Module:
        """The module without its weights, to look at its structure."""
        return nnx.merge(self.graphdef, nnx.from_flat_state({path: None for path in self.paths}))

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.graphdef, self.paths, self.edits, self.layout))

    def __hash__(self) -> int:
        return self._hash  # jit hashes its static arguments at every call

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Apply) or hash(self) != hash(other):
            return False
        mine, others = ((a.paths, a.edits, a.layout, a.graphdef) for a in (self, other))
        return mine == others

    def __repr__(self) -> str:
        edits = f", {len(self.edits)} edits" if self.edits else ""
        return f"Apply({len(self.paths)} parameters{edits})"


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of a module without its weights: `method(params, *args, **kwargs)`.

    For modules that are not networks of noisy images: autoencoders encode and decode, text encoders
    read. Hashable, and equal to any other of the same structure and name.
    """

    apply: Apply
    name: str

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """Call the method with these weights."""
        model = replace.edit_modules(self.apply.merge(params), self.apply.edits)
        with within(self.apply.layout):
            return getattr(model, self.name)(*args, **kwargs)


def split(model: nnx.Module) -> tuple[Apply, Params]:
    """Take a module apart into `(apply, params)`.

    Raises:
        ValueError: if the module holds state that is not a parameter (a random stream, a running
            average, a raw array), which a pure function could not update.
    """
    apply, variables = _split(model)
    return apply, nest({path: v[...] for path, v in variables.items()})


def abstract(build: Build) -> tuple[Apply, Params]:
    """`(apply, shapes)` of `build(rngs)`, with `jax.ShapeDtypeStruct` leaves; computes nothing."""
    apply, variables = _inspect(build)
    return apply, nest({path: _shape(v) for path, v in variables.items()})


def axes(build: Build) -> dict:
    """The logical axes of every parameter of `build(rngs)`: a tree of tuples like its params.

    A name a dimension, for sharding rules to map to mesh axes: "embed" (the width of tokens),
    "mlp", "heads", "text", "channels_in", "channels_out", "layers" (stacked blocks), or None.
    """
    _, variables = _inspect(build)
    named = {}
    for path, v in variables.items():
        shape = _shape(v).shape
        named[path] = v.get_metadata().get("axes") or (None,) * len(shape)
    return nest(named)


def init(build: Build, key: jax.Array) -> tuple[Apply, Params]:
    """`(apply, params)` of `build(rngs)` with fresh weights, drawn in one small program.

    The weights are distributed as those of `build(nnx.Rngs(key))` but are not the same numbers.
    `jax.jit(lambda key: init(build, key)[1], out_shardings=...)` shards them as they are drawn.

    Args:
        build: makes the module, as in `lambda rngs: UNet(image_size=32, rngs=rngs)`.
        key: a typed key; equal keys give equal weights, whatever the sharding.
    """
    apply, variables = _inspect(build)
    rules = [v.get_metadata().get("rule") for v in variables.values()]
    if not all(isinstance(rule, initializers.Init) for rule in rules):
        # A module with layers from elsewhere: no rules to go by, so its own constructor runs.
        return apply, jax.jit(lambda key: split(build(nnx.Rngs(key)))[1])(key)
    leaves = tuple((_shape(v).shape, rule) for v, rule in zip(variables.values(), rules))
    return apply, nest(dict(zip(variables, initializers.draw(key, leaves))))


def count(params: Params) -> int:
    """The number of parameters, of arrays or of the shapes that `abstract` returns."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _inspect(build: Build) -> tuple[Apply, dict[tuple, nnx.Variable]]:
    try:  # without tracing: twice as fast
        return _split(build(initializers.Unseeded()))
    except initializers.Drawn:  # layers from elsewhere
        return _split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))


def _split(model: nnx.Module) -> tuple[Apply, dict[tuple, nnx.Variable]]:
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    if others := nnx.to_flat_state(rest):
        names = _names(tuple(map(str, path)) for path, _ in others)
        raise ValueError(
            f"{type(model).__name__} holds state besides its parameters: {names}. "
            "Pass random keys as arguments, and compute fixed arrays where they are used."
        )
    variables = dict(nnx.to_flat_state(params))
    return Apply(graphdef, tuple(variables)), variables


def _shape(variable: nnx.Variable) -> jax.ShapeDtypeStruct:
    value = variable.get_value()
    return jax.ShapeDtypeStruct(value.shape, jnp.dtype(value.dtype))


def nest(leaves: Mapping[tuple, Any]) -> Params:
    """A nested dict with string keys, of leaves by their paths; the inverse of `flatten`."""
    nested: Params = {}
    for path, leaf in leaves.items():
        *parents, name = (str(part) for part in path)
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = leaf
    return nested


def flatten(
    tree: Mapping[str, Any], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The leaves of a nested dict with their paths, in order."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def _names(paths) -> str:
    names = sorted("/".join(path) for path in paths)
    shown = ", ".join(names[:8]) or "nothing"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
