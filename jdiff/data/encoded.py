"""What `jdiff encode` says of a set that it made: of which images, and by which models.

It lies in the set's folder, as encoding.json beside TFDS's own files; so does what the text encoder
makes of the empty text (empty.npz), for guidance.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdiff.errors import UserError

FILE = "encoding.json"
EMPTY = "empty.npz"
#: Fields of a latent set: mean and deviation of an image's latents, and of its mirror image's.
MEAN, STD = "latent", "latent_std"
MIRRORED_MEAN, MIRRORED_STD = "latent_mirrored", "latent_mirrored_std"
LATENTS = (MEAN, STD, MIRRORED_MEAN, MIRRORED_STD)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Where an encoded set comes from.

    Attributes:
      source: the set of the images, as `sources.source` takes it.
      shape: [H, W, C] of the images that were encoded.
      size, crop, resample: how they were prepared, as in `pipeline.batches`.
      autoencoder: the folder or run directory that it was opened from; None: the images are kept.
      digest: of the autoencoder, see `autoencoders`; None without one.
      factor: pixels of a side that are one latent's; 1 without.
      drawn: whether there are deviations, so that a latent is drawn; False of an autoencoder that
        gives one latent.
      mirrored: whether the mirror images were encoded too.
      text: what the text encoder was opened from; None: no texts were encoded.
      caption: the field of the texts.
    """

    source: str
    shape: tuple[int, ...]
    size: int | None
    crop: str | None
    resample: str
    autoencoder: str | None = None
    digest: str | None = None
    factor: int = 1
    drawn: bool = False
    mirrored: bool = False
    text: str | None = None
    caption: str | None = None

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Encoded:
        """From `dataclasses.asdict` by way of JSON."""
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in plain.items() if k in known})

    def latents(self, mirrored: bool) -> tuple[str, ...]:
        """The fields of the latents to read; none of a set of images."""
        if self.autoencoder is None:
            return ()
        names = LATENTS if mirrored else (MEAN, STD)
        return tuple(n for n in names if self.drawn or n in (MEAN, MIRRORED_MEAN))


def read(folder: str | os.PathLike) -> Encoded | None:
    """What lies in the folder of a TFDS set; None if `jdiff encode` did not make it.

    Raises:
      UserError: the file cannot be read.
    """
    path = pathlib.Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        return Encoded.of(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def write(
    folder: pathlib.Path, encoded: Encoded, empty: Mapping[str, np.ndarray], plan: Mapping[str, Any]
) -> None:
    """Writes both files; `empty` may hold nothing. `plan`: what all records depend on."""
    tree = dataclasses.asdict(encoded) | {"plan": plan}
    (folder / FILE).write_text(json.dumps(tree, indent=2) + "\n")
    if empty:
        np.savez(folder / EMPTY, **empty)


def read_plan(folder: str | os.PathLike) -> dict[str, Any]:
    """The plan by which the set in a folder was written."""
    return json.loads((pathlib.Path(folder) / FILE).read_text())["plan"]


def read_empty(folder: str | os.PathLike) -> dict[str, np.ndarray]:
    """What the encoder made of the empty text, by field; nothing if there is no such file."""
    path = pathlib.Path(folder) / EMPTY
    if not path.is_file():
        return {}
    with np.load(path) as file:
        return dict(file)


def check(encoded: Encoded, name: str, crop: str | None, size: int | None, flip: bool) -> None:
    """That a pipeline asks of latents no other preparation than that of the encoded images.

    Raises:
      UserError: another size or crop, or mirror images that were not encoded.
    """
    wanted = {"size": (size, encoded.size or encoded.shape[0]), "crop": (crop, encoded.crop)}
    for what, (asked, done) in wanted.items():
        if asked is not None and asked != done:
            raise UserError(
                f"config.data.{what}={asked!r}: the latents of {name} are of images with "
                f"{what}={done!r}; give that or None, or encode them anew."
            )
    if flip and not encoded.mirrored:
        raise UserError(
            f"config.data.flip: the mirror images of {name} were not encoded; encode them with "
            "--flip, or give False."
        )


def choose_mirrored(batch: Mapping[str, Any], where: np.ndarray | None) -> dict[str, Any]:
    """`batch` with the latents of mirror images in the rows `where` [B] (bool), and none beside."""
    found = {k: v for k, v in batch.items() if k not in (MIRRORED_MEAN, MIRRORED_STD)}
    if where is None:
        return found
    for plain, mirrored in ((MEAN, MIRRORED_MEAN), (STD, MIRRORED_STD)):
        if plain in found:
            rows = where.reshape(-1, *(1,) * (found[plain].ndim - 1))
            found[plain] = np.where(rows, batch[mirrored], found[plain])
    return found


def none_of(names: Sequence[str], shape: Sequence[int]) -> dict[str, np.ndarray]:
    """The latents of no images, float32 [0, ...]."""
    return {name: np.zeros((0, *shape), np.float32) for name in names}
