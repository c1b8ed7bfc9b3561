"""Reflow: straight lines between the ends of a teacher's own trajectories.

Liu et al. 2022 (2209.03003), algorithm 1 and equation 1. A flow trained on pairs (x0, eps) that a
teacher's ODE joins has straighter paths than its teacher, so that fewer steps suffice; one that
asks for a single step is distilled. The pairs are drawn as training goes on. To draw them once,
keep `ends(...)` beside its eps and train `flow_matching(..., eps=eps)` on them.
"""

import jax

from jdiff.denoisers import Network, schedule_of
from jdiff.losses.denoising import Distribution, flow_matching, normal
from jdiff.pytree import Array, PyTree, expand
from jdiff.sampling import sample
from jdiff.schedules import schedule_map


def reflow(
    key: Array, denoiser: Network, x0: PyTree, cond: PyTree = None, *, sampler: tuple,
    distribution: Distribution | None = None, eps: PyTree = None, dropout_key: Array | None = None,
) -> Array:  # fmt: skip
    """`flow_matching` on pairs that the teacher's sampler joins.

    Args:
      key: the key of the times and the noise.
      denoiser: the student.
      x0: only its shapes matter: the data of the pairs are the teacher's.
      cond: conditions `[B, ...]`, the teacher's and the student's.
      sampler: (denoiser, solver, times) of the teacher; the solver should be deterministic.
      distribution: of the times; uniform unless given.
      eps: the noise that the teacher starts from; standard normal unless given.
      dropout_key: switches the student's dropout on.

    Returns:
      `[B]` losses.
    """
    key_eps, key_ends, key_loss = jax.random.split(key, 3)
    eps = normal(key_eps, x0) if eps is None else eps
    return flow_matching(
        key_loss, denoiser, ends(key_ends, sampler, eps, cond), cond, distribution=distribution,
        eps=eps, dropout_key=dropout_key,
    )  # fmt: skip


def ends(key: Array, sampler: tuple, eps: PyTree, cond: PyTree = None) -> PyTree:
    """Where the teacher leads from the noise eps `[B, ...]`: the x0 of its pair.

    Args:
      key: of a stochastic solver.
      sampler: (denoiser, solver, times); the times start where alpha is (nearly) 0.
    """
    denoiser, solver, times = sampler
    schedule = schedule_of(denoiser, where="reflow")
    start = schedule_map(lambda s, e: expand(s.sigma(times[0]), e) * e, schedule, eps)
    return sample(key, denoiser, x=start, times=times, cond=cond, solver=solver)
