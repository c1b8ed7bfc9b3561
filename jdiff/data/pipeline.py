"""Batches of images: shuffled, augmented, sharded by process, and resumed exactly.

The stream of examples is one fixed sequence, defined by the source, the seed and nothing else:
epoch after epoch, each a new permutation, without a remainder (a batch may straddle two epochs).
Global batch k holds positions [k B, (k + 1) B) of it, and a process takes its share of every global
batch. So the data order depends neither on the number of processes nor on the batch size.

Batches are gathered whole rather than element by element; Grain's iterator numbers and prefetches
them in threads.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jdiff.data import encoded, transforms
from jdiff.data.sources import Source, stack
from jdiff.errors import UserError, choose

Batch = dict[str, Any]
# Streams of the position hash.
_ORDER, _FLIP, _TOP, _LEFT = range(4)


class Batches:
    """An iterator of batches whose position can be saved and restored.

    Attributes:
      identity: what a saved position belongs to.
      shape: [H, W, C] of the images (or latents) delivered; None where it is not known beforehand.
    """

    def __init__(self, stream: _Stream, threads: int, prefetch: int):
        import grain

        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        self.identity = stream.identity
        self.shape = stream.shape
        self._iterator = iter(grain.MapDataset.source(stream).to_iter_dataset(options))

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON-able values; equal on all processes."""
        return {"batches": self._iterator.get_state()["next_index"], "of": dict(self.identity)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after `state`, of this or any other number of processes.

        Raises:
          UserError: `state` belongs to another pipeline; names what differs. Nothing changes then.
        """
        saved = dict(state["of"])
        differing = [
            f"{key} was {saved.get(key)!r} and is {value!r}"
            for key, value in self.identity.items()
            if saved.get(key) != value
        ]
        if differing:
            raise UserError(
                f"the saved data position belongs to another pipeline: {'; '.join(differing)}"
            )
        self._iterator.set_state({"next_index": int(state["batches"])})


def batches(
    source: Source,
    batch_size: int,
    *,
    seed: int = 0,
    train: bool = True,
    flip: bool = False,
    crop: str | None = None,
    size: int | None = None,
    resample: str = "bicubic",
    shard_index: int | None = None,
    shard_count: int | None = None,
    rows: Sequence[int] | None = None,
    threads: int = 2,
    prefetch: int = 8,
) -> Batches:
    """Batches {`image` uint8 [B, H, W, C], `label` int32 [B], `id` int64 [B], ...} from `source`.

    Args:
      source: from `sources.source`, or any sequence of dicts with `image` that has `info`.
      batch_size: the global batch; each process gets `batch_size / shard_count` of it.
      seed: 0 <= seed < 2**63; fixes the order and every random choice.
      train: an endless shuffled stream. False: each example once, in order; the last batch is
        partial (a process beyond its end gets an empty one).
      flip: mirror each image with probability 1/2, anew in every epoch. Training only.
      crop: None, or `center`, `random`, `adm`, `patch`: see `transforms.crop`.
      size: resize to this height and width (or side of the crop); None keeps the source's.
      resample: filter of the resize: `box`, `bilinear`, `hamming`, `bicubic`, `lanczos`.
      shard_index, shard_count: this process and their number; by default JAX's.
      rows: instead of these, the rows of a global batch that this process gets, in rising order.
      threads, prefetch: decoding threads, and batches made ahead. `threads=0` works on demand.

    `id` is the position in `source`: `source[id]` is the untransformed example. A source without
    labels gives no `label`; further fields of the source pass through. Of a set of latents there is
    no `image` but `latent` and `latent_std`, float [B, h, w, C]: a mirrored image's latents are
    those that were encoded of it, and crop and size are those of the encoded images.

    Raises:
      UserError: an argument out of range, images that cannot be batched without crop or size, or
        latents of images that were prepared otherwise.
    """
    index, count = _shard(shard_index, shard_count) if rows is None else (0, 1)
    if batch_size < 1 or batch_size % count:
        raise UserError(
            f"batch_size {batch_size} must be a positive multiple of the {count} processes"
        )
    if rows is None:
        rows = np.arange(batch_size).reshape(count, -1)[index]
    if not 0 <= seed < 2**63:
        raise UserError(f"seed {seed} must lie in [0, 2**63)")
    if size is not None and size < 1:
        raise UserError(f"size {size} must be at least 1")
    if len(source) == 0:
        raise UserError(f"split {source.info.split!r} of {source.info.name} holds no examples")
    choose("resample", resample, transforms.FILTERS)
    if crop is not None:
        choose("crop", crop, transforms.CROPS)
    if crop in ("adm", "patch") and size is None:
        raise UserError(f"crop {crop!r} needs a size")
    latent = source.info.latent
    if latent:
        encoded.check(source.info.encoded, source.info.name, crop, size, flip and train)
        crop = size = None
    stream = _Stream(
        source=source,
        batch_size=batch_size,
        share=np.asarray(rows),
        seed=seed,
        train=train,
        flip=flip and train,
        crop=crop,
        size=size,
        resample=resample,
        shape=source.info.shape if latent else _delivered(source.info.shape, crop, size),
    )
    return Batches(stream, threads, prefetch)


def order(size: int, seed: int, positions: np.ndarray) -> np.ndarray:
    """Ids int64 at `positions` [B] of the endless stream over `size` examples."""
    epochs, places = np.divmod(positions, size)
    ids = np.empty(len(places), np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = permutation(size, seed, int(epoch))[places[here]]
    return ids


@functools.lru_cache(maxsize=4)
def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, int64 [size]: the examples sorted by their hash.

    Independent of any library's generator, hence of its version. A million take half a second.
    """
    key = transforms.hashed(seed, np.asarray(epoch), _ORDER)
    return np.argsort(transforms.hashed(int(key), np.arange(size), _ORDER), kind="stable")


@dataclasses.dataclass(frozen=True, eq=False)
class _Stream:
    """Batch k of one process, for every k: a random-access source of batches for Grain."""

    source: Source
    batch_size: int
    share: np.ndarray  # rows of a global batch that are this process's
    seed: int
    train: bool
    flip: bool
    crop: str | None
    size: int | None
    resample: str
    shape: tuple[int | None, ...]

    @property
    def identity(self) -> dict[str, Any]:
        info = self.source.info
        return {
            "dataset": info.name,
            "split": info.split,
            "examples": len(self.source),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "train": self.train,
        }

    def __len__(self) -> int:
        return sys.maxsize if self.train else -(-len(self.source) // self.batch_size)

    def __getitem__(self, k: int) -> Batch:
        positions = self.share + k * self.batch_size
        if self.train:
            ids = order(len(self.source), self.seed, positions)
        else:
            ids = positions = positions[positions < len(self.source)]
        batch = gather(self.source, ids)
        if self.source.info.latent:
            return self._latents(batch, positions) | {"id": ids}
        images = batch["image"]
        if self.crop is not None or self.size is not None:
            images = self._fit(images, positions)
        if len(images) == 0:
            images = np.zeros((0, *(n or 0 for n in self.shape)), np.uint8)
        if isinstance(images, list):
            shapes = sorted({image.shape for image in images})
            raise UserError(
                f"{self.source.info.name}: images differ in shape ({shapes[0]}, {shapes[1]}); "
                "give a crop and a size"
            )
        if self.flip:
            images = transforms.mirror(images, self._mirrored(positions))
        return batch | {"image": images, "id": ids}

    def _mirrored(self, positions: np.ndarray) -> np.ndarray:
        return transforms.hashed(self.seed, positions, _FLIP) >> np.uint64(63) == 1

    def _latents(self, batch: Batch, positions: np.ndarray) -> Batch:
        """Those of the mirror image where that is wanted; arrays of no rows have their shape."""
        if len(positions) == 0:
            batch |= encoded.none_of([k for k in batch if k in encoded.LATENTS], self.shape)
        return encoded.choose_mirrored(batch, self._mirrored(positions) if self.flip else None)

    def _fit(self, images: Any, positions: np.ndarray) -> Any:
        """Crops and resizes, image by image."""
        u = transforms.uniform(self.seed, positions, _TOP)
        v = transforms.uniform(self.seed, positions, _LEFT)
        fitted = []
        for image, top, left in zip(images, u, v):
            if self.crop is not None:
                image = transforms.crop(image, self.crop, self.size, top, left)
            if self.size is not None:
                image = transforms.resize(image, (self.size, self.size), self.resample)
            fitted.append(image)
        return stack("image", fitted)


def gather(source: Any, ids: np.ndarray) -> Batch:
    """All fields of the examples at `ids`, at once if the source can, else one by one."""
    at_once: Callable | None = getattr(source, "gather", None)
    if at_once is not None:
        return at_once(ids)
    rows = [source[int(i)] for i in ids]
    return {field: stack(field, [row[field] for row in rows]) for field in source[0]}


def _shard(index: int | None, count: int | None) -> tuple[int, int]:
    if index is None or count is None:
        import jax

        index = jax.process_index() if index is None else index
        count = jax.process_count() if count is None else count
    if not 0 <= index < count:
        raise UserError(f"shard_index {index} must lie in [0, {count}), the number of shards")
    return index, count


def _delivered(
    shape: tuple[int | None, ...], crop: str | None, size: int | None
) -> tuple[int | None, ...]:
    height, width, channels = shape
    if size is not None:
        if crop is None and height != width:
            raise UserError(f"size {size} would distort images of shape {shape}; give a crop")
        return (size, size, channels)
    if crop is not None:
        height = width = None if None in (height, width) else min(height, width)
    return (height, width, channels)
