"""ER-SDE-Solvers (Cui et al. 2023, 2309.06169): a free noise scale phi(r) of r = sigma / alpha.

The extended reverse SDE whose linear part is solved by phi reads exactly, in y = x / alpha,

    y_s = (phi_s / phi_t) y_t + phi_s int_{r_s}^{r_t} phi'(r) / phi(r)^2 x0(r) dr
          + sqrt(r_s^2 - (r_t phi_s / phi_t)^2) z,

phi(r) = r being the ODE and r^2 the reverse SDE. With kappa(r) = phi(r) / r, k = kappa_s / kappa_t:

    x_s = alpha_s x0 + sigma_s (k eps + sqrt(1 - k^2) z) + alpha_s (c1 r_s x0' + c2 r_s^2 x0''),
    c1 = int_0^h g dv,  c2 = int_0^h (e^v - e^h) g dv,  g(v) = kappa_s / kappa(r_s e^v) - e^v,

the paper's Taylor expansion in r with its two integrals in one, over v = log(r / r_s).
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jdiff.errors import UserError, choose, not_negative
from jdiff.noise import Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, static, struct
from jdiff.schedules import Schedule, schedule_map
from jdiff.solvers.base import safe_ratio
from jdiff.solvers.multistep import History, Multistep, nodes_of, remember

#: log kappa(r) of the paper's noise scales (its section 4 and appendix A.8), by name.
SCALES: dict[str, Callable[[Array], Array]] = {
    "ode": jnp.zeros_like,
    "sde": jnp.log,
    "er_sde_1": lambda r: jnp.log(jnp.exp(-1.0 / r) + 10.0),
    "er_sde_2": lambda r: 0.5 * jnp.log(r),
    "er_sde_3": lambda r: 1.5 * jnp.log(r),
    "er_sde_4": lambda r: jnp.log(jnp.log10(1.0 + 100.0 * r**1.5)) - 0.1 * jnp.log(r),
    "er_sde_5": lambda r: jnp.logaddexp(r**0.3, np.log(10.0)),
}

_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(16)


@struct
class ERSDE(Multistep):
    """One to three terms of the expansion, one evaluation a step.

    Attributes:
      s_noise: a factor on the noise; 1 keeps the marginals.
      terms: how many: 1 freezes x0.
      scale: the log of kappa, a name in `SCALES` or a function of r.
      slope: where the difference for x0' is centred; see `er_sde`.
    """

    s_noise: Array | float = 1.0
    terms: int = static(3)
    scale: str | Callable[[Array], Array] = static("er_sde_5")
    slope: str = static("at_t")

    @property
    def order(self) -> int:
        """The weak order; with "ode", all terms count."""
        published = self.terms == 3 and self.slope == "published"
        return min(self.terms, 3 if self.scale == "ode" and not published else 2)

    @property
    def length(self) -> int:
        """Earlier predictions kept."""
        return self.terms - 1

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: History, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, History, Prediction]:  # fmt: skip
        """The module's formula."""
        prediction = denoise(x, broadcast_time(t, x), cond)

        def update(sched: Schedule, x0: Array, eps: Array, z: Array, *earlier: Array) -> Array:
            keep = self._keep(sched, t, s)
            up = self.s_noise * jnp.sqrt(1.0 - keep**2)
            x_next = sched.alpha(s) * x0 + sched.sigma(s) * (keep * eps + up * z)
            for c, value in zip(self.coefficients(sched, memory, t, s), earlier):
                x_next = x_next + c * (value - x0)
            return x_next

        z = noise.between(x, t, s)
        x_next = schedule_map(update, schedule, *prediction[:2], z, *memory.values)
        return x_next, remember(memory, prediction.x0, t), prediction

    def coefficients(self, sched: Schedule, history: History, t: Array, s: Array) -> list[Array]:
        """The weights of the earlier x0 minus the present one, in the module's last term."""
        nodes = nodes_of(sched, s, t, history.times, history.count)
        h, zero = nodes.h, jnp.zeros_like(nodes.h)
        v = 0.5 * h * (jnp.asarray(_POINTS, h.dtype) + 1.0)
        ratio = sched.sigma_ratio(s)
        kappa = self._log_kappa(ratio) - self._log_kappa(ratio * jnp.exp(v))
        dv = 0.5 * h * jnp.asarray(_WEIGHTS, h.dtype) * (jnp.exp(kappa) - jnp.exp(v))
        c1, c2 = jnp.sum(dv), jnp.sum((jnp.exp(v) - jnp.exp(h)) * dv)
        # In units of r_s, r is 1 at s, exp(h) at t and exp(h (1 - u)) at the node u.
        r = [jnp.exp(h), *(jnp.exp(h * (1.0 - u)) for u in nodes.at)]
        chosen = [zero] * self.length
        if nodes.at:  # x0' = (x0_1 - x0) / (r_1 - r_0)
            first = safe_ratio(c1, r[1] - r[0])
            chosen = [jnp.where(nodes.usable[0], first, zero), *chosen[1:]]
        if len(nodes.at) > 1:
            # x0'' = 2 x0[0, 1, 2], and at t itself x0' = x0[0, 1] + (r_0 - r_1) x0[0, 1, 2].
            bend = 2.0 * c2 + (c1 * (r[0] - r[1]) if self.slope == "at_t" else 0.0)
            one = safe_ratio(bend, (r[1] - r[0]) * (r[1] - r[2]))
            two = safe_ratio(bend, (r[2] - r[0]) * (r[2] - r[1]))
            usable = nodes.usable[1]
            chosen = [chosen[0] + jnp.where(usable, one, zero), jnp.where(usable, two, zero)]
        return [sched.alpha(s) * jnp.where(h > 0, c, zero) for c in chosen]

    def _keep(self, sched: Schedule, t: Array, s: Array) -> Array:
        """k, at most 1: more would need a negative variance. 0 where there is nothing to keep."""
        at_s, at_t = (self._log_kappa(sched.sigma_ratio(a)) for a in (s, t))
        return jnp.clip(jnp.nan_to_num(jnp.exp(at_s - at_t), nan=0.0), 0.0, 1.0)

    def _log_kappa(self, r: Array) -> Array:
        return SCALES[self.scale](r) if isinstance(self.scale, str) else self.scale(r)


def er_sde(
    terms: int = 3, scale: str | Callable[[Array], Array] = "er_sde_5",
    s_noise: Array | float = 1.0, slope: str = "at_t",
) -> ERSDE:  # fmt: skip
    """ER-SDE-Solver-1, 2 or 3 (2309.06169, algorithms 1 to 3), weak order 1 or 2.

    One evaluation a step. The third term lowers the error; it raises the order on the ODE alone.

    Args:
      terms: of the expansion of x0 in sigma / alpha, 1 to 3.
      scale: the noise scale phi(r): "ode" (r), "sde" (r^2, `ddpm` for one term), "er_sde_1" (r
        (exp(-1 / r) + 10)), "er_sde_2" (r^1.5), "er_sde_3" (r^2.5), "er_sde_4" (r^0.9 log10(1 + 100
        r^1.5)) or "er_sde_5" (r (exp(r^0.3) + 10), which the paper recommends). Or a function of
        r that gives log(phi(r) / r), rising with r; a new function compiles anew.
      s_noise: a factor on the noise; 1 keeps the marginals.
      slope: "at_t", or "published": algorithm 3 takes the difference quotient to the step before
        as x0' at t, half a step late, so that its third term does not raise the order above 2.

    Raises:
      UserError: other terms, scale or slope; a negative s_noise.
    """
    if terms not in (1, 2, 3):
        raise UserError(f"er_sde: terms={terms} given; allowed are 1, 2, 3.")
    if not callable(scale):
        choose("er_sde scale", scale, SCALES)
    not_negative("er_sde", s_noise=s_noise)
    return ERSDE(s_noise, terms, scale, choose("er_sde slope", slope, ("at_t", "published")))
