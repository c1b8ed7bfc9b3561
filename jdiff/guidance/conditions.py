"""Several conditions of one network: a scale for each, negatives, and conditions held fixed."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jdiff.denoisers import as_denoiser
from jdiff.errors import UserError, choose
from jdiff.guidance.base import Guided, call_together, weighted
from jdiff.guidance.cfg import replaced
from jdiff.guidance.scales import as_scale, hide, read
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, static, struct


@struct
class Fixed(Guided):
    """The denoiser that `fixed` makes."""

    denoiser: Any
    entries: PyTree

    def __call__(self, x: PyTree, t: Array, cond: PyTree = None) -> Prediction:
        """The wrapped denoiser under its own condition."""
        t = broadcast_time(t, x)
        held = {k: jnp.broadcast_to(v, (len(t), *jnp.shape(v))) for k, v in self.entries.items()}
        return self.denoiser(x, t, {**(cond or {}), **held})


@struct
class Nested(Guided):
    """The denoiser that `nested` makes: `groups` of entries in order, with a scale each."""

    denoiser: Any
    scales: tuple[Any, ...]
    null: PyTree
    groups: tuple[tuple[str, ...], ...] = static()

    def __call__(self, x: PyTree, t: Array, cond: PyTree = None) -> Prediction:
        """One joint call with 0, 1, ..., n groups switched on."""
        t = broadcast_time(t, x)
        cond = dict(cond or {})
        s = [read(scale, self.schedule, t, cond) for scale in self.scales]
        shown = hide(cond, *self.scales, *self.null.values())
        conds = []
        for n in range(len(self.groups) + 1):
            off = [name for group in self.groups[n:] for name in group]
            conds.append(replaced(shown, {name: self.null[name] for name in off}, cond))
        # e_0 + sum_i s_i (e_i - e_{i-1}), collected by e_i; the full condition leads.
        weights = [a - b for a, b in zip([1.0, *s], [*s, 0.0])]
        e = call_together(self.denoiser, x, t, conds[::-1])
        return weighted(e, weights[::-1])


@struct
class Composed(Guided):
    """The denoiser that `composed` makes: conditions in place of the null, with a weight each."""

    denoiser: Any
    weights: tuple[Any, ...]
    terms: tuple[PyTree, ...]
    null: PyTree

    def __call__(self, x: PyTree, t: Array, cond: PyTree = None) -> Prediction:
        """One joint call of the terms and the null."""
        t = broadcast_time(t, x)
        cond = dict(cond or {})
        w = [read(weight, self.schedule, t, cond) for weight in self.weights]
        values = [v for term in (*self.terms, self.null) for v in term.values()]
        shown = hide(cond, *self.weights, *values)
        conds = [replaced(shown, term, cond) for term in (*self.terms, self.null)]
        e = call_together(self.denoiser, x, t, conds)
        return weighted(e, [*w, 1.0 - sum(w)])


def fixed(denoise: Any, entries: dict[str, Any]) -> Fixed:
    """A denoiser with these entries of `cond` held, whatever it is called with.

    Args:
      entries: each the value for one sample, without the batch axis: {"label": 3}.

    >>> either = guidance.product([fixed(d, {"label": 3}), fixed(d, {"label": 7})], [2.0, 2.0], d)
    """
    return Fixed(as_denoiser(denoise), dict(entries))


def nested(
    denoise: Any, scales: dict[str | tuple[str, ...], Any], null: dict[str, PyTree]
) -> Nested:
    """A scale for each condition, switched on one after another.

        e(0, 0) + s_I (e(I, 0) - e(0, 0)) + s_T (e(I, T) - e(I, 0))

    for scales={"image": s_I, "text": s_T}: equation 3 of InstructPix2Pix (Brooks et al. 2023,
    2211.09800), for any number of conditions in the order of `scales`. With all scales equal it is
    cfg over all of them.

    Args:
      scales: by entry of `cond`, or by a tuple of entries that are switched together; each a
        number, `[B]`, `per_sample(...)` or one of `guidance.scales`.
      null: the null value of every entry that scales names.

    Raises:
      UserError: no scales, entries named twice, or others than null's.

    >>> guidance.nested(denoise, {"image": 1.5, "text": 7.5}, {"image": 0.0, "text": empty})
    """
    groups = tuple((g,) if isinstance(g, str) else tuple(g) for g in scales)
    names = [name for group in groups for name in group]
    if not names or len(set(names)) < len(names):
        raise UserError(f"nested: scales name {names}; give every entry once, at least one.")
    for name in names:
        choose("nested: entry of null", name, null)
    for name in null:
        choose("nested: entry of scales", name, names)
    made = tuple(as_scale(s) for s in scales.values())
    return Nested(as_denoiser(denoise), made, dict(null), groups)


def composed(
    denoise: Any, weights: Sequence[Any], terms: Sequence[dict[str, PyTree]],
    null: dict[str, PyTree],
) -> Composed:  # fmt: skip
    """null + sum_i weights_i (term_i - null): several conditions of one network, all at once.

    Composable diffusion (Liu et al. 2022, 2206.01714: AND; a negative weight: NOT),
    in one joint call. Each term replaces entries of `cond`; {} is `cond` as given.

    Args:
      weights: one a term: a number, `[B]`, `per_sample(...)` or one of `guidance.scales`.
      terms: values (or `per_sample(...)`) by entry.
      null: the value of each entry that means "no condition".

    Raises:
      UserError: as many weights as terms are needed.
    """
    if len(weights) != len(terms) or not terms:
        raise UserError(
            f"composed: {len(weights)} weights for {len(terms)} terms; give one a term, at least "
            "one."
        )
    return Composed(
        as_denoiser(denoise), tuple(as_scale(w) for w in weights),
        tuple(dict(term) for term in terms), dict(null),
    )  # fmt: skip


def negative(
    denoise: Any, scale: Any, null: dict[str, PyTree], against: Sequence[dict[str, PyTree]],
    weights: Sequence[Any],
) -> Composed:  # fmt: skip
    """null + scale (conditional - null) - sum_i weights_i (against_i - null).

    Guidance to the condition and away from others, each with a weight of its own. A single
    negative prompt in place of the null is `cfg` with null={"text": negative}.

    Args:
      scale: as of `cfg`.
      against: values (or `per_sample(...)`) by entry, one dictionary a negative.
      weights: one a negative, each a number or `[B]`; `composed` takes scales of every kind.

    Raises:
      UserError: as many weights as negatives are needed, and numbers.
    """
    if len(weights) != len(against):
        raise UserError(f"negative: {len(weights)} weights for {len(against)} conditions.")
    return composed(
        denoise, [scale, *(_minus(w) for w in weights)], [{}, *against], null
    )  # fmt: skip


def _minus(weight: Any) -> Any:
    if callable(getattr(weight, "at", None)):
        raise UserError("negative: weights are numbers or [B]; composed takes scales by name.")
    return -jnp.asarray(weight, float) if jnp.ndim(weight) else -1.0 * weight
