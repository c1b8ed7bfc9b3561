"""Composing several models by their energies: products, negations and mixtures of experts."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.denoisers import as_denoiser, schedule_of
from jdiff.errors import UserError
from jdiff.guidance.autoguidance import same_schedule
from jdiff.guidance.base import Guided, refuse_pure_noise, weighted
from jdiff.guidance.scales import as_scale, hide, read
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, expand, struct
from jdiff.schedules import Schedule, schedule_map
from jdiff.solvers.base import safe_ratio


class Experts(Guided):
    """Several denoisers on one schedule."""

    experts: tuple[Any, ...]

    @property
    def schedule(self) -> PyTree:
        """The first schedule that an expert carries."""
        found = (getattr(expert, "schedule", None) for expert in self.experts)
        return next((s for s in found if s is not None), None)


@struct
class Product(Experts):
    """The denoiser that `product` makes."""

    experts: tuple[Any, ...]
    weights: tuple[Any, ...]
    base: Any

    def __call__(self, x: PyTree, t: Array, cond: PyTree = None) -> Prediction:
        """One call of each expert, and of the base."""
        t = broadcast_time(t, x)
        cond = dict(cond or {})
        w = [read(weight, self.schedule, t, cond) for weight in self.weights]
        shown = hide(cond, *self.weights)
        e = [expert(x, t, shown) for expert in self.experts]
        if self.base is not None:
            return weighted([*e, self.base(x, t, shown)], [*w, 1.0 - sum(w)])
        total = weighted(e, w)

        # eps = sum w_i eps_i, and x0 = (x - sigma eps) / alpha: what sum w_i x0_i lacks.
        def x0(s: Schedule, x: Array, x0: Array) -> Array:
            return x0 + expand(safe_ratio(1.0 - sum(w), s.alpha(t)), x) * x

        return total._replace(x0=schedule_map(x0, schedule_of(self), x, total.x0))


@struct
class Union(Experts):
    """The denoiser that `union` makes."""

    experts: tuple[Any, ...]
    weights: Array
    log_densities: tuple[Any, ...] | None

    def __call__(self, x: PyTree, t: Array, cond: PyTree = None) -> Prediction:
        """The experts' predictions, averaged by responsibility."""
        t = broadcast_time(t, x)
        r = jax.nn.softmax(self._terms(x, t, cond), axis=0)
        return weighted([expert(x, t, cond) for expert in self.experts], list(r))

    def log_density(self, x: PyTree, t: Array, cond: PyTree = None) -> Array:
        """log p_t(x) `[B]` of the mixture, in nats."""
        return jax.nn.logsumexp(self._terms(x, broadcast_time(t, x), cond), axis=0)

    def _terms(self, x: PyTree, t: Array, cond: PyTree) -> Array:
        """log(w_i p_i(x)) `[n, B]`."""
        logs = self.log_densities or tuple(expert.log_density for expert in self.experts)
        log_w = jnp.log(self.weights / jnp.sum(self.weights))
        return jnp.stack([w + log(x, t, cond) for w, log in zip(log_w, logs)])


def product(experts: Sequence[Any], weights: Sequence[Any], base: Any = None) -> Product:
    """The product of experts: score = s_base + sum_i w_i (s_i - s_base), or sum_i w_i s_i.

    With a base, p_base prod_i (p_i / p_base)^w_i: experts' agreement beyond what they share (Liu
    et al. 2022, 2206.01714), consistent at every noise level. Without one,
    prod_i p_i^w_i (Du et al. 2023, 2302.11552). A negative weight is a negation: away
    from that expert. Equal experts whose weights sum to one are the model.

    These are the scores of products of *noised* densities, not those of the noised product: reverse
    diffusion lands near the product but does not sample it; add corrector steps (Langevin) at each
    level for that.

    Args:
      experts: denoisers on one schedule, called with the same cond; `fixed(...)` gives one its own.
      weights: one an expert: a number, `[B]`, `per_sample(...)` or one of `guidance.scales`.
      base: the unconditional denoiser.

    Raises:
      UserError: as many weights as experts are needed, different schedules, no schedule; or no
        base, weights that do not sum to one and a schedule with alpha = 0, where such a product has
        no x0.
    """
    made = _checked("product", experts, weights)
    scales = tuple(as_scale(w) for w in weights)
    if base is not None:
        base = as_denoiser(base)
        same_schedule("product: base", made[0], base)
    guided = Product(made, scales, base)
    if base is None:
        schedule = schedule_of(guided, where="product")
        plain = all(isinstance(w, float) for w in scales)
        if not (plain and abs(sum(scales) - 1.0) < 1e-6):
            refuse_pure_noise("product", schedule, "give base=, or weights that sum to one")
    return guided


def union(
    experts: Sequence[Any], weights: Sequence[float],
    log_densities: Sequence[Callable[..., Array]] | None = None,
) -> Union:  # fmt: skip
    """The mixture of experts: p = sum_i w_i p_i, score = sum_i r_i s_i, r_i ~ w_i p_i(x_t).

    Exact at every noise level (mixing and noising commute), where the experts' log-densities are
    (Du et al. 2023: energies by logsumexp). `union(...).log_density` is its own.

    Args:
      experts: denoisers on one schedule, called with the same cond.
      weights: one an expert, positive; they need not sum to one.
      log_densities: (x, t `[B]`, cond) -> log p_t(x) `[B]` in nats, one an expert; the experts' own
        `log_density` unless given.

    Raises:
      UserError: as many weights (and log-densities) as experts are needed, all positive; an expert
        without log-density; different schedules.
    """
    made = _checked("union", experts, weights)
    if any(isinstance(w, int | float) and not w > 0 for w in weights):
        raise UserError(f"union: weights={list(weights)} given; they are positive.")
    if log_densities is None:
        for i, expert in enumerate(made):
            if not hasattr(expert, "log_density"):
                raise UserError(
                    f"union: expert {i} ({type(expert).__name__}) has no log_density; give "
                    "log_densities=, one an expert."
                )
    elif len(log_densities) != len(made):
        raise UserError(f"union: {len(log_densities)} log_densities for {len(made)} experts.")
    else:
        log_densities = tuple(as_denoiser(log) for log in log_densities)
    return Union(made, jnp.stack([jnp.asarray(w, float) for w in weights]), log_densities)


def _checked(where: str, experts: Sequence[Any], weights: Sequence[Any]) -> tuple[Any, ...]:
    if len(experts) != len(weights) or not experts:
        raise UserError(
            f"{where}: {len(weights)} weights for {len(experts)} experts; give one an expert, at "
            "least one."
        )
    made = tuple(as_denoiser(expert) for expert in experts)
    for i, expert in enumerate(made[1:], 1):
        same_schedule(f"{where}: expert {i}", made[0], expert)
    return made
