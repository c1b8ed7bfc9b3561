"""Reflow: the pairs of a Gaussian's flow, and the straight flow between them."""

import jax
import jax.numpy as jnp
import numpy as np
from closed_forms import x64
from exact_flow import M, V, denoiser, network

from jdiff import grids, losses, schedules, solvers
from jdiff.losses.reflow import ends

KEY = jax.random.key(0)
FLOW = schedules.rectified_flow()


def sampler(steps):
    return denoiser(FLOW), solvers.heun(), grids.uniform(FLOW, steps)


@x64
def test_the_pairs_are_those_of_the_flow():
    """From N(0, 1) to N(M, V) the flow is x0 = M + sqrt(V) eps."""
    eps = jnp.linspace(-2.0, 2.0, 5)[:, None]
    errors = [
        float(jnp.abs(jax.jit(ends)(KEY, sampler(n), eps) - (M + V**0.5 * eps)).max())
        for n in (64, 128)
    ]
    assert errors[1] < 2e-3
    assert errors[1] < errors[0] / 1.8  # the last step, to the data, is of first order


@x64
def test_the_straight_flow_between_the_pairs_has_no_loss_and_any_other_has():
    """At (1 - t) (M + sqrt(V) eps) + t eps = x the line's velocity is eps - x0."""

    def straight(params, x, t, cond):
        t = t[:, None]
        eps = (x - (1 - t) * M) / ((1 - t) * V**0.5 + t)
        return eps - (M + V**0.5 * eps) + params["b"]

    x0 = jnp.zeros((64, 1))

    @jax.jit
    def of(b, eps=None):
        student = network(straight, FLOW, "velocity", {"b": b})
        return losses.reflow(KEY, student, x0, sampler=sampler(128), eps=eps)

    assert of(0.0).max() < 1e-4
    np.testing.assert_allclose(of(0.5), 0.25, rtol=0.1)
    curved = losses.flow_matching(KEY, network(straight, FLOW, "velocity", {"b": 0.0}), x0 + M)
    assert curved.mean() > 0.05  # of endpoints that the flow does not join
    same = of(0.0, eps=jnp.ones((64, 1)))
    assert same.max() < 1e-4
