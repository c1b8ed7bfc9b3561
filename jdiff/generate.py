"""Images from runs and cascades: what the command line and the evaluation draw."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jdiff import latents, runs
from jdiff.errors import UserError
from jdiff.parallel import hosts


def images(
    run: runs.Run, *, num: int, labels: np.ndarray | None = None,
    cond: Mapping[str, np.ndarray] | None = None, seed: int = 0, batch: int | None = None,
    sampling: dict[str, Any] | None = None,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Draws `num` images, a batch at a time: uint8 `[B, H, W, C]`. Errors come at the call.

    Of a run on latents they are decoded.

    Image i depends on the seed, i and its conditions alone, not on the batch or the mesh (but for
    the rounding of sums, which may tip a pixel by one level). They are drawn by all devices of the
    run's mesh. Of many processes all have to call, and each gets all images.

    Args:
      run: from `runs.load_run`, with a network that makes images from noise alone.
      labels: int `[num]`; None for a model without labels.
      cond: further entries `[num, ...]` of what the network is told.
      batch: images at a time; config.sampling.batch unless given.
      sampling: replaces entries of config.sampling, see `runs.sampler`.

    Raises:
      UserError: an unknown solver, grid or argument, guidance of a model without labels, or a
        super-resolution stage, which enlarges images (`enlarged`).
    """
    import jax

    from jdiff.sampling import stream

    if run.low_res is not None:
        raise UserError(f"{run.workdir} enlarges images; generate.enlarged gives it some.")
    denoise, solver, times = runs.sampler(run, **(sampling or {}))
    batch = min(num, batch or run.config.sampling.batch)
    show = lambda part: _on_host(latents.decoded(run.autoencoder, part, batch))
    sharding = run.layout and run.layout.batch
    parts = stream(
        jax.random.key(seed), denoise, times=times, shape=tuple(run.info.shape), num=num,
        cond=_cond(labels, cond), solver=solver, batch=batch, sharding=sharding,
    )  # fmt: skip
    return map(show, parts)


class Enlarged(NamedTuple):
    """Some images made smaller, and what a super-resolution stage makes of them; all uint8.

    Attributes:
      small: the input `[B, h, w, C]`.
      large: the input, enlarged as the network enlarges it, `[B, H, W, C]`.
      sample: what the stage generates from it.
      truth: the images themselves.
      row: all that the data hold of them, labels for example.
    """

    small: np.ndarray
    large: np.ndarray
    sample: np.ndarray
    truth: np.ndarray
    row: dict[str, np.ndarray]


#: (small images `[B, h, w, C]` in [-1, 1], cond, ids `[B]`) -> images `[B, H, W, C]`.
Upsample = Callable[..., Any]


def enlarged(
    run: runs.Run, rows: Iterator[dict[str, np.ndarray]], upsample: Upsample, batch: int
) -> Iterator[Enlarged]:
    """Makes real images smaller and a stage enlarge them: its samples of true input.

    Args:
      run: of the stage.
      rows: of `real.rows`, at most `batch` images each.
      upsample: `upsampler(...)`, or a cascade's.
      batch: images at a time; what is missing in the last one is filled up, so that there is one
        program.
    """
    import jax.numpy as jnp

    from jdiff import real
    from jdiff.experiment import to_float

    done = 0
    for row in rows:
        count = len(row["image"])
        fill = lambda a, count=count: jnp.asarray(a)[np.minimum(np.arange(batch), count - 1)]
        truth = fill(row["image"])
        cond = {name: fill(entry) for name, entry in real.conditions(run, row).items()}
        small = run.low_res.shrink(to_float(truth))
        large = run.low_res.enlarge(small, truth.shape[1:])
        sample = upsample(small, cond, done + np.arange(batch))
        found = (_on_host(x)[:count] for x in (small, large, sample))
        yield Enlarged(*found, np.asarray(row["image"]), row)
        done += count


def upsampler(
    run: runs.Run, *, seed: int = 0, sampling: dict[str, Any] | None = None
) -> tuple[Upsample, int]:
    """(a super-resolution run's own upsampling, images at a time).

    Raises:
      UserError: as `images`; or the level of the augmentation is not set.
    """
    from jdiff import staged
    from jdiff.cascades import Cascade

    alone = Cascade((None, staged.stage(run, sampling)))  # what makes its input is not needed
    return cascade_upsampler(alone, 1, run, seed), run.config.sampling.batch


def cascade_upsampler(cascade: Any, k: int, run: runs.Run, seed: int) -> Upsample:
    """The upsampling of stage k of a cascade, whose run it is."""
    import jax

    key, sharding = jax.random.key(seed), run.layout and run.layout.batch

    def upsample(small: Any, cond: dict[str, Any], ids: Any) -> Any:
        return cascade.upsample(key, k, small, cond or None, ids=ids, sharding=sharding)

    return upsample


def cascade_images(
    opened: Any, *, num: int, cond: Mapping[str, np.ndarray] | None = None, seed: int = 0,
    batch: int | None = None, tell: Callable[[int, int], None] = lambda stage, count: None,
) -> Iterator[tuple[np.ndarray, ...]]:  # fmt: skip
    """Draws `num` images with all stages, a batch at a time: a tuple of uint8 `[B, H, W, C]`.

    An image depends on the seed, its number and its conditions alone, at every stage. (A stage
    that stops early for a truncated one after it shows the noisy state that it hands over.)

    Args:
      opened: from `staged.load_cascade`.
      cond: entries `[num, ...]` of what the networks are told, e.g. labels.
      batch: images at a time; the least of the stages' config.sampling.batch unless given.
      tell: called with (stage, images) when a stage has done a batch.
    """
    import jax

    batch = min(num, batch or min(run.config.sampling.batch for run in opened.runs))
    layout = opened.runs[0].layout
    parts = opened.cascade.stream(
        jax.random.key(seed), _cond(None, cond), num, batch=batch, intermediate=True,
        sharding=layout and layout.batch,
    )  # fmt: skip

    def fetched(stages: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
        found = []
        for k, stage in enumerate(stages):  # devices work on the next ones meanwhile
            found.append(_on_host(stage))
            tell(k, len(found[-1]))
        return tuple(found)

    return map(fetched, parts)


def _on_host(part: Any) -> np.ndarray:
    from jdiff.evaluation.features import to_uint8

    return hosts.fetched(to_uint8(part))


def _cond(labels: Any, cond: Mapping[str, np.ndarray] | None) -> dict[str, Any] | None:
    import jax.numpy as jnp

    found = {name: jnp.asarray(entry) for name, entry in (cond or {}).items()}
    if labels is not None:
        found["label"] = jnp.asarray(labels)
    if "label" in found:
        found["label"] = found["label"].astype(jnp.int32)
    return found or None


def in_turn(labels: list[int], num: int) -> np.ndarray:
    """`num` labels, int32: the given ones in turn, so that each occurs as often."""
    return np.resize(np.asarray(labels, np.int32), num)


def settings(run: runs.Run, sampling: dict[str, Any] | None = None) -> dict[str, Any]:
    """The entries of config.sampling that are in force, and the weights, as plain JSON."""
    found = json.loads(runs.chosen(run.config, sampling or {}).sampling.to_json())
    names = ["solver", "grid", "guidance", "threshold"]
    if run.config.low_res.factor is not None:
        names += ["aug_level", "truncate"]
    return {"step": run.step, "ema": run.ema, **{name: found[name] for name in names}}
