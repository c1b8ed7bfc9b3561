"""Samplers of networks that jump, with exact jumps: any number of steps ends at the same place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import SCHEDULES, x64

from jdiff import grids, sample, schedules, solvers
from jdiff.errors import UserError
from jdiff.predictions import Prediction, from_x0

KEY = jax.random.key(0)
M, V = 0.7, 0.09  # data N(M, V): along a trajectory (x - alpha M) / spread is constant


def flow(s, x, t, to):
    spread = lambda t: jnp.sqrt(s.alpha(t) ** 2 * V + s.sigma(t) ** 2)[:, None]
    mean = lambda t: (s.alpha(t) * M)[:, None]
    return mean(to) + spread(to) / spread(t) * (x - mean(t))


def flow_map(s):
    """The exact map from t to cond["s"], as the two ends of the line through both points."""

    def denoise(x, t, cond):
        to = cond["s"]
        y = flow(s, x, t, to)
        rows = jnp.stack([s.alpha(t), s.sigma(t), s.alpha(to), s.sigma(to)])[..., None]
        a, b, c, d = rows  # x = a x0 + b eps, y = c x0 + d eps
        det = a * d - b * c
        return Prediction((d * x - b * y) / det, (a * y - c * x) / det)

    return denoise


@pytest.mark.parametrize("name", ["rectified_flow", "edm"])
@x64
def test_an_exact_flow_map_ends_on_its_trajectory_in_one_step_or_many(name):
    s = SCHEDULES[name]()
    x = s.sigma(jnp.asarray(s.t_max)) * jnp.linspace(-2.0, 2.0, 5)[:, None]
    each = lambda t: jnp.full(5, t)
    expected = flow(s, x, each(s.t_max), each(s.t_data))
    for steps in (1, 2, 4):
        times = grids.uniform(s, steps)
        found = sample(KEY, flow_map(s), schedule=s, x=x, times=times, solver=solvers.flow_map())
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_network_is_told_where_each_step_ends_the_data_included():
    s, seen = schedules.rectified_flow(), []

    def spy(x, t, cond):
        jax.debug.callback(lambda *a: seen.append(a), t, cond["s"], cond["label"], ordered=True)
        return Prediction(x, x)

    cond = {"label": jnp.array([3, 4])}
    sample(KEY, spy, schedule=s, shape=(1,), times=grids.uniform(s, 2), cond=cond,
           solver=solvers.flow_map()).block_until_ready()  # fmt: skip
    jax.effects_barrier()
    assert [(t.tolist(), s.tolist()) for t, s, _ in seen] == [
        ([1.0, 1.0], [0.5, 0.5]), ([0.5, 0.5], [0.0, 0.0]),
    ]  # fmt: skip
    assert seen[0][2].tolist() == [3, 4]


@pytest.mark.parametrize("name", ["cosine", "vp_linear", "ddpm_linear"])
def test_a_flow_map_refuses_a_curved_schedule(name):
    s = SCHEDULES[name]()
    with pytest.raises(UserError, match=f"flow_map: {type(s).__name__} given; .* rectified_flow"):
        sample(KEY, flow_map(s), schedule=s, shape=(1,), times=grids.uniform(s, 2),
               solver=solvers.flow_map())  # fmt: skip


@pytest.mark.parametrize("name", ["edm", "cosine"])
def test_an_exact_consistency_function_keeps_the_datas_distribution(name):
    s = SCHEDULES[name]()
    jump = lambda x, t, cond: from_x0(s, x, flow(s, x, t, jnp.zeros_like(t)), t)
    n = 40_000
    for times in ([s.t_max, 0.0], [s.t_max, s.time(0.0), s.time(4.0), 0.0]):
        x = sample(KEY, jump, schedule=s, shape=(1,), num=n, times=jnp.asarray(times),
                   solver=solvers.consistency())  # fmt: skip
        assert abs(x.mean() - M) < 5 * (V / n) ** 0.5
        assert abs(x.var() / V - 1) < 5 * (2 / n) ** 0.5


def test_consistency_sampling_renoises_what_it_predicts():
    """Of a point of data: alpha_s m + sigma_s z with new z, and the point at the end."""
    s, m, n = schedules.cosine(), 0.3, 20_000
    times = jnp.asarray([s.t_max, 0.6, 0.3, 0.0])
    x, path = sample(
        KEY, lambda x, t, cond: from_x0(s, x, jnp.full_like(x, m), t), schedule=s, shape=(1,),
        num=n, times=times, solver=solvers.consistency(), observe=_states,
    )  # fmt: skip
    np.testing.assert_array_equal(x, np.float32(m))
    z = (path[1:, :, 0] - m * s.alpha(times[1:3])[:, None]) / s.sigma(times[1:3])[:, None]
    np.testing.assert_allclose(z.mean(1), 0.0, atol=0.04)
    np.testing.assert_allclose(z.std(1), 1.0, atol=0.03)
    assert abs(np.corrcoef(z)[0, 1]) < 0.03


def _states(x, t, prediction):
    return x
