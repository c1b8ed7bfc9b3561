"""MeanFlow: the average velocity of the flow from t to s, from its own identity (one jvp).

Geng et al. 2025 (2505.13447). The network learns

    u(x_t, t, s) = 1 / (t - s) * integral of v(x_r, r) dr from s to t,

so that x_s = x_t + (s - t) u is one evaluation for any two times, the step from noise to data
included. Differentiating (t - s) u along the path gives what u satisfies (equation 6):

    u = v - (t - s) du/dt,      du/dt = v . grad_x u + d_t u,

whose right side, held fixed, is the target; the velocity of the path at x_t stands for v. du/dt is
a Jacobian-vector product with the tangent (v, 1, 0) of (x, t, s): the paper writes (v, 0, 1) for
(z, r, t). Its r is our s, and its time is ours: t = 1 is noise.

The network is asked with the target time in cond["s"] `[B]`; models take it by
`scalars=("t-s",)`, which embeds t - s beside t as the paper's best variant does.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jdiff.conditioning import with_null
from jdiff.denoisers import Network
from jdiff.distributions import Uniform
from jdiff.errors import UserError
from jdiff.losses.denoising import Distribution, normal
from jdiff.losses.distances import squared
from jdiff.predictions import Prediction, corrupt, endpoint_velocity
from jdiff.pytree import Array, PyTree, batch_size, expand
from jdiff.schedules import first

#: (x, t, s) -> u: an average velocity as a function of the point and both times.
Average = Callable[[PyTree, Array, Array], PyTree]


def meanflow(
    key: Array, denoiser: Network, x0: PyTree, cond: PyTree = None, *,
    distribution: Distribution | None = None, share: float = 0.25, power: float = 1.0,
    floor: float = 1e-3, guidance: float = 1.0, mix: float = 0.0, null: PyTree = None,
    eps: PyTree = None, teacher: Callable | None = None, dropout_key: Array | None = None,
) -> Array:  # fmt: skip
    """The MeanFlow loss w ||u - target||^2 with w = 1 / (||u - target||^2 + floor)^power.

    With `guidance`, u learns the flow of v~ = guidance v + mix u(x, t, t | c) + (1 - guidance -
    mix) u(x, t, t | null), which is guided with the scale guidance / (1 - mix) at no cost in
    sampling (section 4.2, and the appendix on mixing scales); samples whose condition is the null
    learn v itself.

    Args:
      key: the key of the times and the noise.
      denoiser: the network, asked with cond["s"] `[B]`. Its schedule must be straight (see
        `solvers.flow_map`).
      x0: clean data, a tree of `[B, ...]`.
      cond: conditions `[B, ...]`, some of them dropped for guidance.
      distribution: of both times, of which t is the larger; uniform unless given. The paper's is
        logit_normal(-0.4, 1).
      share: of samples with s != t; the others learn the velocity. 0.25 to 1 in the paper.
      power: p of the adaptive weight (section 4.3): 0 is the squared error, 1 the paper's.
      null: what the conditions' null is, for guidance; see `conditioning`.
      eps: the other endpoint; standard normal unless given.
      teacher: a denoiser whose velocity stands for v, instead of the path's: distillation.
      dropout_key: switches the network's dropout on.

    Returns:
      `[B]` losses; the error is summed over the dimensions, as in the paper. With power 1 they are
      all but 1 from start to end: not they, but the samples tell how training goes.

    Raises:
      UserError: guidance without a null condition.
    """
    cond = {} if cond is None else cond
    key_t, key_s, key_share, key_eps = jax.random.split(key, 4)
    batch, schedule = batch_size(x0), denoiser.schedule
    draw = distribution or Uniform()
    a, b = (draw(k, batch, first(schedule)) for k in (key_t, key_s))
    t = jnp.maximum(a, b)
    s = jnp.where(jax.random.uniform(key_share, (batch,)) < share, jnp.minimum(a, b), t)
    eps = normal(key_eps, x0) if eps is None else eps
    x = corrupt(schedule, x0, eps, t)
    v = path_velocity(schedule, x0, eps, t)
    if teacher is not None:
        v = endpoint_velocity(schedule, teacher(x, t, cond), t)
    elif guidance != 1.0 or mix != 0.0:
        v = _guided(denoiser, x, t, cond, v, guidance, mix, null)
    u, target = identity(
        lambda x, t, s: average_velocity(denoiser, x, t, s, cond, dropout_key), x, t, s, v
    )
    error = squared(u, target)
    return error / jax.lax.stop_gradient(error + floor) ** power


def identity(average: Average, x: PyTree, t: Array, s: Array, v: PyTree) -> tuple[PyTree, PyTree]:
    """(u, v - (t - s) du/dt): both sides of the MeanFlow identity, the right one held fixed.

    Args:
      average: (x, t, s) -> u.
      v: the velocity at (x, t), a tree like x.
    """
    tangent = (v, jnp.ones_like(t), jnp.zeros_like(s))
    u, rate = jax.jvp(average, (x, t, s), tangent)
    target = jax.tree.map(lambda v, rate: v - expand(t - s, v) * rate, v, rate)
    return u, jax.lax.stop_gradient(target)


def average_velocity(
    denoiser: Network, x: PyTree, t: Array, s: Array, cond: dict[str, PyTree],
    dropout_key: Array | None = None,
) -> PyTree:  # fmt: skip
    """u(x, t, s) of a flow-map network: its velocity when it is asked with cond["s"] = s `[B]`."""
    prediction = denoiser(x, t, {**cond, "s": s}, dropout_key)
    return endpoint_velocity(denoiser.schedule, prediction, t)


def path_velocity(schedule: PyTree, x0: PyTree, eps: PyTree, t: Array) -> PyTree:
    """alpha' x0 + sigma' eps: the velocity of the path through these endpoints."""
    return endpoint_velocity(schedule, Prediction(x0, eps), t)


def _guided(
    denoiser: Network, x: PyTree, t: Array, cond: dict[str, PyTree], v: PyTree, guidance: float,
    mix: float, null: PyTree,
) -> PyTree:  # fmt: skip
    """v mixed with the network's own velocities; v where the condition is null."""
    if not null:
        raise UserError(
            f"meanflow: guidance={guidance} and mix={mix} given, but there is no null condition; "
            "guidance needs labels, some of which are dropped."
        )
    without = with_null(cond, null)
    velocity = lambda c: jax.lax.stop_gradient(average_velocity(denoiser, x, t, t, c))
    u_null = velocity(without)
    u_cond = velocity(cond) if mix else u_null
    same = [jnp.all((cond[name] == without[name]).reshape(len(t), -1), 1) for name in null]
    dropped = jnp.all(jnp.stack(same), 0)

    def blend(v: Array, u_cond: Array, u_null: Array) -> Array:
        mixed = guidance * v + mix * u_cond + (1.0 - guidance - mix) * u_null
        return jnp.where(expand(dropped, v), v, mixed)

    return jax.tree.map(blend, v, u_cond, u_null)
