"""The phi functions of exponential integrators, and the weights of a step built from them.

With lambda = log(alpha / sigma) and a step of length h in it, the probability-flow ODE is exactly

    x_s = (sigma_s / sigma_t) x_t + alpha_s h int_0^1 exp(-h (1 - u)) x0(u) du
        = (alpha_s / alpha_t) x_t - sigma_s h int_0^1 exp(h (1 - u)) eps(u) du

where u in [0, 1] runs over the step (Lu et al. 2022, 2206.00927 and 2211.01095). Let y be x0 and
z = -h, or y be eps and z = h. A y frozen at its start gives DDIM, alpha_s x0 + sigma_s eps, in
both; what y changes along the step adds

    -lead z sum_j w_j (y_j - y),        lead = alpha_s for x0, sigma_s for eps,

with y_j the predictions at the nodes u_j: past steps (u < 0), inner stages or the end (u = 1).
int_0^1 exp(z (1 - u)) u^k du = k! phi_{k+1}(z): interpolating polynomials have closed weights.
"""

import math

import jax.numpy as jnp

from jdiff.pytree import Array


def phis(z: Array, n: int) -> list[Array]:
    """[phi_1(z), ..., phi_n(z)], phi_k(z) = sum_i z^i / (i + k)!, to rounding for any real z.

    phi_1 = (exp(z) - 1) / z and phi_{k+1} = (phi_k - 1 / k!) / z. That recurrence loses k digits
    near 0, where it is run downwards from the series of phi_n. z = -inf gives 0.
    """
    small = jnp.abs(z) < 1.0
    near, far = jnp.where(small, z, 0.0), jnp.where(small, 1.0, z)  # no NaN in the other branch
    series = jnp.zeros_like(near)
    for i in reversed(range(18)):  # 1 / 19! is below float64's rounding
        series = series * near + 1.0 / math.factorial(i + n)
    down = [series]
    for k in reversed(range(1, n)):
        down.insert(0, near * down[0] + 1.0 / math.factorial(k))
    up = [jnp.expm1(far) / far]
    for k in range(1, n):
        up.append((up[-1] - 1.0 / math.factorial(k)) / far)
    return [jnp.where(small, a, b) for a, b in zip(down, up)]


def adams(z: Array, nodes: list[Array]) -> list[Array]:
    """Weights of y_j - y for the polynomial through y at u = 0 and y_j at the nodes, integrated.

    Exact where y is a polynomial in lambda of as high a degree as there are nodes, so a step has
    order len(nodes) + 1. The nodes differ from each other and from 0.
    """
    moments = [math.factorial(k) * phi for k, phi in enumerate(phis(z, len(nodes) + 1))]
    weights = []
    for j, node in enumerate(nodes):
        others = nodes[:j] + nodes[j + 1 :]
        poly, scale = [jnp.ones_like(node)], node  # prod (u - u_i), lowest power first
        for other in others:
            shifted = [jnp.zeros_like(node), *poly]
            poly = [a - other * b for a, b in zip(shifted, [*poly, jnp.zeros_like(node)])]
            scale = scale * (node - other)
        weights.append(sum(c * moments[k + 1] for k, c in enumerate(poly)) / scale)
    return weights


def midpoint(z: Array, nodes: list[Array]) -> list[Array]:
    """The weight of one node that takes y at the middle of the step: phi_1 / (2 u). Order 2."""
    (node,) = nodes
    return [phis(z, 1)[0] / (2.0 * node)]
