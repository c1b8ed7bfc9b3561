"""The pictures that training draws: always of the same noise, so that they show what was learnt.

Of a super-resolution stage, a row for each of some held-out images: the low-resolution input that
the network is told, enlarged; what the stage makes of it; the image itself.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jdiff import experiment, latents, super_resolution
from jdiff.pictures import Drawing
from jdiff.pytree import Array, PyTree
from jdiff.sampling import stream
from jdiff.training.step import State

_COLUMNS = 8
_HELD_OUT = 8


def drawing(
    exp: experiment.Experiment, config: ml_collections.ConfigDict, key: Array, info: Any
) -> Drawing:
    """What the pictures of a run show: samples, a row a class; of a stage, held-out images.

    With config.data.conditions, a row has the conditions of one held-out image. Samples that are
    latents are decoded.

    Raises:
      UserError: a stage whose held-out images cannot be read, or whose input in sampling is not
        as config.sampling.aug_level says; latents whose autoencoder is not there.
    """
    level = super_resolution.level(config, exp.low_res)
    if exp.low_res is not None:
        return _of_stage(exp, config, level, key, info)
    if config.data.conditions:
        cond = exp.cond(held_out(config, _HELD_OUT))
        cond = {name: jnp.repeat(array, _COLUMNS, axis=0) for name, array in cond.items()}
        num = len(next(iter(cond.values())))
        draw = _drawer(exp, config, key, info, num, cond)
        return Drawing(draw, lambda images: images, _COLUMNS)
    classes = exp.null.get("label", 0)
    rows = min(classes, 10) or 8
    labels = jnp.repeat(jnp.arange(rows), _COLUMNS) % max(classes, 1)
    cond = {"label": labels} if classes else None
    draw = _drawer(exp, config, key, info, rows * _COLUMNS, cond)
    return Drawing(draw, lambda images: images, _COLUMNS)


def _of_stage(
    exp: experiment.Experiment, config: Any, level: PyTree, key: Array, info: Any
) -> Drawing:
    batch = held_out(config, _HELD_OUT)
    truth = experiment.to_float(batch["image"])
    count = len(truth)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, 0), jnp.arange(count))
    cond = exp.low_res.condition(keys, exp.low_res.shrink(truth), level)
    shown = np.asarray(exp.low_res.enlarge(cond["low_res"], truth.shape))

    def arranged(images: Any) -> Any:
        made = np.asarray(exp.low_res.finish(images, cond))
        return np.stack([shown, made, truth], axis=1).reshape(-1, *info.shape)

    cond |= exp.cond(batch)
    return Drawing(_drawer(exp, config, key, info, count, cond), arranged, columns=3)


def held_out(config: ml_collections.ConfigDict, count: int) -> dict[str, Any]:
    """The first held-out images and what belongs to them, prepared as in training."""
    from jdiff.data import patience
    from jdiff.data.pipeline import batches

    c = config.data
    source = patience.readable(  # a few are read: not all are decoded for them
        c.name, c.test_split, c.data_dir, c.conditions, in_memory=False
    )
    return next(
        batches(
            source, count, train=False, crop=c.crop, size=c.size, resample=c.resample,
            shard_index=0, shard_count=1, threads=0,
        )
    )  # fmt: skip


def _drawer(
    exp: experiment.Experiment, config: Any, key: Array, info: Any, num: int, cond: PyTree
) -> Callable[[State], Array]:
    """state -> samples, decoded: the same noise and conditions each time."""
    coder = latents.decoder(info, config.data.autoencoder, exp.layout and exp.layout.whole)

    def draw(state: State) -> Array:
        name = config.sampling.ema
        params = state.params if name == "params" else state.averages[name]
        denoise, solver, times = experiment.sampler(config, exp.denoiser(params), exp.nulls(params))
        parts = stream(
            key, denoise, times=times, shape=info.shape, num=num, cond=cond, solver=solver,
            batch=config.sampling.batch, sharding=exp.layout.batch,
        )  # fmt: skip
        size = min(config.sampling.batch, num)
        return jnp.concatenate([latents.decoded(coder, part, size) for part in parts])

    return draw
