"""Opening the run of an autoencoder: its weights, and the scale of its latents."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jdiff import real, runs
from jdiff.autoencoders import Autoencoder, Moments, autoencoder
from jdiff.errors import UserError
from jdiff.experiment import to_float
from jdiff.first_stage.experiment import Experiment, in_colour
from jdiff.parallel import hosts
from jdiff.parallel.layout import Layout
from jdiff.pytree import Array
from jdiff.training.logs import replace_text

#: In the run directory: {"step", "ema", "scale", "images"}.
FILE = "latents.json"
#: Images of the training split that the scale is measured on, at most.
IMAGES = 2048


class Run(NamedTuple):
    """A trained autoencoder and what belongs to it.

    Attributes:
      coder: the `Autoencoder`, whose latents have standard deviation 1 over all entries.
      info: what the data is.
      step: the checkpoint's.
      ema: which weights these are.
      null: nothing: no image is asked for by a label.
    """

    workdir: pathlib.Path
    config: ml_collections.ConfigDict
    coder: Autoencoder
    info: Any
    step: int
    ema: str
    layout: Layout | None = None
    null: Mapping[str, Any] = {}


def load(
    workdir: str | pathlib.Path, *, ema: str | None = None, step: int | None = None,
    mesh: Mapping[str, int] | None = None,
) -> Run:  # fmt: skip
    """Opens the run directory of an autoencoder; arguments as of `jdiff.load_run`.

    The scale is 1 / the standard deviation of latents drawn for training images, over all entries
    (Rombach et al. 2022, appendix G). It is measured once and kept in the directory.

    Raises:
      UserError: as `jdiff.load_run`; a run of another kind; training images that cannot be read
        when the scale was not measured yet.
    """
    opened = runs.restored(workdir, ema=ema, step=step, mesh=mesh)
    if not isinstance(opened.experiment, Experiment):
        raise UserError(
            f"{workdir} is a run of the kind {opened.config.kind!r} and no autoencoder's; "
            "`jdiff train --config=configs/autoencoder_emoji.py` trains one."
        )
    exp = opened.experiment
    plain = autoencoder(exp.apply, opened.params["autoencoder"])
    run = Run(
        opened.workdir, opened.config, plain, opened.info, opened.step, opened.ema, exp.layout
    )
    scaled = autoencoder(plain.apply, plain.params, scale=_scale(run))
    return run._replace(coder=scaled)


def moments(coder: Autoencoder, images: Any) -> Moments:
    """The distribution of the latents of uint8 images [B, H, W, 1 or 3]."""
    return coder.moments(in_colour(to_float(jnp.asarray(images))))


def spread(batches: Iterator[Moments]) -> float:
    """The standard deviation of latents drawn from distributions, over all their entries."""
    count, total, squares = 0, 0.0, 0.0
    for mean, std in batches:
        mean, std = (np.asarray(a, np.float64) for a in (mean, std))
        count += mean.size
        total += mean.sum()
        squares += np.square(mean).sum() + np.square(std).sum()
    return float(np.sqrt(squares / count - (total / count) ** 2))


def _scale(run: Run) -> float:
    """As kept in the directory for these weights, or measured and kept."""
    path, wanted = run.workdir / FILE, {"step": run.step, "ema": run.ema}
    try:
        known = json.loads(path.read_text())
        if wanted.items() <= known.items():
            return float(known["scale"])
    except (OSError, ValueError, KeyError):
        pass  # not measured, or cut off
    source = real.part(real.source(run, "training"), IMAGES, seed=0)
    encode = jax.jit(moments)
    rows = real.rows(run, source, batch=run.config.sampling.batch)
    deviation = spread(hosts.fetched(encode(run.coder, row["image"])) for row in rows)
    if not np.isfinite(deviation) or deviation <= 0:
        raise UserError(
            f"{run.workdir}: the latents of step {run.step} have standard deviation {deviation}; "
            "the autoencoder tells images not apart."
        )
    found = {**wanted, "scale": 1 / deviation, "images": len(source)}
    if hosts.line().first:
        with contextlib.suppress(OSError):  # may only be read: it is measured again next time
            replace_text(path, json.dumps(found) + "\n")
    return 1 / deviation


def reconstruct(coder: Autoencoder, images: Array) -> Array:
    """Images in [-1, 1] and beyond of uint8 images' mean latents, with as many channels."""
    made = coder.decode(moments(coder, images).mean)
    return made.mean(-1, keepdims=True) if images.shape[-1] == 1 else made
