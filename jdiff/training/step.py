"""The training state and one step: a pure function of plain trees, compiled once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jdiff.parallel.layout import Layout
from jdiff.pytree import Array, PyTree, struct
from jdiff.training import ema


@struct
class State:
    """All that training carries on: what a checkpoint holds.

    Attributes:
      params: the weights.
      opt: the optimiser's state.
      averages: the weights' averages by name.
      step: how many steps were taken.
      key: the run's key; a step's randomness is `fold_in(key, step)`.
      bad_step: the first step whose loss or gradient was not finite, or -1.
      frozen: weights that the loss needs and training does not change (a teacher's), or None.
    """

    params: PyTree
    opt: PyTree
    averages: dict[str, PyTree]
    step: Array
    key: Array
    bad_step: Array
    frozen: PyTree = None


Loss = Callable[[PyTree, Array, PyTree, State], Array | tuple[Array, dict[str, Array]]]
Step = Callable[[State, PyTree], tuple[State, dict[str, Array]]]


def start(
    params: PyTree, key: Array, optimizer: optax.GradientTransformation,
    averages: dict[str, ema.Average], frozen: PyTree = None,
) -> State:  # fmt: skip
    """The state before the first step."""
    return State(
        params=params,
        opt=optimizer.init(params),
        averages=ema.start(averages, params),
        step=jnp.zeros((), jnp.int32),
        key=key,
        bad_step=jnp.full((), -1, jnp.int32),
        frozen=frozen,
    )


def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, averages: dict[str, ema.Average],
    accumulate: int = 1,
) -> Step:  # fmt: skip
    """step(state, batch) -> (state, {"loss", "grad_norm"}), to be jitted with the state donated.

    Args:
      loss: (params, key, batch, state) -> `[B]`, or any shape; its mean is minimised over the
        params. The state, as it is before the step, is for a loss that makes its own targets: from
        averages of the weights, frozen weights, or by the step's number. It may give (that,
        {name: scalar}): figures that stand beside "loss" in what the step returns.
      accumulate: micro-batches: the batch is cut into this many parts and their gradients averaged,
        which is the gradient of the whole batch.
    """

    def gradient(state: State, key: Array, batch: PyTree) -> tuple[tuple, PyTree]:
        def mean(params: PyTree) -> tuple[Array, dict[str, Array]]:
            found = loss(params, key, batch, state)
            values, figures = found if isinstance(found, tuple) else (found, {})
            return jnp.mean(values), figures

        return jax.value_and_grad(mean, has_aux=True)(state.params)

    def accumulated(state: State, key: Array, batch: PyTree) -> tuple[tuple, PyTree]:
        cut = lambda a: a.reshape(-1, accumulate, *a.shape[1:]).swapaxes(0, 1)
        keys = jax.random.split(key, accumulate)

        def add(total: PyTree, part: tuple) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, gradient(state, *part)), None

        parts = (keys, jax.tree.map(cut, batch))
        like = jax.eval_shape(gradient, state, *jax.tree.map(lambda a: a[0], parts))
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        total, _ = jax.lax.scan(add, zero, parts)
        return jax.tree.map(lambda a: a / accumulate, total)

    def step(state: State, batch: PyTree) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        one = gradient if accumulate == 1 else accumulated
        (value, figures), grads = one(state, key, batch)
        norm = optax.tree.norm(grads)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        count = state.step + 1
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        # Recorded in the state, so that the host may look late and still name the step.
        bad_step = jnp.where((state.bad_step < 0) & ~finite, count, state.bad_step)
        new = dataclasses.replace(
            state,
            params=params,
            opt=opt,
            averages=ema.update(averages, state.averages, params, count),
            step=count,
            bad_step=bad_step,
        )
        return new, {"loss": value, "grad_norm": norm, **figures, "bad_step": bad_step}

    return step


def compile_step(step: Step, placed: PyTree = None, layout: Layout | None = None) -> Any:
    """`step` jitted, the state donated.

    Args:
      placed: where each leaf of the state lives, before the step and after it, from
        `parallel.of_state`; None on one device.
      layout: how the batch is split.
    """
    if layout is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(
        step, donate_argnums=0, in_shardings=(placed, layout.batch),
        out_shardings=(placed, layout.whole),
    )  # fmt: skip
