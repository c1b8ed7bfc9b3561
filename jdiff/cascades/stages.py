"""A stage of a cascade: a denoiser with all that its sampling needs."""

from typing import Any

import jax

from jdiff.cascades.augmentations.gaussian import Gaussian
from jdiff.cascades.low_res import LowRes
from jdiff.denoisers import as_denoiser, schedule_of
from jdiff.errors import UserError
from jdiff.pytree import Array, PyTree, static, struct
from jdiff.sampling import checked_times, sample
from jdiff.solvers import Solver, heun

_AUGMENT = (1 << 31) - 2  # folded into a sample's key; apart from the numbers of steps


@struct
class Stage:
    """The stage that `stage` makes.

    Attributes:
      denoiser: guided or not.
      schedule: its own, or what was given.
      times: falling, `[n + 1]`.
      solver: from `solvers`.
      low_res: its low-resolution input; None for the base.
      level: of the input's augmentation, in sampling; None for the base.
      shape: (H, W, C) of its images.
      truncate: whether the stage before stops at `level` in place of noise being added.
      batch: the most images that it samples at a time.
    """

    denoiser: Any
    schedule: PyTree
    times: Array
    solver: Solver
    low_res: LowRes | None
    level: PyTree
    shape: tuple[int, int, int] = static()
    truncate: bool = static(False)
    batch: int | None = static(None)

    @property
    def name(self) -> str:
        """Height x width, for messages."""
        return f"{self.shape[0]} x {self.shape[1]}"

    def augmentation_keys(self, key: Array, ids: Array) -> Array:
        """`[B]` keys of the input's augmentation, of the samples `ids` drawn with `key`."""
        one = lambda i: jax.random.fold_in(jax.random.fold_in(key, i), _AUGMENT)
        return jax.vmap(one)(ids)

    def draw(
        self, key: Array, ids: Array, small: Array | None = None, cond: PyTree = None,
        times: Array | None = None, *, noisy: bool = False,
    ) -> Array:  # fmt: skip
        """One batch of images `[B, H, W, C]`; a function for jit.

        Args:
          key: of the stage; sample i depends on it and ids[i] alone.
          ids: `[B]` integers.
          small: `[B, h, w, C]`, for all but the base.
          cond: a tree of `[B, ...]` for the denoiser.
          times: another grid: one that ends above the data gives the noisy state there.
          noisy: `small` is augmented already.
        """
        entries: dict[str, Array] = {}
        if self.low_res is not None:
            low = self.low_res
            keys = self.augmentation_keys(key, ids)
            entries = (
                low.told(small, self.level) if noisy else low.condition(keys, small, self.level)
            )
            cond = {**(cond or {}), **entries}
        x = sample(
            key, self.denoiser, times=self.times if times is None else times, shape=self.shape,
            cond=cond, schedule=self.schedule, solver=self.solver, ids=ids,
        )  # fmt: skip
        return x if self.low_res is None else self.low_res.finish(x, entries)


def stage(
    denoiser: Any, *, times: Array, shape: tuple[int, int, int], solver: Solver | None = None,
    low_res: LowRes | None = None, level: PyTree = None, truncate: bool = False,
    batch: int | None = None, schedule: PyTree = None,
) -> Stage:  # fmt: skip
    """A stage of a cascade: the arguments of `sample`, and the low-resolution input.

    Args:
      denoiser: (x, t `[B]`, cond) -> Prediction: guided or not; of the residual if the input says
        so. It is told cond["low_res"] `[B, h, w, C]` and, of most augmentations, cond["aug_level"]
        `[B]`.
      times: falling times `[n + 1]`, from `grids`.
      shape: (H, W, C) of its images.
      solver: `solvers.heun()` unless given.
      low_res: the low-resolution input it was trained with; None for the base.
      level: of the input's augmentation in sampling. An augmentation that the network is told of
        needs one; others are left out unless one is given.
      truncate: the stage before stops at time `level` and hands over its noisy state, in place of
        noise being added to its image (the truncated augmentation of Ho et al. 2022, section 4.2).
      batch: the most images at a time.
      schedule: the denoiser's own unless given.

    Raises:
      UserError: a missing schedule or level, a level that training did not have, an input that does
        not divide the shape, times or a solver that do not fit the schedule.

    >>> base = stage(denoise_8, times=grids.karras(schedule, 18), shape=(8, 8, 3))
    >>> up = stage(denoise_16, times=grids.karras(schedule, 18), shape=(16, 16, 3), level=0.2,
    ...            low_res=low_res(2, augmentations.gaussian()))
    """
    shape = _shape(shape)
    where = f"stage {shape[0]} x {shape[1]}"
    denoiser = as_denoiser(denoiser)
    schedule = schedule_of(denoiser, schedule, where=where)
    solver = heun() if solver is None else solver
    if not isinstance(solver, Solver):
        given = getattr(solver, "__name__", repr(solver))
        raise UserError(f"{where}: solver={given} is not a solver; call one, e.g. solvers.heun().")
    if batch is not None and batch < 1:
        raise UserError(f"{where}: batch={batch} given; it is at least 1.")
    if low_res is None and (level is not None or truncate):
        field = "truncate" if level is None else "level"
        raise UserError(f"{where}: {field} is of the low-resolution input; give low_res= too.")
    try:
        times = checked_times(times, schedule, solver, denoiser)
        if low_res is not None:
            _check_input(low_res, shape, truncate)
            level = low_res.augmentation.at(level)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Stage(
        denoiser, schedule, times, solver, low_res, level, shape, bool(truncate), batch
    )  # fmt: skip


def _check_input(low_res: LowRes, shape: tuple[int, int, int], truncate: bool) -> None:
    if not isinstance(low_res, LowRes):
        given = getattr(low_res, "__name__", repr(low_res))
        raise UserError(f"low_res={given} is no low-resolution input; give low_res(factor, ...).")
    low_res.small(shape)
    if truncate and not isinstance(low_res.augmentation, Gaussian):
        raise UserError(
            f"truncate: the augmentation {low_res.augmentation.name} is not the forward "
            "process of the stage before; only `gaussian` is."
        )


def _shape(shape: Any) -> tuple[int, int, int]:
    whole = isinstance(shape, tuple | list) and all(isinstance(n, int) and n > 0 for n in shape)
    if not whole or len(shape) != 3:
        raise UserError(f"stage: shape={shape!r} given; (height, width, channels) is needed.")
    return tuple(shape)
