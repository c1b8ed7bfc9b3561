"""Random access to real images by name: the bundled digits, and every prepared TFDS image set.

Images are uint8 [H, W, C]. Small sets are decoded once into one array; large ones are decoded as
they are read, from array_record files and without TensorFlow. A set that `jdiff encode` made may
hold latents in the place of images.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jdiff.data import digits, encoded, folders
from jdiff.data.encoded import Encoded
from jdiff.errors import UserError, choose

# Sets up to this many bytes are decoded into memory.
MEMORY_LIMIT = 512 * 2**20


class Field(NamedTuple):
    """A further array of every example: its name, its shape, its dtype (a float's or `bool`)."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Info:
    """What a source holds.

    Attributes:
      name: of the set, with config and version if given.
      split: as asked for.
      shape: [H, W, C] of an image, or of its latents; None where it differs between images.
      num_classes: 0 for a set without labels.
      label_names: one for each class.
      size: number of examples.
      fields: those asked for that are arrays of floats or bools, in the order asked for.
      encoded: where a set comes from that `jdiff encode` made; None of others.
    """

    name: str
    split: str
    shape: tuple[int | None, ...]
    num_classes: int
    label_names: tuple[str, ...]
    size: int
    fields: tuple[Field, ...] = ()
    encoded: Encoded | None = None

    @property
    def latent(self) -> bool:
        """Whether it holds latents in the place of images."""
        return self.encoded is not None and self.encoded.autoencoder is not None

    @property
    def image_shape(self) -> tuple[int | None, ...]:
        """[H, W, C] of an image, also of a set of latents."""
        return self.encoded.shape if self.latent else self.shape

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Info:
        """From `dataclasses.asdict` by way of JSON, of this version or an earlier one."""
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}
        fields = tuple(Field(f[0], tuple(f[1]), f[2]) for f in plain.get("fields", ()))
        origin = plain.get("encoded")
        return cls(**plain | {"fields": fields, "encoded": origin and Encoded.of(origin)})


class Source(Protocol):
    """Examples by position: dicts with `image` (uint8 [H, W, C]), `label` (int), asked-for fields.

    A set without labels has no `label`. `gather` returns many at once, each field as an array
    [N, ...]; images that differ in shape come as a list. A set of latents has no `image` but the
    fields `latent` (their mean) and `latent_std` (see `jdiff.data.encoded`).
    """

    info: Info

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]: ...

    def gather(self, indices: Sequence[int]) -> dict[str, Any]:
        """All fields of the examples at `indices`."""


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """A source in memory: each field is one array whose leading axis is the example."""

    info: Info
    fields: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return self.info.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {name: column[index] for name, column in self.fields.items()}
        return {k: v.item() if isinstance(v, np.generic) else v for k, v in row.items()}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self[i] for i in indices]

    def gather(self, indices: Sequence[int]) -> dict[str, Any]:
        """All fields of the examples at `indices`, as arrays [N, ...]."""
        indices = np.asarray(indices, np.int64)
        return {name: column[indices] for name, column in self.fields.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class RecordSource:
    """A source on disk: records of a TFDS folder, decoded when they are read."""

    info: Info
    records: Any  # a TFDS data source that leaves images encoded
    features: Mapping[str, str]  # our field -> name of the feature

    def __len__(self) -> int:
        return self.info.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        inside = [range(len(self))[int(i)] for i in indices]  # negative ones, and IndexError
        return [
            {field: _decode(field, row[feature]) for field, feature in self.features.items()}
            for row in self.records.__getitems__(inside)
        ]

    def gather(self, indices: Sequence[int]) -> dict[str, Any]:
        """All fields of the examples at `indices`; images of several shapes are a list."""
        rows = self.__getitems__(indices)
        return {field: stack(field, [row[field] for row in rows]) for field in self.features}


def source(
    name: str,
    split: str,
    data_dir: str | os.PathLike | None = None,
    *,
    fields: Sequence[str] = (),
    mirrored: bool = False,
    in_memory: bool | None = None,
    progress: Callable[[str], None] | None = None,
) -> Source:
    """The examples of one split of a data set.

    Args:
      name: `digits`, or a TFDS image set prepared below `data_dir` (`cifar10`,
        `imagenet_resized/64x64`, `emoji:1.0.0`).
      split: `train`, `test[:10%]`, `train[100:200]+test`, as in TFDS.
      data_dir: by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
      fields: further features to pass through, e.g. `("caption",)`; texts become str, and arrays
        of floats or bools are described in `Info.fields`.
      mirrored: of latents, read those of the mirror images too.
      in_memory: decode everything now. By default if the pixels and further arrays fit in
        `MEMORY_LIMIT` bytes.
      progress: told when everything is decoded; by default it prints to stderr.

    Raises:
      UserError: an unknown set, split or field (the nearest known one is offered), or a set that is
        not prepared (with the command that prepares it).
    """
    if name == "digits":
        return _digits(split, fields)
    rows = _records(folders.open_builder(name, data_dir), name, split, fields, mirrored)
    shape = rows.info.shape
    if in_memory is None:
        in_memory = None not in shape and rows.info.size * _bytes(rows) <= MEMORY_LIMIT
    if not in_memory:
        return rows
    if None in shape:
        raise UserError(f"{name}: its images differ in size, so they cannot be one array in memory")
    return _load(rows, progress or (lambda line: print(line, file=sys.stderr)))


def stack(field: str, values: list[Any]) -> Any:
    """One array from the values of a field; a list where images differ in shape."""
    if field == "image" and len({v.shape for v in values}) > 1:
        return values
    if values and isinstance(values[0], str):
        return np.asarray(values, object)
    return np.asarray(values, np.int32 if field == "label" else None)


def _digits(split: str, fields: Sequence[str]) -> ArraySource:
    if fields:
        choose("field of digits", fields[0], ())
    data = digits.load()
    chosen = digits.positions("digits", split, {s: len(v[1]) for s, v in data.items()})
    images = [data[s][0][i] for s, i in chosen]
    labels = [data[s][1][i] for s, i in chosen]
    info = Info("digits", split, (8, 8, 1), 10, tuple("0123456789"), len(chosen))
    return ArraySource(
        info,
        {
            "image": np.asarray(images, np.uint8).reshape(-1, 8, 8, 1),
            "label": np.asarray(labels, np.int32),
        },
    )


def _records(
    builder: Any, name: str, split: str, fields: Sequence[str], mirrored: bool
) -> RecordSource:
    import tensorflow_datasets as tfds

    features = builder.info.features
    origin = encoded.read(builder.data_path)
    pixels, shape = pictured(features, origin, name)
    latents = () if origin is None else origin.latents(mirrored and origin.mirrored)
    taken = {field: field for field in latents} if pixels is None else {"image": pixels}
    label = main(features, "label", tfds.features.ClassLabel)
    if label is not None:
        taken["label"] = label
    taken |= {f: choose(f"field of {name}", f, features) for f in fields}
    for part in split.split("+"):
        base = part.partition("[")[0].strip()
        if base != "all":
            choose(f"split of {name}", base, builder.info.splits)
    skipped = {} if pixels is None else {pixels: tfds.decode.SkipDecoding()}
    try:
        records = builder.as_data_source(split=split, decoders=skipped or None)
    except (ValueError, AssertionError) as error:
        raise UserError(f"split {split!r} of {name}: {str(error).splitlines()[0]}") from None
    classes = features[label] if label else None
    info = Info(
        name=name,
        split=split,
        shape=shape,
        num_classes=classes.num_classes if classes else 0,
        label_names=tuple(classes.names) if classes else (),
        size=len(records),
        fields=arrays(features, fields, name),
        encoded=origin,
    )
    return RecordSource(info, records, taken)


def pictured(
    features: Any, origin: Encoded | None, name: str
) -> tuple[str | None, tuple[int | None, ...]]:
    """(the feature that holds the images of a TFDS set, [H, W, C]); (None, that of the latents).

    Raises:
      UserError: there are neither images nor latents, or the images are not uint8.
    """
    import tensorflow_datasets as tfds

    if origin is not None and origin.autoencoder is not None:
        return None, tuple(features[encoded.MEAN].shape)
    found = main(features, "image", tfds.features.Image)
    if found is None:
        raise UserError(f"data set {name!r} has no image; its features: {', '.join(features)}")
    image = features[found]
    if np.dtype(image.np_dtype) != np.uint8:
        raise UserError(f"data set {name!r}: its images are {image.np_dtype}; only uint8 is read")
    return found, tuple(image.shape)


def main(features: Any, name: str, kind: type) -> str | None:
    """The name of a TFDS set's feature of this kind: `name`, else the first of the alphabet.

    (In which order TFDS lists the features of a folder is another one in every process.)
    """
    known = sorted(key for key, feature in features.items() if isinstance(feature, kind))
    return name if name in known else next(iter(known), None)


def arrays(features: Any, fields: Sequence[str], name: str) -> tuple[Field, ...]:
    """Those of the fields of a TFDS set that hold floats or bools; texts and labels do not.

    Raises:
      UserError: arrays whose shape differs between examples.
    """
    import tensorflow_datasets as tfds

    found = []
    for field in fields:
        feature = features[field]
        if not isinstance(feature, tfds.features.Tensor):
            continue
        dtype = np.dtype(feature.np_dtype)
        if dtype.kind not in "fb":
            continue
        if None in feature.shape:
            raise UserError(f"field {field!r} of {name}: its arrays differ in shape")
        found.append(Field(field, tuple(feature.shape), dtype.name))
    return tuple(found)


def _bytes(rows: RecordSource) -> int:
    """Of one example's arrays."""
    further = (math.prod(f.shape) * np.dtype(f.dtype).itemsize for f in rows.info.fields)
    floats = 4 * sum(name in encoded.LATENTS for name in rows.features)
    return math.prod(rows.info.shape) * (floats or 1) + sum(further)


def _decode(field: str, value: Any) -> Any:
    if field != "image":
        return value.decode() if isinstance(value, bytes) else value
    if isinstance(value, bytes):
        from PIL import Image

        with Image.open(io.BytesIO(value)) as image:
            value = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    return value if value.ndim == 3 else value[..., None]


def _load(rows: RecordSource, progress: Callable[[str], None]) -> ArraySource:
    """Decodes every record once."""
    start, size = time.monotonic(), len(rows)
    chunks = [rows.gather(range(i, min(i + 1000, size))) for i in range(0, size, 1000)]
    if not chunks:
        raise UserError(f"split {rows.info.split!r} of {rows.info.name} holds no examples")
    fields = {k: np.concatenate([c[k] for c in chunks]) for k in chunks[0]}
    progress(
        f"{rows.info.name} {rows.info.split}: decoded {size:,} images into memory "
        f"({time.monotonic() - start:.1f} s)"
    )
    return ArraySource(rows.info, fields)
