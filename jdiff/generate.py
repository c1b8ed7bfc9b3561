"""Images from a run: what the command line and the evaluation draw."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from jdiff import runs
from jdiff.parallel import hosts


def images(
    run: runs.Run, *, num: int, labels: np.ndarray | None = None, seed: int = 0,
    batch: int | None = None, sampling: dict[str, Any] | None = None,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Draws `num` images, a batch at a time: uint8 `[B, H, W, C]`. Errors come at the call.

    Image i depends on the seed, i and labels[i] alone, not on the batch or the mesh (but for the
    rounding of sums, which may tip a pixel by one level). They are drawn by all devices of the
    run's mesh. Of many processes all have to call, and each gets all images.

    Args:
      run: from `runs.load_run`.
      labels: int `[num]`; None for a model without labels.
      batch: images at a time; config.sampling.batch unless given.
      sampling: replaces entries of config.sampling, see `runs.sampler`.

    Raises:
      UserError: an unknown solver, grid or argument, or guidance of a model without labels.
    """
    import jax

    from jdiff.sampling import stream

    denoise, solver, times = runs.sampler(run, **(sampling or {}))
    batch = min(num, batch or run.config.sampling.batch)
    sharding = run.layout and run.layout.batch
    cond = None if labels is None else {"label": jax.numpy.asarray(labels, jax.numpy.int32)}
    parts = stream(
        jax.random.key(seed), denoise, times=times, shape=tuple(run.info.shape), num=num,
        cond=cond, solver=solver, batch=batch, sharding=sharding,
    )  # fmt: skip
    return map(_on_host, parts)


def _on_host(part: Any) -> np.ndarray:
    from jdiff.evaluation.features import to_uint8

    return hosts.fetched(to_uint8(part))


def in_turn(labels: list[int], num: int) -> np.ndarray:
    """`num` labels, int32: the given ones in turn, so that each occurs as often."""
    return np.resize(np.asarray(labels, np.int32), num)


def settings(run: runs.Run, sampling: dict[str, Any] | None = None) -> dict[str, Any]:
    """The entries of config.sampling that are in force, and the weights, as plain JSON."""
    found = json.loads(runs.chosen(run.config, sampling or {}).sampling.to_json())
    kept = {name: found[name] for name in ("solver", "grid", "guidance", "threshold")}
    return {"step": run.step, "ema": run.ema, **kept}
