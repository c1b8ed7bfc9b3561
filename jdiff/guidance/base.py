"""What every guidance shares: the wrapped denoiser, the pair it extrapolates, and joint calls.

A guidance that extrapolates is two things: where its pair comes from (`Extrapolation.pair`: a null
condition, a worse network, a perturbed one) and what is done with the pair (`guide`: bad + w (good
- bad), unless a `Refinement` changes the pair on the way in or the result on the way out). Every
source works with every refinement:

    rescale(apg(cfg(denoise, 7.5, null), norm=15.0), 0.7)

is called from the outside in on the pair, and from the inside out on the result.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdiff.errors import UserError, choose
from jdiff.guidance.scales import acts, hide
from jdiff.predictions import Parameterization, Prediction, from_x0
from jdiff.pytree import Array, PyTree, broadcast_time, expand, is_concrete, stack, unstack
from jdiff.schedules import is_schedule

_TARGETS = ("x0", "eps", "v", "velocity", "score")


class Pair(NamedTuple):
    """What is extrapolated, from bad through good; w is a number or `[B]`, 1 being good itself."""

    bad: Prediction
    good: Prediction
    w: Array | float


class Guided:
    """A denoiser made from another: it carries the schedule of the one inside."""

    denoiser: Any

    @property
    def schedule(self) -> PyTree:
        """The wrapped denoiser's schedule, or None."""
        return getattr(self.denoiser, "schedule", None)


class Extrapolation(Guided):
    """A guidance that evaluates a pair of predictions and extrapolates; defines `pair`."""

    scale: Any

    def acts(self, t: Array) -> Array | None:
        """Whether it changes any prediction at times t `[B]`; None where only the pair can tell."""
        return acts(self.scale, self.schedule, t)

    def alone(self, x: PyTree, t: Array, cond: PyTree) -> Prediction:
        """The good prediction, without the call that makes the bad one."""
        return self.denoiser(x, t, hide(dict(cond or {}), self.scale))

    def pair(self, x: PyTree, t: Array, cond: PyTree) -> Pair:
        """The two predictions at x `[B, ...]`, t `[B]`, and the scale: all network calls."""
        raise NotImplementedError  # abstract

    def guide(self, x: PyTree, t: Array, pair: Pair) -> Prediction:
        """The guided prediction, from the pair alone."""
        return extrapolate(*pair)

    def __call__(self, x: PyTree, t: Array, cond: PyTree = None) -> Prediction:
        """x `[B, ...]`, t `[B]` or a scalar -> the guided prediction.

        Where no t lies in the interval of `scales.interval`, the good one alone is computed. (Both
        are under vmap over t or over the interval's ends, where a branch is a choice of results.)
        """
        t = broadcast_time(t, x)
        guided = lambda: self.guide(x, t, self.pair(x, t, cond))
        alone = lambda: raised(self.alone(x, t, cond))
        needed = self.acts(t)
        if needed is None:
            return guided()
        if is_concrete(needed):
            return guided() if needed else alone()
        return jax.lax.cond(needed, guided, alone)


class Refinement(Extrapolation):
    """Another extrapolation, with its pair changed on the way in or its result on the way out."""

    denoiser: Extrapolation

    def acts(self, t: Array) -> Array | None:
        """As the guidance inside: of equal predictions, most refinements make the same again."""
        return self.denoiser.acts(t)

    def alone(self, x: PyTree, t: Array, cond: PyTree) -> Prediction:
        """The good prediction of the guidance inside."""
        return self.denoiser.alone(x, t, cond)

    def pair(self, x: PyTree, t: Array, cond: PyTree) -> Pair:
        """The pair of the guidance inside."""
        return self.denoiser.pair(x, t, cond)


def extrapolate(bad: Prediction, good: Prediction, w: Array | float) -> Prediction:
    """bad + w (good - bad), in x0 and eps alike; w is a number or `[B]`. float32 or better.

    Both endpoints are affine in one another at fixed x, and the weights sum to one, so guiding x0,
    eps, v or the score is the same thing, and the result is consistent with x. What else the good
    prediction holds (a learned variance) is kept.

    Raises:
      UserError: the predictions' trees or shapes differ, with the leaf.
    """
    same_trees("extrapolate", good.x0, bad.x0, "the bad prediction")

    def mix(b: Array, g: Array) -> Array:
        dtype = jnp.promote_types(b.dtype, jnp.float32)
        b, g = b.astype(dtype), g.astype(dtype)
        return b + expand(w, b) * (g - b)

    x0, eps = jax.tree.map(mix, (bad.x0, bad.eps), (good.x0, good.eps))
    return good._replace(x0=x0, eps=eps)


def raised(prediction: Prediction) -> Prediction:
    """x0 and eps in float32 or better, as an extrapolation gives them."""
    raise_ = lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32))
    x0, eps = jax.tree.map(raise_, (prediction.x0, prediction.eps))
    return prediction._replace(x0=x0, eps=eps)


def weighted(predictions: list[Prediction], weights: list[Array | float]) -> Prediction:
    """sum_i w_i p_i in x0 and eps alike; each w_i a number or `[B]`. float32 or better.

    Consistent with x where the weights sum to one. What else the first prediction holds is kept.

    Raises:
      UserError: the predictions' trees or shapes differ, with the leaf.
    """
    for i, p in enumerate(predictions[1:], 1):
        same_trees("guidance", predictions[0].x0, p.x0, f"prediction {i}")

    def mix(*leaves: Array) -> Array:
        dtype = jnp.promote_types(leaves[0].dtype, jnp.float32)
        return sum(expand(w, a) * a.astype(dtype) for w, a in zip(weights, leaves))

    x0, eps = jax.tree.map(mix, *[(p.x0, p.eps) for p in predictions])
    return predictions[0]._replace(x0=x0, eps=eps)


def call_together(denoise: Any, x: PyTree, t: Array, conds: list[PyTree]) -> list[Prediction]:
    """One call of `denoise` under n conditions: `[B * n]`, a sample's members side by side."""
    n = len(conds)
    joint = denoise(stack([x] * n), jnp.repeat(t, n), stack(conds))
    return unstack(joint, n)


def refinable(where: str, denoise: Any) -> Extrapolation:
    """`denoise`, if it is a guidance that extrapolates.

    Raises:
      UserError: it is not.
    """
    if not isinstance(denoise, Extrapolation):
        raise UserError(
            f"{where}: it refines a guidance that extrapolates a pair (cfg, autoguidance, ...), "
            f"given {type(denoise).__name__}; e.g. {where}(cfg(denoise, scale, null))."
        )
    return denoise


def check_target(where: str, target: str, schedule: PyTree) -> str:
    """`target`, if guidance can work in that space on this schedule.

    Raises:
      UserError: an unknown target; or one that says nothing of x0 where alpha = 0, as at the start
        of rectified flow.
    """
    choose(f"{where}: target", target, _TARGETS)
    if target in ("eps", "score"):
        refuse_pure_noise(where, schedule, f"target {target!r} does not determine x0 there; use v")
    return target


def refuse_pure_noise(where: str, schedule: PyTree, why: str) -> None:
    """Raises a UserError if a schedule of the tree starts at alpha = 0."""
    for s in jax.tree.leaves(schedule, is_leaf=is_schedule):
        if not is_schedule(s) or not is_concrete(s):
            continue
        with jax.ensure_compile_time_eval():  # a guidance may be made under jit
            alpha = float(s.alpha(s.t_max))
        if not alpha > 0:
            raise UserError(f"{where}: alpha = 0 at t_max of {type(s).__name__}; {why}.")


def to_target(target: str, schedule: PyTree, prediction: Prediction, t: Array) -> PyTree:
    """The prediction as one tree: "x0", "eps", "v", "velocity" or "score". float32 or better."""
    x0, eps = raised(prediction)[:2]
    return x0 if target == "x0" else Parameterization(target).target_of(schedule, x0, eps, t)


def from_target(
    target: str, schedule: PyTree, value: PyTree, x: PyTree, t: Array, like: Prediction
) -> Prediction:
    """The inverse of `to_target`, consistent with x; what else `like` holds is kept."""
    if target == "x0":
        made = from_x0(schedule, x, value, t)
    else:
        made = Parameterization(target).prediction(schedule, value, x, t)
    return like._replace(x0=made.x0, eps=made.eps)


def sum_dims(a: Array) -> Array:
    """The sum over all but the batch axis, kept as axes of size one: `[B, 1, ...]`."""
    return jnp.sum(a, axis=tuple(range(1, a.ndim)), keepdims=True)


def root(square: Array) -> Array:
    """The square root, whose gradient at 0 is 0 and not infinite."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def same_trees(where: str, wanted: PyTree, given: PyTree, name: str) -> None:
    """Raises a UserError that names the first leaf in which `given` differs from `wanted`."""
    shapes = lambda tree: {
        jax.tree_util.keystr(path): jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    a, b = shapes(wanted), shapes(given)
    for leaf in a | b:
        if a.get(leaf) != b.get(leaf):
            label = leaf or "the array"
            raise UserError(
                f"{where}: the trees do not match: {name} has {label} of shape "
                f"{b.get(leaf, 'none')}, {a.get(leaf, 'none')} is needed."
            )
