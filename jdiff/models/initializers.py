"""Initial weights: a rule travels with every parameter, and one program draws them all.

Drawing each parameter with its own random call compiles one generator a parameter, which takes
longer than compiling the training step. Here a parameter only records what it should be (`Init`, in
the metadata of its `nnx.Param`), and `draw` cuts all small parameters from one shared vector.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdiff.parallel.fetch import fetch
from jdiff.parallel.layout import constrain

# Parameters above this many elements are drawn on their own, so that a sharded initialisation
# never holds a whole one on a device. Smaller ones share one vector.
POOLED = 2**20


@dataclasses.dataclass(frozen=True)
class Init:
    """How a parameter starts: `scale` times a standard draw.

    The standard draw is 1 ("constant"), N(0, 1) ("normal") or uniform on [-1, 1] ("uniform").
    """

    distribution: Literal["constant", "normal", "uniform"]
    scale: float

    @property
    def std(self) -> float:
        """The standard deviation of one entry."""
        return {"constant": 0.0, "normal": 1.0, "uniform": 1 / math.sqrt(3)}[
            self.distribution
        ] * abs(self.scale)


zeros = Init("constant", 0.0)
ones = Init("constant", 1.0)


def normal(std: float) -> Init:
    """N(0, std^2)."""
    return Init("normal", std)


def xavier_uniform(fan_in: int, fan_out: int, gain: float = 1.0) -> Init:
    """Uniform with variance gain^2 * 2 / (fan_in + fan_out) (Glorot and Bengio, 2010)."""
    return Init("uniform", gain * math.sqrt(6 / (fan_in + fan_out)))


def kaiming_uniform(fan_in: int, gain: float = 1.0) -> Init:
    """Uniform with variance gain^2 / fan_in; gain sqrt(1/3) is the default of PyTorch's layers."""
    return Init("uniform", gain * math.sqrt(3 / fan_in))


class Drawn(Exception):
    """A module of which only the shapes are wanted asked for random numbers of its own."""


class Unseeded:
    """In the place of random streams where only shapes are wanted: `param` draws nothing.

    Whoever else asks for a stream gets `Drawn`.
    """

    def __getattr__(self, name: str) -> Any:
        """No stream of that name."""
        raise AttributeError(name) if name.startswith("__") else Drawn(name)


#: The logical name of each dimension of a parameter; None: never split over devices.
Axes = tuple[str | None, ...]


class Weight(nnx.Param):
    """A parameter: `w[...]` is its value, whole where the layout (FSDP) keeps parts of it apart."""

    def __getitem__(self, key: Any) -> jax.Array:
        """The value, fetched from the devices that hold it, at `key`."""
        value = self.fetched(lambda value: value)
        return value if key is ... else value[key]

    def fetched(self, change: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """`change(value)`, computed where its parts are and then fetched: of the same shape.

        A cast to fewer bits halves what is sent.
        """
        return fetch(change(self.get_value()), self.get_metadata().get("axes"))


def param(rngs: nnx.Rngs, shape: Sequence[int], rule: Init, axes: Axes | None = None) -> Weight:
    """A float32 parameter that starts by `rule`; it remembers `param.rule` and `param.axes`."""
    axes = (None,) * len(shape) if axes is None else tuple(axes)
    if len(axes) != len(shape):
        raise ValueError(f"axes={axes} given for a parameter of shape {tuple(shape)}")
    if isinstance(rngs, Unseeded):
        value = np.broadcast_to(np.float32(0), tuple(shape))  # a shape that takes no memory
    elif rule.distribution == "constant":
        value = jnp.full(shape, rule.scale, jnp.float32)
    else:
        value = rule.scale * _standard(rngs.params(), rule.distribution, tuple(shape))
    return Weight(value, rule=rule, axes=axes)


def draw(key: jax.Array, leaves: Sequence[tuple[tuple[int, ...], Init]]) -> list[jax.Array]:
    """Draw float32 arrays for `(shape, rule)` pairs from one key.

    Deterministic in the key and the list. Arrays of up to `POOLED` elements are slices of one
    vector per distribution; larger ones of equal shape are drawn together. With a concrete key the
    vectors are cut on the host: hundreds of slices take XLA seconds to compile.
    """
    groups: dict[tuple, list[int]] = {}
    for index, (shape, rule) in enumerate(leaves):
        own = tuple(shape) if math.prod(shape) > POOLED else None
        groups.setdefault((rule.distribution, own), []).append(index)

    traced = isinstance(key, jax.core.Tracer)
    drawn: list = [None] * len(leaves)
    for number, ((distribution, own), members) in enumerate(groups.items()):
        sizes = [math.prod(leaves[i][0]) for i in members]
        shape = (len(members), *own) if own else (sum(sizes),)
        if distribution == "constant":
            pool = (jnp if traced else np).ones(shape, np.float32)
        else:
            pool = _standard(jax.random.fold_in(key, number), distribution, shape)
            # Whole on every device, to be cut there, and not cut from parts that lie elsewhere.
            pool = (pool if own else constrain(pool, None)) if traced else np.asarray(pool)
        ends = itertools.accumulate(sizes)
        pieces = pool if own else [pool[end - size : end] for end, size in zip(ends, sizes)]
        for i, piece in zip(members, pieces):
            shape, rule = leaves[i]
            drawn[i] = jnp.asarray(rule.scale * piece.reshape(shape))
    return drawn


@functools.partial(jax.jit, static_argnums=(1, 2))
def _standard(key: jax.Array, distribution: str, shape: tuple[int, ...]) -> jax.Array:
    if distribution == "normal":
        return jax.random.normal(key, shape, jnp.float32)
    return jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)
