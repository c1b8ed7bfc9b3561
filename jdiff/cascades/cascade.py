"""A cascade: a base stage and super-resolution stages, sampled as one."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.batching import number, pieces
from jdiff.cascades.stages import Stage
from jdiff.errors import UserError
from jdiff.pytree import Array, PyTree, is_concrete, struct
from jdiff.sampling import checked_times
from jdiff.schedules import is_schedule
from jdiff.schedules.base import real

_SAME = 1e-5  # relative: times and levels this close are one
_SAME_NOISE = 1e-4  # alpha and sigma

#: One compiled program for each stage, and one more for each batch size.
_draw = jax.jit(Stage.draw, static_argnames="noisy")


@struct
class Cascade:
    """The cascade that `cascade` makes: a tuple of stages, from the base to the last.

    Stage k draws with the key fold_in(key, k), its sample i with that and ids[i]: images depend on
    neither the batch nor on how many stages follow. (A stage that stops early for a truncated one
    hands over its noisy state, and that is what it is said to have made.)
    """

    stages: tuple[Stage, ...]

    def sample(
        self, key: Array, cond: PyTree = None, num: int | None = None, *,
        ids: Array | None = None, batch: int | None = None, intermediate: bool = False,
        sharding: jax.sharding.Sharding | None = None,
    ) -> Array | tuple[Array, ...]:  # fmt: skip
        """Draws images `[num, H, W, C]` of the last stage, or a tuple of every stage's.

        Args:
          key: one PRNG key for the whole draw.
          cond: a tree of `[num, ...]` arrays, handed to the denoiser of every stage.
          num: how many; taken from ids or cond where they are given, else 1.
          ids: `[num]` integers that name the samples; 0..num-1 unless given.
          batch: images at a time, from the base to the last stage; the largest of the stages'
            unless given, and all at once if they have none. A stage with a smaller batch of its own
            takes that. The last batch is padded, not recompiled.
          intermediate: return every stage's images.
          sharding: how a batch is laid out over devices, as in `jdiff.sample`.

        Raises:
          UserError: lengths that disagree; what the denoisers refuse.
        """
        parts = list(
            self.stream(
                key, cond, num, ids=ids, batch=batch, intermediate=intermediate, sharding=sharding
            )
        )
        return _joined(parts)

    def stream(
        self, key: Array, cond: PyTree = None, num: int | None = None, *,
        ids: Array | None = None, batch: int | None = None, intermediate: bool = False,
        sharding: jax.sharding.Sharding | None = None,
    ) -> Iterator[Array | tuple[Array, ...]]:  # fmt: skip
        """`sample`, a batch at a time: yields what `sample` would concatenate.

        One batch of images is in memory. The same arguments and errors.
        """
        keys = [jax.random.fold_in(key, k) for k in range(len(self.stages))]
        grids = [self._times(k) for k in range(len(self.stages))]
        batches = self._batches(self.stages, num, batch, sharding, ids=ids, cond=cond)
        for keep, (some, told) in batches:
            made: list[Array] = []
            images = None
            for k, stage in enumerate(self.stages):
                images = _drawn(
                    stage, keys[k], some, images, told, grids[k], sharding, noisy=stage.truncate
                )
                made = [*made, images] if intermediate else []
            yield _kept(tuple(made) if intermediate else images, keep)

    def upsample(
        self, key: Array, k: int, small: Array, cond: PyTree = None, *, ids: Array | None = None,
        batch: int | None = None, sharding: jax.sharding.Sharding | None = None,
    ) -> Array:  # fmt: skip
        """Images of stage k from given small ones, which it augments as in sampling.

        From the images that stage k - 1 made with the same key, cond and ids come those of the
        cascade itself (but for a truncated stage, which augments anew); from true images, how good
        the stage is alone.

        Args:
          k: of the stage, 1 to the last.
          small: `[num, h, w, C]` in about [-1, 1].

        Raises:
          UserError: a stage that has no input, small images of another shape.
        """
        if not 1 <= k < len(self.stages):
            raise UserError(
                f"upsample: k={k} given; stages with a low-resolution input are 1 to "
                f"{len(self.stages) - 1}."
            )
        stage = self.stages[k]
        wanted = stage.low_res.small(stage.shape)
        small = jnp.asarray(small)
        if small.shape[1:] != wanted or not jnp.issubdtype(small.dtype, jnp.floating):
            raise UserError(
                f"upsample: small is {small.dtype} {small.shape}; stage {k} ({stage.name}) takes "
                f"floats [num, {', '.join(map(str, wanted))}]."
            )
        key = jax.random.fold_in(key, k)
        batches = self._batches([stage], None, batch, sharding, ids=ids, cond=cond, small=small)
        return _joined([
            _kept(_drawn(stage, key, some, given, told, stage.times, sharding), keep)
            for keep, (some, told, given) in batches
        ])  # fmt: skip

    def _times(self, k: int) -> Array:
        """The grid of stage k: up to the level of the next if that one is truncated."""
        stage = self.stages[k]
        if k + 1 == len(self.stages) or not self.stages[k + 1].truncate:
            return stage.times
        return _stopped(stage.times, self.stages[k + 1].level)

    @staticmethod
    def _batches(
        stages: Any, num: int | None, batch: int | None, sharding: Any, *, ids: Array | None,
        **given: PyTree,
    ) -> Iterator[tuple[int, tuple]]:  # fmt: skip
        """(how many count, (ids, *given) of a batch), each batch of one size."""
        num = number("cascade", num, ids=ids, **given)
        if batch is None:
            batch = max((s.batch for s in stages if s.batch), default=num)
        if num < 1 or batch < 1:
            raise UserError(f"cascade: num={num} and batch={batch} given; both are at least 1.")
        ids = np.arange(num) if ids is None else ids
        return pieces((ids, *given.values()), num, min(batch, num), sharding)


def cascade(*stages: Stage) -> Cascade:
    """A cascade of stages, from the base to the last (Ho et al. 2022, 2106.15282).

    Raises:
      UserError: two stages that do not fit: the size or the channels of the input, a truncation
        that the stage before cannot do; the stage and the field are named.

    >>> images = cascade(base, up).sample(jax.random.key(0), {"label": labels}, batch=64)
    """
    if not stages:
        raise UserError("cascade: no stages given; cascade(base, up, ...) is needed.")
    for k, stage in enumerate(stages):
        where = f"cascade: stage {k}"
        if not isinstance(stage, Stage):
            raise UserError(f"{where} is a {type(stage).__name__}; make it by `stage(...)`.")
        where = f"{where} ({stage.name})"
        if k == 0:
            if stage.low_res is not None:
                raise UserError(f"{where}: low_res: the first stage has none before it; give None.")
            continue
        before = stages[k - 1]
        if stage.low_res is None:
            raise UserError(
                f"{where}: low_res is missing: after stage {k - 1} ({before.name}) it needs the "
                "input that it was trained with."
            )
        small = stage.low_res.small(stage.shape)
        if small[:2] != before.shape[:2]:
            raise UserError(
                f"{where}: low_res.factor={stage.low_res.factor} makes its input {small[0]} x "
                f"{small[1]}, and stage {k - 1} makes {before.name}."
            )
        if small[2] != before.shape[2]:
            raise UserError(
                f"{where}: shape has {small[2]} channels, and stage {k - 1} ({before.name}) makes "
                f"{before.shape[2]}."
            )
        if stage.truncate:
            try:
                _check_truncation(stage, before)
            except UserError as error:
                raise UserError(f"{where}: truncate: {error}") from error
    return Cascade(tuple(stages))


def _check_truncation(stage: Stage, before: Stage) -> None:
    """Whether the stage before can stop at the level, in the state that the augmentation makes."""
    if before.low_res is not None and before.low_res.residual:
        raise UserError("the stage before makes a residual (low_res.residual), which is no image.")
    if not _same_noise(stage.low_res.augmentation.schedule, before.schedule, stage.level):
        raise UserError(
            "the augmentation's schedule is not that of the stage before, whose state at time "
            f"{stage.level} would stand for it; train with the same schedule, or give "
            "truncate=False."
        )
    if is_concrete((stage.level, before.times)):
        times = _stopped(before.times, stage.level)
        checked_times(times, before.schedule, before.solver, before.denoiser)


def _stopped(times: Array, level: Any) -> Array:
    """The times above `level`, and then `level`.

    Raises:
      UserError: a level that is not a known number, or not within the times.
    """
    if not is_concrete((times, level)):
        raise UserError(
            "cascade: the level of a truncated stage decides how many steps the stage before "
            "takes, so that it must be known; trace or sweep another number."
        )
    values, level = np.asarray(times), float(level)
    if not values[-1] <= level < values[0]:
        raise UserError(
            f"level={level:.6g} lies outside of the times of the stage before, {values[-1]:.6g} to "
            f"{values[0]:.6g}."
        )
    above = values[values > level + _SAME * abs(level)]
    return jnp.asarray(np.append(above, level).astype(values.dtype))


def _same_noise(a: PyTree, b: PyTree, level: Any) -> bool:
    """Whether two schedules have the same alpha and sigma at a level; unknown ones pass."""
    if not (is_schedule(a) and is_schedule(b)):
        return False
    if not is_concrete((a, b, level)):
        return True
    with jax.ensure_compile_time_eval():
        t = real(level)
        ours, theirs = (np.asarray([s.alpha(t), s.sigma(t)]) for s in (a, b))
    return np.allclose(ours, theirs, rtol=_SAME_NOISE, atol=_SAME_NOISE)


def _drawn(
    stage: Stage, key: Array, ids: Array, small: Array | None, cond: PyTree, times: Array,
    sharding: Any, *, noisy: bool = False,
) -> Array:  # fmt: skip
    """A batch of one stage, at most `stage.batch` at a time."""
    num = len(ids)
    batches = pieces((ids, small, cond), num, min(stage.batch or num, num), sharding)
    return _joined([
        _kept(_draw(stage, key, *some, times, noisy=noisy), keep) for keep, some in batches
    ])  # fmt: skip


def _kept(images: PyTree, keep: int) -> PyTree:
    return jax.tree.map(lambda a: a if keep == len(a) else a[:keep], images)


def _joined(parts: list[PyTree]) -> PyTree:
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
