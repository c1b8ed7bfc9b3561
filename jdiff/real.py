"""Real images of a run: its splits, prepared as in training, and what the network is told of them.

An evaluation has two sides: the split that samples are compared with, and the other one, whose
distance to it is the floor.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from jdiff import runs
from jdiff.data import pipeline, sources
from jdiff.errors import UserError, choose

BATCH = 256
#: Told what is being done, and of how much how much is done: tell(what, done=0, total=None).
Tell = Callable[..., None]


def sides(run: runs.Run) -> tuple[str, str]:
    """(what samples are compared with, the other real split), each "held-out" or "training".

    By config.evaluation.reference.
    """
    table = {"test": ("held-out", "training"), "train": ("training", "held-out")}
    return table[choose("config.evaluation.reference", run.config.evaluation.reference, table)]


def source(run: runs.Run, side: str) -> sources.Source:
    """The examples of the split called "held-out" or "training".

    Of a run on latents, those of the set that was encoded, and what the network is told of them.

    Raises:
      UserError: the set that was encoded is not there, or it is of another size.
    """
    c, info = run.config.data, run.info
    split = {"held-out": c.test_split, "training": c.train_split}[side]
    if not info.latent:
        return sources.source(c.name, split, c.data_dir, fields=tuple(c.conditions))
    images = sources.source(info.encoded.source, split, c.data_dir)
    told = sources.source(c.name, split, c.data_dir, fields=tuple(c.conditions), in_memory=False)
    if len(images) != len(told):
        raise UserError(
            f"{info.encoded.source} {split} has {len(images):,} images, and {c.name}, which was "
            f"encoded of it, {len(told):,}: it is another version of the set."
        )
    fields = {name: told.features[name] for name in c.conditions}
    return Beside(images, dataclasses.replace(told, features=fields)) if fields else images


def splits(run: runs.Run) -> dict[str, sources.Source]:
    """Both splits by their names: opened once, as a small set is decoded whole each time."""
    return {side: source(run, side) for side in ("training", "held-out")}


def rows(
    run: runs.Run, source: Any, *, batch: int = BATCH, side: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The examples once, in order, not mirrored: {"image": uint8 `[B, H, W, C]`, ...}.

    Args:
      source: from `source`, or a `part` of it.
      batch: examples at a time.
      side: of whole images in pixels, for a stage that was trained on patches of them; the side of
        a patch unless given.
    """
    c = run.config.data
    c = run.info.encoded if run.info.latent else c  # whose images were prepared so
    crop, size = ("center" if c.crop == "random" else c.crop), c.size
    if side is not None and crop == "patch":
        crop, size = "center", side
    return iter(
        pipeline.batches(
            source, batch, train=False, crop=crop, size=size, resample=c.resample,
            threads=run.config.data.threads, shard_index=0, shard_count=1,
        )
    )  # fmt: skip


def images(
    run: runs.Run, source: Any, tell: Tell, what: str = "", *, side: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """(images, labels) of `rows`, telling how many of them there were."""
    done = 0
    for part in rows(run, source, side=side):
        tell(what, done, len(source))
        done += len(part["image"])
        yield part["image"], part.get("label")


def told(run: runs.Run) -> list[str]:
    """What the network is told of an image: entries of a row and of cond."""
    labelled = ["label"] if "label" in run.null else []
    return [*labelled, *run.config.data.conditions]


def conditions(run: runs.Run, row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the network is told of the images of a batch of `rows`, floats as float32."""
    plain = lambda a: a.astype(np.float32) if np.issubdtype(a.dtype, np.floating) else a
    return {name: plain(np.asarray(row[name])) for name in told(run)}


def all_conditions(run: runs.Run, source: Any, num: int) -> dict[str, np.ndarray]:
    """What the network is told of `num` images, `[num, ...]`; of fewer, in turn."""
    found = [conditions(run, row) for row in rows(run, part(source, num, 0))]
    joined = {name: np.concatenate([c[name] for c in found]) for name in told(run)}
    return {name: entry[np.arange(num) % len(entry)] for name, entry in joined.items()}


def captions(run: runs.Run, source: Any, num: int) -> list[str]:
    """The texts of the images of `all_conditions`, in the same order.

    Args:
      source: one of `splits`.

    Raises:
      UserError: the data have no such field (config.evaluation.captions).
    """
    c, origin = run.config.data, run.info.encoded
    field = run.config.evaluation.captions or (origin and origin.caption) or "caption"
    texts = sources.source(
        c.name, source.info.split, c.data_dir, fields=(field,), in_memory=False
    )  # fmt: skip
    texts = dataclasses.replace(texts, features={field: texts.features[field]})  # without images
    chosen = part(source, num, 0)
    places = chosen.picked if isinstance(chosen, Part) else np.arange(len(source))
    found = [row[field] for row in texts.__getitems__(places)]
    return [found[i % len(found)] for i in range(num)]


def part(source: Any, num: int, seed: int) -> Any:
    """`num` examples of a source chosen at random, or all: distances depend on the number."""
    if len(source) <= num:
        return source
    picked = np.random.default_rng(seed).choice(len(source), num, replace=False)
    return Part(source, np.sort(picked))


def first(source: Any, num: int) -> Any:
    """The first `num` examples of a source."""
    return Part(source, np.arange(min(num, len(source))))


@dataclasses.dataclass(frozen=True)
class Part:
    """Some examples of a source, as a source."""

    source: Any
    picked: np.ndarray

    @property
    def info(self) -> Any:
        """Of so many examples."""
        return dataclasses.replace(self.source.info, size=len(self.picked))

    def __len__(self) -> int:
        return len(self.picked)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.picked[index])]

    def __getitems__(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        return self.source.__getitems__([int(self.picked[i]) for i in indices])

    def gather(self, indices: Iterable[int]) -> dict[str, Any]:
        """All fields of the examples at `indices`."""
        return pipeline.gather(self.source, np.asarray([int(self.picked[i]) for i in indices]))


@dataclasses.dataclass(frozen=True)
class Beside:
    """The images of one source, and the fields of another: example i of both is the same."""

    images: Any
    fields: Any

    @property
    def info(self) -> Any:
        """Of the images, with the other's fields."""
        return dataclasses.replace(self.images.info, fields=self.fields.info.fields)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.images[index] | self.fields[index]

    def __getitems__(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        return [self[i] for i in indices]

    def gather(self, indices: Iterable[int]) -> dict[str, Any]:
        """All fields of the examples at `indices`."""
        return self.images.gather(indices) | self.fields.gather(indices)
