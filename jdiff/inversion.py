"""Inversion: from data to the noise that a sampler turns into it."""

from typing import Any

import jax
import jax.numpy as jnp

from jdiff import grids
from jdiff.denoisers import as_denoiser, schedule_of
from jdiff.errors import UserError
from jdiff.pytree import Array, PyTree, batch_size, broadcast_time, is_concrete
from jdiff.schedules import Schedule, first, schedule_map
from jdiff.solvers import Solver
from jdiff.solvers.probe import Constant, draws_noise


def invert(
    denoiser: Any, x: PyTree, *, times: Array, cond: PyTree = None, schedule: PyTree = None,
    solver: Solver | None = None, iterations: int = 1,
) -> PyTree:  # fmt: skip
    """The state at times[-1] from which sampling leads to x: the sampler's steps taken backwards.

    Without a solver it is DDIM inversion. DDIM's step down from x_s to x_t asks for eps at x_s,
    which is what is wanted, so the way up is the equation

        x_s = (alpha_s / alpha_t) x_t + (sigma_s - alpha_s sigma_t / alpha_t) eps(x_s, s)

    and `iterations` of it, from the guess x_s = x_t. One is DDIM inversion as in use (Song et al.
    2021; Mokady et al. 2022, 2211.09794; diffusers' DDIMInverse), with an error of the order of the
    step; more of them converge to the exact inverse of ddim() where steps are small enough (Pan et
    al. 2023, 2309.04907), guidance included.

    With a solver of the ODE, its own steps upwards. Sampling with it then leads back to x but for
    an error of the solver's order, and one better where that is even: what a step of even order
    does wrong upwards it undoes downwards. A step that leaves the data (sigma = 0), where nothing
    can be evaluated, is the equation above.

    Args:
      denoiser: (x, t `[B]`, cond) -> Prediction.
      x: a tree of `[B, ...]` at times[0]: data where times[0] is 0.
      times: rising `[n + 1]`, a sampling grid reversed: grids.karras(schedule, 50)[::-1].
      cond: a tree of `[B, ...]` arrays handed to the denoiser.
      schedule: the denoiser's own unless given.
      solver: of the ODE (heun(), rk4(), dpmpp_2m(), adaptive(), ...).
      iterations: of the equation, in each step of DDIM inversion or in that which leaves the data.

    Returns:
      A tree like x.

    Raises:
      UserError: times that do not rise or do not fit the schedule, a solver that draws noise,
        no iterations, no schedule, a leaf of cond of another length than x.

    >>> noise = invert(denoise, images, times=times[::-1], cond=cond)
    >>> again = sample(key, denoise, x=noise, times=times, cond=cond, solver=solvers.ddim())
    """
    denoiser = as_denoiser(denoiser)
    schedule = schedule_of(denoiser, schedule, "invert")
    times = _rising(times, schedule)
    if iterations < 1:
        raise UserError(f"invert: iterations={iterations} given; at least 1 is needed.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(cond):
        if jnp.shape(leaf)[:1] != (batch_size(x),):
            raise UserError(
                f"invert: cond{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}; one entry "
                f"for each of the {batch_size(x)} samples is needed."
            )
    if solver is not None and is_concrete((solver, schedule, times)):
        with jax.ensure_compile_time_eval():  # also while jit traces the caller
            solver.check(schedule, times[::-1])
            draws = draws_noise(solver, schedule, times[::-1])
        if draws:
            raise UserError("invert: the solver draws noise; give one of the ODE (heun, ddim).")
    return _invert(denoiser, x, times, cond, schedule, solver, iterations)


@jax.jit
def _invert(
    denoise: Any, x: PyTree, times: Array, cond: PyTree, schedule: PyTree, solver: Solver | None,
    iterations: Array | int,
) -> PyTree:  # fmt: skip
    cond = {} if cond is None else cond

    def backwards(x: PyTree, t: Array, s: Array) -> PyTree:
        """DDIM's step from s to t, solved for its start."""

        def again(_: int, guess: PyTree) -> PyTree:
            found = denoise(guess, broadcast_time(s, x), cond)

            def update(sched: Schedule, x: Array, x0: Array, eps: Array) -> Array:
                alpha, sigma, alpha_s, sigma_s = *level(sched, t), *level(sched, s)
                known = (alpha_s * x + (sigma_s * alpha - alpha_s * sigma) * eps) / alpha
                # At alpha = 0 eps is x_s and the equation empty; written in x0 it is not.
                inner = (alpha_s == 0) & (sigma > 0)
                pure = (x - alpha * x0) * (sigma_s / jnp.where(inner, sigma, 1.0))
                return jnp.where(inner, pure, known).astype(x.dtype)

            return schedule_map(update, schedule, x, found.x0, found.eps)

        return jax.lax.fori_loop(0, iterations, again, x)

    def level(sched: Schedule, t: Array) -> tuple[Array, Array]:
        return sched.alpha(t), sched.sigma(t)

    def body(carry: tuple, ends: Array) -> tuple:
        x, memory = carry
        t, s = ends
        if solver is None:
            return (backwards(x, t, s), memory), None

        def forwards() -> tuple[PyTree, Any]:
            new, after, _ = solver.step(
                denoise,
                schedule,
                x,
                memory,
                t,
                s,
                Constant(0.0),
                cond,
            )
            return jax.tree.map(lambda a, old: a.astype(old.dtype), new, x), after

        leaves_data = first(schedule).sigma(t) == 0
        return jax.lax.cond(leaves_data, lambda: (backwards(x, t, s), memory), forwards), None

    memory = () if solver is None else solver.init(x, times)
    return jax.lax.scan(body, (x, memory), jnp.stack([times[:-1], times[1:]], 1))[0][0]


def _rising(times: Array, schedule: PyTree) -> Array:
    """`times` as an array, checked."""
    times = jnp.asarray(times)
    if is_concrete(times) and times.ndim == 1:
        for i, (t, after) in enumerate(zip(times.tolist(), times.tolist()[1:])):
            if not t < after:
                raise UserError(
                    f"invert: times must rise, from data to noise: times[{i}]={t:.6g} is followed "
                    f"by times[{i + 1}]={after:.6g}. A sampling grid is reversed by [::-1]."
                )
    grids.check(times[::-1], schedule)
    return times
