"""sample(): a solver over a time grid, as one compiled scan."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import grids
from jdiff.batching import number, pieces
from jdiff.denoisers import as_denoiser, schedule_of
from jdiff.errors import UserError
from jdiff.noise import Fresh, Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, is_concrete, noise_like
from jdiff.schedules import is_schedule, schedule_map
from jdiff.solvers import Solver, heun

#: What `observe` is called with at every grid point but the last: (x, t, prediction) -> anything.
Observe = Callable[[PyTree, Array, Prediction], PyTree]


def sample(
    key: Array, denoiser: Any, *, times: Array, shape: PyTree = None, num: int | None = None,
    cond: PyTree = None, schedule: PyTree = None, solver: Solver | None = None,
    x: PyTree = None, ids: Array | None = None, batch: int | None = None,
    observe: Observe | None = None, sharding: jax.sharding.Sharding | None = None,
    noise: Noise | None = None,
) -> PyTree:  # fmt: skip
    """Draws samples by stepping a solver from noise to data.

    Sample i depends on `key` and its id alone: not on the batch, the other samples or the devices.
    The denoiser, solver, schedule and grid are arguments of one compiled program, so new weights,
    guidance scales, churn or times of the same length do not recompile, and `jax.vmap` over any of
    them is one program.

    Args:
      key: one PRNG key for the whole draw.
      denoiser: (x, t `[B]`, cond) -> Prediction: guided or not, a pytree or a plain function.
      times: falling times `[n + 1]` for n steps, from `grids`.
      shape: one sample's shape without the batch, e.g. (32, 32, 3), or a tree of shapes.
      num: how many samples; taken from x, ids or cond where they are given, else 1.
      cond: a tree of `[num, ...]` arrays handed to the denoiser.
      schedule: the denoiser's own unless given.
      solver: `solvers.heun()` unless given.
      x: the state at times[0] to start from, `[num, ...]`: noise of your own, or a noised image
        (`predictions.corrupt`). Drawn as sigma(times[0]) eps unless given.
      ids: `[num]` integers that name the samples; 0..num-1 unless given.
      batch: samples at a time; all at once unless given. The last batch is padded, not recompiled.
      observe: `observe(x, t, prediction)` at the start of each step; what it returns is stacked.
        It is static: a new function (a new lambda, too) compiles anew.
      sharding: how a batch is laid out over devices, e.g. NamedSharding(mesh, P("data")). A batch
        that the devices do not divide is padded.
      noise: what a stochastic solver draws from: `noise.fresh()` unless given.

    Returns:
      The samples `[num, ...]`; with `observe`, (samples, trajectory `[n, num, ...]`).

    Raises:
      UserError: a missing shape or schedule, lengths that disagree, times that do not fall or do
        not fit the schedule.

    >>> x = sample(jax.random.key(0), denoise, shape=(8, 8, 1), num=64, cond={"label": wanted},
    ...            solver=solvers.heun(), times=grids.karras(schedule, 18))
    """
    parts = list(
        stream(
            key, denoiser, times=times, shape=shape, num=num, cond=cond, schedule=schedule,
            solver=solver, x=x, ids=ids, batch=batch, observe=observe, sharding=sharding,
            noise=noise,
        )
    )  # fmt: skip
    if len(parts) == 1:
        return parts[0]
    if observe is None:
        return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
    images, paths = zip(*parts)
    return (
        jax.tree.map(lambda *a: jnp.concatenate(a), *images),
        jax.tree.map(lambda *a: jnp.concatenate(a, axis=1), *paths),
    )


def stream(
    key: Array, denoiser: Any, *, times: Array, shape: PyTree = None, num: int | None = None,
    cond: PyTree = None, schedule: PyTree = None, solver: Solver | None = None,
    x: PyTree = None, ids: Array | None = None, batch: int | None = None,
    observe: Observe | None = None, sharding: jax.sharding.Sharding | None = None,
    noise: Noise | None = None,
) -> Iterator[PyTree]:  # fmt: skip
    """`sample`, a batch at a time: yields what `sample` would concatenate.

    For draws that do not fit in memory, and for progress bars. The same arguments and errors.
    """
    denoiser = as_denoiser(denoiser)
    schedule = schedule_of(denoiser, schedule)
    solver = heun() if solver is None else solver
    noise = Fresh() if noise is None else noise
    if not isinstance(solver, Solver):
        name = getattr(solver, "__name__", repr(solver))
        raise UserError(f"sample: solver={name} is not a solver; call one: solver=solvers.heun().")
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise UserError(
                f"sample: x{jax.tree_util.keystr(path)} is {jnp.result_type(leaf)}; floats are "
                "needed (images: x / 127.5 - 1, then predictions.corrupt)."
            )
    times = checked_times(times, schedule, solver, denoiser)
    ids = None if ids is None else jnp.asarray(ids)
    num = number("sample", num, x=x, ids=ids, cond=cond)
    if x is None and shape is None:
        raise UserError("sample: give shape=(height, width, channels), or x= to start from.")
    shapes = None if x is not None else _Shapes.of(shape)
    ids = np.arange(num) if ids is None else ids
    batch = num if batch is None else min(batch, num)
    if batch < 1:
        raise UserError(f"sample: num={num} and batch={batch} given; both are at least 1.")
    for keep, inputs in pieces((ids, x, cond), num, batch, sharding):
        out = _run(
            key, *inputs, denoiser, schedule, solver, times, noise, shapes=shapes, observe=observe
        )
        yield out if keep == len(inputs[0]) else _first(out, keep, observe is not None)


def checked_times(times: Array, schedule: PyTree, solver: Solver, denoiser: Any) -> Array:
    """`times`, after all checks that need their values; traced ones pass.

    Raises:
      UserError: times that do not fit the schedule, the solver or the network.
    """
    times = grids.check(times, schedule)
    if is_concrete((times, schedule, solver)):
        with jax.ensure_compile_time_eval():  # also while jit traces the caller
            solver.check(schedule, times)
            _check_start(denoiser, times[0])
    return times


@partial(jax.jit, static_argnames=("shapes", "observe"))
def _run(
    key: Array, ids: Array, x: PyTree, cond: PyTree, denoiser: Any, schedule: PyTree,
    solver: Solver, times: Array, noise: Noise, *, shapes: "_Shapes | None",
    observe: Observe | None,
) -> PyTree:  # fmt: skip
    """One batch, one program: the initial noise and the scan over the grid."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids)
    if x is None:
        start = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
        z = noise_like(start, shapes.batch(len(ids)))
        x = schedule_map(lambda s, z: (s.sigma(times[0]) * z).astype(z.dtype), schedule, z)

    def body(carry: tuple, step: tuple) -> tuple:
        x, memory = carry
        i, t, s = step
        x_next, memory, prediction = solver.step(
            denoiser, schedule, x, memory, t, s, noise.at(keys, i + 1), cond
        )
        x_next = jax.tree.map(lambda new, old: new.astype(old.dtype), x_next, x)
        return (x_next, memory), None if observe is None else observe(x, t, prediction)

    steps = (jnp.arange(len(times) - 1), times[:-1], times[1:])
    (x, _), trajectory = jax.lax.scan(body, (x, solver.init(x, times)), steps)
    return x if observe is None else (x, trajectory)


def _check_start(denoiser: Any, t: Array) -> None:
    """Refuses a network whose output says nothing of x0 at the start: x0 would be 0 / 0.

    Raises:
      UserError: the first time is pure noise and the target does not determine x0 there.
    """
    while hasattr(denoiser, "denoiser"):
        denoiser = denoiser.denoiser
    parameterization = getattr(denoiser, "parameterization", None)
    if parameterization is None:
        return
    for s in jax.tree.leaves(denoiser.schedule, is_leaf=is_schedule):
        if not is_concrete((parameterization, s)):
            continue
        determinant = float(_determinant(parameterization, s, t))
        if determinant == 0 or math.isnan(determinant):
            raise UserError(
                f"sample: at times[0]={float(t):.6g} {type(s).__name__} is pure noise, and a "
                f"network that predicts {parameterization.target!r} says nothing of x0 there; "
                f"start below, e.g. first={0.999 * float(t):.6g}, or train 'v' or 'x0'."
            )


@jax.jit
def _determinant(parameterization: Any, schedule: Any, t: Array) -> Array:
    """Compiled, as a table's interpolation op by op takes longer than a small network's step."""
    return parameterization.determinant(schedule, t)


class _Shapes(tuple):
    """A tree of shapes, flattened so that it can be a static argument: (treedef, shapes)."""

    @classmethod
    def of(cls, shape: PyTree) -> "_Shapes":
        """From a tuple of integers or a tree of such tuples."""
        is_shape = lambda s: isinstance(s, tuple | list) and all(isinstance(n, int) for n in s)
        leaves, treedef = jax.tree.flatten(shape, is_leaf=is_shape)
        if not leaves or not all(is_shape(leaf) for leaf in leaves):
            raise UserError(
                f"sample: shape must be a tuple of integers or a tree of them: {shape!r}."
            )
        return cls((treedef, tuple(tuple(leaf) for leaf in leaves)))

    def batch(self, size: int) -> PyTree:
        """The shape structs of a batch, in jax's default float dtype."""
        dtype = jnp.result_type(float)
        treedef, shapes = self
        return treedef.unflatten([jax.ShapeDtypeStruct((size, *s), dtype) for s in shapes])


def _first(out: PyTree, keep: int, observed: bool) -> PyTree:
    if not observed:
        return jax.tree.map(lambda a: a[:keep], out)
    x, trajectory = out
    return jax.tree.map(lambda a: a[:keep], x), jax.tree.map(lambda a: a[:, :keep], trajectory)
