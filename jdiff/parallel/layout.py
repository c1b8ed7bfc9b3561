"""A layout: which mesh axis each named axis of an array is split over. Rules, and nothing else.

A network names the axes of its parameters (`models.axes`) and of its activations (`constrain`). A
name that no rule maps, and a dimension that the mesh axis does not divide, is not split.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from jdiff.errors import UserError, choose
from jdiff.parallel.mesh import AXES
from jdiff.pytree import Array, PyTree

P = jax.sharding.PartitionSpec

#: Of every network: the batch goes over both data axes, wide dimensions of weights over fsdp.
CONVOLUTIONAL: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"), "embed": ("fsdp",), "channels_out": ("fsdp",),
}  # fmt: skip
#: Of transformers: besides, heads and hidden units over tensor, tokens over sequence.
TRANSFORMER: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"), "embed": ("fsdp",), "heads": ("tensor",), "mlp": ("tensor",),
    "tokens": ("sequence",),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and the rules by which named axes are split over it.

    Attributes:
      mesh: see `parallel.make`.
      rules: (name of an array's axis, mesh axes), from `layout`.
    """

    mesh: jax.sharding.Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]

    def spec(self, names: Sequence[str | None], shape: Sequence[int]) -> P:
        """Where each dimension goes. Of two that want one mesh axis, the first gets it."""
        table, taken, entries = dict(self.rules), set(), []
        for name, size in zip(names, shape, strict=True):
            axes = tuple(a for a in table.get(name, ()) if a not in taken)
            axes = tuple(a for a in axes if self.mesh.shape[a] > 1)
            if math.prod(self.mesh.shape[a] for a in axes) == 1 or size % self._over(axes):
                entries.append(None)
                continue
            taken.update(axes)
            entries.append(axes if len(axes) > 1 else axes[0])
        return spec_of(entries)

    def sharding(self, names: Sequence[str | None], shape: Sequence[int]) -> jax.NamedSharding:
        """`spec` on the mesh."""
        return jax.NamedSharding(self.mesh, self.spec(names, shape))

    @property
    def whole(self) -> jax.NamedSharding:
        """A copy on every device."""
        return jax.NamedSharding(self.mesh, P())

    @property
    def batch(self) -> jax.NamedSharding:
        """The first dimension split as a batch, nothing else."""
        axes = dict(self.rules)["batch"]
        return jax.NamedSharding(self.mesh, P(axes if len(axes) > 1 else axes[0]))

    @property
    def batch_parts(self) -> int:
        """How many parts a batch is cut into."""
        return self._over(dict(self.rules)["batch"])

    def rows(self, batch: int) -> np.ndarray:
        """Which rows of a global batch this process holds, int `[rows]`, in rising order."""
        held = self.batch.addressable_devices_indices_map((batch,)).values()
        starts = sorted({index[0].indices(batch)[:2] for index in held})
        return np.concatenate([np.arange(*ends) for ends in starts])

    def put(self, batch: PyTree, size: int) -> PyTree:
        """Global arrays from this process's rows of them (those of `rows(size)`, in that order)."""
        if jax.process_count() == 1:
            return jax.device_put(batch, self.batch)
        rows = self.rows(size)  # not always one range, nor disjoint from other processes'

        def place(a: np.ndarray) -> Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                start, stop, _ = index[0].indices(size)
                first = np.searchsorted(rows, start)
                return a[first : first + stop - start]

            return jax.make_array_from_callback((size, *a.shape[1:]), self.batch, part)

        return jax.tree.map(place, batch)

    def _over(self, axes: Sequence[str]) -> int:
        return math.prod(self.mesh.shape[a] for a in axes)


def layout(
    mesh: jax.sharding.Mesh, rules: Mapping[str, Sequence[str]] = TRANSFORMER,
    changes: Mapping[str, str | Sequence[str] | None] | None = None,
) -> Layout:  # fmt: skip
    """The layout of a family's rules, with `changes` in them.

    Args:
      changes: name -> mesh axis or axes, or None not to split it, e.g. {"embed": None}.

    Raises:
      UserError: a mesh axis that there is none of.
    """
    merged = {name: tuple(axes) for name, axes in rules.items()}
    for name, axes in (changes or {}).items():
        axes = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        merged[name] = tuple(choose(f"mesh.rules.{name}: axis", axis, AXES) for axis in axes)
    if not merged.get("batch"):
        raise UserError("mesh.rules.batch is empty; a batch is split over data, fsdp or both.")
    return Layout(mesh, tuple(sorted(merged.items())))


def spec_of(entries: Sequence[str | tuple[str, ...] | None]) -> P:
    """The `PartitionSpec` of an entry a dimension; no None at the end, so that equal is ==."""
    entries = list(entries)
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def splits(spec: P, axis: str) -> bool:
    """Whether a dimension is split over that axis of the mesh."""
    return any(axis in (entry if isinstance(entry, tuple) else (entry,)) for entry in spec)


_CURRENT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


def constrain(h: Array, *names: str | None) -> Array:
    """h, laid out by the names of its axes where the network that is traced has a layout.

    A network gets one from `apply.with_layout(layout)`; without, h is as it was.
    """
    layout = _CURRENT.get()
    if layout is None:
        return h
    return jax.lax.with_sharding_constraint(h, layout.sharding(names, h.shape))


def current() -> Layout | None:
    """The layout of the network that is being traced."""
    return _CURRENT.get()


@contextlib.contextmanager
def within(layout: Layout | None) -> Iterator[None]:
    """Gives `constrain` its layout, as long as a network is traced."""
    token = _CURRENT.set(layout)
    try:
        yield
    finally:
        _CURRENT.reset(token)
