"""The randomness of a solver's step: which noise it draws, not how it uses it.

A solver asks for the noise of an interval of time (`between`) or for noise that belongs to none
(`free`). `sample(..., noise=...)` decides where it comes from: `fresh()` draws anew at each step.
Every sample has its own key, so that its noise depends on neither the batch nor the devices.
"""

import jax

from jdiff.pytree import Array, PyTree, noise_like, struct

_PARTS, _FREE = 1 << 16, 1 << 17  # apart from the indices of leaves that noise_like folds in


class Noise:
    """What a solver draws from. `at` binds it to a batch of samples and a step."""

    def at(self, keys: Array, step: Array | int) -> "Noise":
        """The noise of step number `step` for samples with these keys `[B]`."""
        raise NotImplementedError  # abstract

    def between(self, x: PyTree, t: Array, s: Array, part: int = 0) -> PyTree:
        """Standard normal, like x: the path's increment from t to s over its deviation.

        The intervals that one step asks for must be disjoint and numbered by `part`.
        """
        raise NotImplementedError  # abstract

    def free(self, x: PyTree, i: int = 0) -> PyTree:
        """Standard normal, like x: the step's i-th draw that belongs to no interval."""
        raise NotImplementedError  # abstract


@struct
class Fresh(Noise):
    """Independent draws at every step."""

    keys: Array | None = None  # [B], of this step

    def at(self, keys: Array, step: Array | int) -> "Fresh":
        """Keys of the samples `[B]`, folded with the step."""
        return Fresh(jax.vmap(jax.random.fold_in, (0, None))(keys, step))

    def between(self, x: PyTree, t: Array, s: Array, part: int = 0) -> PyTree:
        """A draw for each `part`; the times do not matter."""
        return noise_like(self._fold(_PARTS + part) if part else self.keys, x)

    def free(self, x: PyTree, i: int = 0) -> PyTree:
        """A draw for each i."""
        return noise_like(self._fold(_FREE + i), x)

    def _fold(self, number: int) -> Array:
        return jax.vmap(jax.random.fold_in, (0, None))(self.keys, number)


def fresh() -> Fresh:
    """New noise at every step: what `sample` uses unless told otherwise."""
    return Fresh()
