"""How well a picture matches its caption, by a contrastive model: a run trained here, or any CLIP.

    judge = scorer.load("runs/emoji_clip")                      # or a CLIP folder
    scorer.clip_score(judge.images(pictures), judge.texts(captions)).mean()

Vectors of both are of length one: their products are cosines.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import jsonfile, runs
from jdiff.captions import reader
from jdiff.errors import UserError
from jdiff.evaluation.features import check_images
from jdiff.experiment import to_float
from jdiff.pytree import Array

#: The w of the score: cosines in per cent. Hessel et al. 2021 print 2.5 max(cos, 0).
WEIGHT = 100.0


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """Pictures and texts as unit vectors of one space; made by `load`.

    Attributes:
      name: of the model, for what is reported.
      see: images `[batch, H, W, C]` in [-1, 1] to vectors `[batch, D]`.
      read: texts to vectors `[N, D]`.
      batch: pictures at a time; the last batch is filled up, so that there is one program a size.
    """

    name: str
    see: Callable[[Array], Array]
    read: Callable[[Sequence[str]], Array]
    batch: int

    def images(self, pictures: np.ndarray) -> np.ndarray:
        """Vectors `[N, D]` of uint8 pictures `[N, H, W, C]`, of any size.

        Raises:
          ValueError: they are not uint8 or not `[N, H, W, C]`.
        """
        pictures = check_images(pictures)
        found = []
        for start in range(0, len(pictures), self.batch):
            part = pictures[start : start + self.batch]
            filled = part[np.minimum(np.arange(self.batch), len(part) - 1)]
            found.append(np.asarray(self.see(to_float(filled)))[: len(part)])
        return np.concatenate(found)

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """Vectors `[N, D]` of texts."""
        return np.asarray(self.read(list(captions)))


def clip_score(images: Array, texts: Array) -> Array:
    """100 max(cos, 0) of each pair, `[N]`: vectors `[N, D]` of unit length, or `[..., D]` each.

    Source: Hessel et al. 2021 (2104.08718), equation 1, with w = 100 in the place of 2.5.
    """
    return WEIGHT * jnp.maximum(jnp.sum(jnp.asarray(images) * jnp.asarray(texts), axis=-1), 0.0)


def load(where: str | pathlib.Path, *, batch: int | None = None) -> Scorer:
    """Opens a scorer.

    Args:
      where: the run directory of a contrastive run, whose texts are read by what encoded its data;
        or the folder of a CLIPModel with its tokenizer, in transformers' layout.
      batch: pictures at a time; the run's config.sampling.batch, or 32 for CLIP, unless given.

    Raises:
      UserError: neither is there, or the text encoder cannot be opened.
    """
    folder = pathlib.Path(where).expanduser()
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{where} is no scorer: neither the run directory of a contrastive run nor the folder "
            "of a CLIP."
        )
    config = jsonfile.read(path)
    if "architectures" in config:
        return of_clip(folder, batch or 32)
    if config.get("kind") != "contrastive":
        raise UserError(
            f"{where} is a run of the kind {config.get('kind', 'diffusion')!r}; a scorer is of the "
            "kind 'contrastive'."
        )
    run = runs.restored(folder)
    return of_run(run, text_encoder(run), batch or run.config.sampling.batch)


def of_run(run: runs.Restored, encoder: Any, batch: int) -> Scorer:
    """The scorer of an opened run, whose texts are read by this `texts.TextEncoder`."""
    exp, side = run.experiment, run.info.shape[0]
    see = jax.jit(lambda params, x: exp.images(params, resized(x, side)))
    read = jax.jit(exp.texts)

    def texts(captions: list[str]) -> np.ndarray:
        parts = []
        for start in range(0, len(captions), batch):
            some = captions[start : start + batch]
            told = encoder.encode(some + [""] * (batch - len(some)))
            told["text_mask"] = told.pop("mask")
            cond = exp.cond({name: told[name] for name in exp.told})
            parts.append(np.asarray(read(run.params, cond))[: len(some)])
        return np.concatenate(parts)

    return Scorer(run.workdir.name, lambda x: see(run.params, x), texts, batch)


def of_clip(folder: pathlib.Path, batch: int) -> Scorer:
    """The scorer of a folder in transformers' layout: CLIPModel, and its tokenizer beside it.

    Raises:
      UserError: it holds another model, or no tokenizer.
    """
    from jdiff import interop

    clip = interop.load_component(folder)
    names = [name for name in ("embed_images", "read") if not hasattr(clip.model, name)]
    if names:
        raise UserError(
            f"{folder} holds {clip.family.cls}, which does not compare texts and images; a "
            "CLIPModel does."
        )
    encoder = interop.text_encoder(clip, tokenizer=folder, batch=batch)
    see = jax.jit(clip.apply.method("embed_images"))

    def texts(captions: list[str]) -> np.ndarray:
        pooled = np.asarray(encoder.encode(captions)["pooled"])
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

    return Scorer(folder.name, lambda x: see(clip.params, x), texts, batch)


def text_encoder(run: runs.Restored) -> Any:
    """What reads texts for a contrastive run: that which encoded its data, opened again.

    Raises:
      UserError: the data do not say what it was, or it is not there.
    """
    try:
        return reader(run.info, run.config.texts.encoder)
    except UserError as error:
        raise UserError(
            f"{run.workdir}: {error}; config.texts.encoder does: minilm, or a folder."
        ) from error


def resized(x: Array, side: int) -> Array:
    """Images `[B, H, W, C]` in [-1, 1] as `[B, side, side, C]`, by cubic interpolation."""
    if x.shape[1:3] == (side, side):
        return x
    shape: tuple[int, ...] = (x.shape[0], side, side, x.shape[-1])
    return jnp.clip(jax.image.resize(x, shape, "cubic"), -1.0, 1.0)
