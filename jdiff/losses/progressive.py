"""Progressive distillation: one step of the student equals two of the teacher.

Salimans and Ho 2022 (2202.00512), algorithm 2. A student of N steps learns, at t = i / N of the
way, the x0 whose one DDIM step to (i - 1) / N lands where two of the teacher's land. Its run's
teacher is the run before, of 2 N steps; the first teacher is a plain denoiser.
"""

from typing import Any

import jax

from jdiff.denoisers import Network
from jdiff.errors import UserError
from jdiff.losses.denoising import Weighting, denoising, normal
from jdiff.predictions import Prediction, corrupt, from_x0
from jdiff.pytree import Array, PyTree, batch_size, expand
from jdiff.schedules import Schedule, first, schedule_map
from jdiff.schedules.base import finite_data


def progressive(
    key: Array, denoiser: Network, x0: PyTree, cond: PyTree = None, *, teacher: Any, steps: int,
    weighting: Weighting | None = None, eps: PyTree = None, dropout_key: Array | None = None,
) -> Array:  # fmt: skip
    """`denoising` towards the teacher's two steps instead of the data.

    Sample with `solvers.ddim` on `grids.uniform` of the same number of steps.

    Args:
      key: the key of the times and the noise.
      denoiser: the student; with its teacher's weights to start from.
      x0: clean data, a tree of `[B, ...]`.
      cond: conditions `[B, ...]`.
      teacher: the denoiser of twice the steps, guided or not, on the student's schedule.
      steps: N, the student's.
      weighting: as in `denoising`; the paper's is the larger of SNR and 1.
      eps: the other endpoint; standard normal unless given.
      dropout_key: switches the student's dropout on.

    Returns:
      `[B]` losses.

    Raises:
      UserError: steps is below 1, or the data lies at no finite t.
    """
    if steps < 1:
        raise UserError(f"progressive: steps={steps} given; the student takes at least 1.")
    cond = {} if cond is None else cond
    key_t, key_eps = jax.random.split(key)
    schedule, s = denoiser.schedule, first(denoiser.schedule)
    finite_data("progressive", s)
    eps = normal(key_eps, x0) if eps is None else eps
    i = jax.random.randint(key_t, (batch_size(x0),), 1, steps + 1)
    at = lambda i: s.t_data + (s.t_max - s.t_data) * i / steps
    t = at(i)
    x = corrupt(schedule, x0, eps, t)
    wanted = target(teacher, schedule, x, t, at(i - 0.5), at(i - 1), cond)
    # x is the mixture of the target's two endpoints too, so this is denoising of those.
    return denoising(
        key, denoiser, wanted.x0, cond, distribution=lambda key, n, schedule: t,
        weighting=weighting, eps=wanted.eps, dropout_key=dropout_key,
    )  # fmt: skip


def target(
    teacher: Any, schedule: PyTree, x: PyTree, t: Array, middle: Array, end: Array, cond: PyTree
) -> Prediction:
    """The endpoints from which one DDIM step leads where two of the teacher's lead.

    x0 = (z'' - (sigma'' / sigma) x) / (alpha'' - (sigma'' / sigma) alpha), with z'' at `end` after
    the teacher's steps from t to `middle` to `end` (algorithm 2). Times are `[B]`.
    """
    first_step = teacher(x, t, cond)
    z = corrupt(schedule, first_step.x0, first_step.eps, middle)
    second_step = teacher(z, middle, cond)
    z = corrupt(schedule, second_step.x0, second_step.eps, end)

    def solve(s: Schedule, x: Array, z: Array) -> Array:
        ratio = s.sigma(end) / s.sigma(t)
        below = s.alpha(end) - ratio * s.alpha(t)
        return (z - expand(ratio, x) * x) / expand(below, x)

    return from_x0(schedule, x, schedule_map(solve, schedule, x, z), t)
