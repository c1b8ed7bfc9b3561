"""The assessment of an autoencoder: its reconstructions of held-out images.

Two kinds of figures: distances between the set of reconstructions and the set of images (rFID, in
the features that config.evaluation.features names), beside those of other real images and of noise;
and means over pairs of a reconstruction and its image, for which there is no floor but the image.
"""

import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import assess as written
from jdiff import real
from jdiff.autoencoders.discrete import counts, perplexity
from jdiff.data import prepare
from jdiff.errors import UserError
from jdiff.evaluation import lpips, pairs
from jdiff.evaluation.features import to_uint8
from jdiff.experiment import to_float
from jdiff.first_stage import trained
from jdiff.first_stage.trained import Run
from jdiff.parallel import hosts
from jdiff.yardstick import finite, plainly, told, wanted_metrics, yardstick
from jdiff.yardstick import rows as distances

#: Distances between the sets, unless others are asked for.
METRICS = ("frechet", "precision_recall")
#: For each figure of pairs and codes its name, which way is better, and what it is.
FIGURES = {
    "psnr": ("PSNR", "higher", "decibels, of the reconstruction against its image"),
    "ssim": ("SSIM", "higher", "structural similarity of the reconstruction to its image"),
    "lpips": ("LPIPS", "lower", "difference of VGG16's features, version 0.1"),
    "codes": ("Codes in use", "higher", "share of all codes that occur"),
    "perplexity": ("Code perplexity", "higher", "exp of the entropy: as many codes used evenly"),
    "bits": ("Rate", "lower", "bits of the latents of an image, divergence to N(0, 1)"),
}


def assess(
    run: Run, *, num: int | None = None, seed: int = 0, batch: int | None = None,
    sampling: dict[str, Any] | None = None, features: str | None = None,
    metrics: Iterable[str] | None = None, console: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Measures an autoencoder and writes evaluation.json; returns what it holds.

    Args:
      run: from `trained.load`.
      num: images of the reference split (config.evaluation.reference) that are reconstructed, all
        of it at most; config.evaluation.num unless given. They are compared with the whole split,
        so that rFID is that of the papers if `num` is its size.
      seed: of the choice of images and of noise.
      batch: images at a time; config.sampling.batch unless given.
      sampling: nothing; an autoencoder does not sample.
      features, metrics: as of `jdiff.assess.assess`; the metrics are `METRICS` unless given.
      console: a rich Console for a progress bar, or None.

    Returns:
      As `jdiff.assess.assess`; the figures of `FIGURES` have neither floor nor ceiling.

    Raises:
      UserError: as `jdiff.assess.assess`.
    """
    started = time.monotonic()
    config = run.config
    if sampling:
        raise UserError(f"{run.workdir} is the run of an autoencoder, which does not sample.")
    num = written.enough(config.evaluation.num if num is None else num)
    features = config.evaluation.features if features is None else features
    wanted = wanted_metrics(run, features, METRICS if metrics is None else metrics)
    with told(console) as tell, plainly():
        reference, other = real.sides(run)
        splits = real.splits(run)
        source = real.part(splits[reference], num, seed)
        measure = yardstick(
            run, num=len(source), features=features, metrics=wanted, seed=seed, tell=tell,
            splits=splits,
        )  # fmt: skip
        summarizer, collected = measure.summarizer(), _Collected(run, batch)
        done = 0
        for row in real.rows(run, source, batch=collected.batch):
            tell("reconstructions", done, len(source))
            summarizer.add(collected.add(row["image"]), row.get("label"))
            done += len(row["image"])
        figures = measure.figures(summarizer.summary())
    result = {
        "settings": {
            "num": done, "what": "reconstructions", "seed": seed, "features": features,
            "step": run.step, "ema": run.ema, "reference": reference,
            "reference_images": measure.reference[1].moments.count, "floor": other,
            "floor_images": measure.floor[1].moments.count,
            "scale": float(jnp.mean(run.coder.scale)),
        },
        "seconds": {
            "classifier": round(measure.seconds, 2),
            "total": round(time.monotonic() - started, 2),
        },
        "metrics": [*distances(figures), *collected.rows()],
        "classifier": None,
    }  # fmt: skip
    if hosts.line().first:
        written.write(run.workdir, run.step, result)
    return result


class _Collected:
    """Figures of pairs and of codes, added up batch by batch; batches of one compiled size."""

    def __init__(self, run: Run, batch: int | None):
        self.batch = batch or run.config.sampling.batch
        self._coder, self._network = run.coder, run.coder.apply.skeleton()
        self._parts: dict[str, list[np.ndarray]] = {}
        self._codes = None
        weights = prepare.location("lpips")
        large = min(run.info.shape[:2]) >= lpips.SMALLEST
        self._lpips = lpips.load(weights) if weights.is_file() and large else None

    def add(self, images: np.ndarray) -> np.ndarray:
        """Takes uint8 images in, and gives their reconstructions."""
        count = len(images)
        padded = np.concatenate([images, np.repeat(images[-1:], self.batch - count, 0)])
        made, found, index = hosts.fetched(_measured(self._coder, self._lpips, padded))
        made = made[:count]
        found |= {"psnr": pairs.psnr(made, images), "ssim": pairs.ssim(made, images)}
        for name, values in found.items():
            self._parts.setdefault(name, []).append(np.asarray(values)[:count])
        if index is not None:
            used = np.asarray(counts(index[:count], self._network.codes))
            self._codes = used if self._codes is None else self._codes + used
        return made

    def rows(self) -> list[dict[str, Any]]:
        """As evaluation.json has them."""
        values = {name: np.concatenate(parts).mean() for name, parts in self._parts.items()}
        if self._codes is not None:
            values["codes"] = (self._codes > 0).mean()
            values["perplexity"] = perplexity(jnp.asarray(self._codes))
        return [
            {"key": key, "name": name, "better": better, "about": about,
             "value": finite(float(values[key])), "floor": None, "ceiling": None}
            for key, (name, better, about) in FIGURES.items()
            if key in values
        ]  # fmt: skip


@jax.jit
def _measured(coder: Any, weights: Any, images: Any) -> tuple[Any, dict[str, Any], Any]:
    """(uint8 reconstructions, figures of each, codes or None) of uint8 images."""
    from jdiff.first_stage.networks import divergence

    latents = trained.moments(coder, images)
    made = coder.decode(latents.mean)
    made = made.mean(-1, keepdims=True) if images.shape[-1] == 1 else made
    made, found, index = to_uint8(made), {}, None
    if weights is not None:
        found["lpips"] = lpips.distance(weights, to_float(made), to_float(images))
    z = latents.mean / coder.scale + coder.shift
    if hasattr(coder.apply.skeleton(), "codes"):
        index = coder.apply.method("quantize")(coder.params, z).index
    else:
        own = latents._replace(mean=z, std=latents.std / coder.scale)
        found["bits"] = divergence(own) / jnp.log(2.0)
    return made, found, index
