"""A data set through an autoencoder and a text encoder, once, so that training need not wait.

What is written is a TFDS folder (see `jdiff.data.shards`): the latents of each image as mean and
deviation, from which training draws anew each epoch, and the states of its caption; labels and
texts are kept. Records are in the order of the original set, so example i is example i of it.
"""

import collections
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import latents
from jdiff.data import encoded, folders, patience, pipeline, shards, sources
from jdiff.errors import UserError, choose
from jdiff.experiment import to_float
from jdiff.parallel import hosts
from jdiff.pytree import Array

#: Examples of a file, about: what is done again if the work is cut off.
SHARD = 2048
DTYPES = ("float32", "float16")
#: The fields of a text's states; half precision is enough for what is normalised anyway.
_TEXTS = {"text": "text", "mask": "text_mask", "pooled": "pooled"}
_END = object()


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be encoded, and how; None is the usual.

    Attributes:
      data: the set of images, as `sources.source` takes it.
      name: of the set that is written.
      size, crop, resample: of the images, as in `pipeline.batches`.
      autoencoder: a run directory or a folder, see `latents.open_autoencoder`; None: images stay.
      mirrored: encode the mirror image of each image too.
      dtype: of the latents in the folder, see `DTYPES`.
      text: "minilm" or the folder of a text encoder; None: no texts are encoded.
      tokenizer: its folder, where it is not beside the encoder's.
      length: tokens of a text; as many as the longest has, rounded up to 8, unless given.
      caption: the field of the texts; "caption" unless given.
      splits: those to encode; all unless given.
      batch: images at a time.
      data_dir: the folder of TFDS sets.
    """

    data: str
    name: str
    size: int | None = None
    crop: str | None = None
    resample: str = "bicubic"
    autoencoder: str | None = None
    mirrored: bool = False
    dtype: str = "float32"
    text: str | None = None
    tokenizer: str | None = None
    length: int | None = None
    caption: str | None = None
    splits: tuple[str, ...] | None = None
    batch: int = 64
    data_dir: str | pathlib.Path | None = None


class Original(NamedTuple):
    """The set that is encoded.

    Attributes:
      splits: the examples of each split, read as they are wanted.
      kept: TFDS features of what is kept of an example, by name.
      folder: its TFDS folder, or None for bundled images.
    """

    splits: Mapping[str, Any]
    kept: Mapping[str, Any]
    folder: Any

    @property
    def info(self) -> sources.Info:
        """Of the first split."""
        return next(iter(self.splits.values())).info


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What becomes of a batch: its latents, on all devices of this process, and its texts'.

    Attributes:
      coder: the `Autoencoder`, or None.
      reader: the `TextEncoder`, or None.
      batch: images at a time; of fewer, the last is repeated.
      dtype: of the latents.
      fields: those of the latents that are kept (`Encoded.latents`).
      caption: the field of the texts.
    """

    coder: Any
    reader: Any
    batch: int
    dtype: str
    fields: tuple[str, ...] = ()
    caption: str | None = None

    @functools.cached_property
    def sharding(self) -> jax.NamedSharding:
        """Of a batch: over this process's devices."""
        mesh = jax.sharding.Mesh(jax.local_devices(), "batch")
        return jax.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))

    @functools.cached_property
    def placed(self) -> Any:
        """The autoencoder, a copy on each of them."""
        whole = jax.NamedSharding(self.sharding.mesh, jax.sharding.PartitionSpec())
        return jax.device_put(self.coder, whole)

    def moments(self, images: np.ndarray) -> tuple[Array, Array]:
        """(mean, deviation) of the latents of uint8 images; begun, and not waited for."""
        devices = self.sharding.num_devices
        rows = np.minimum(np.arange(-(-self.batch // devices) * devices), len(images) - 1)
        return _moments(self.placed, jax.device_put(images[rows], self.sharding), self.dtype)

    def begin(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a batch that are the models', on the way."""
        found: dict[str, Any] = {}
        if self.coder is not None:
            found |= zip(encoded.LATENTS[:2], self.moments(batch["image"]))
        if encoded.MIRRORED_MEAN in self.fields:
            mirror = self.moments(batch["image"][:, :, ::-1])
            found |= zip(encoded.LATENTS[2:], mirror)
        found = {name: found[name] for name in self.fields}
        if self.reader is not None:
            found |= read(self.reader, list(batch[self.caption]), self.sharding)
        return found


@functools.partial(jax.jit, static_argnames="dtype")
def _moments(coder: Any, images: Array, dtype: str) -> tuple[Array, Array]:
    mean, std = coder.moments(to_float(images))
    return mean.astype(dtype), std.astype(dtype)


def read(reader: Any, texts: list[str], sharding: Any = None) -> dict[str, Array]:
    """What the folder holds of texts: "text" float16 `[B, S, D]`, "text_mask", "pooled"."""
    found = reader.encode(texts, sharding=sharding)
    half = lambda a: a.astype("float16") if jnp.issubdtype(a.dtype, jnp.floating) else a
    return {_TEXTS[name]: half(array) for name, array in found.items()}


def encode(wanted: Wanted, tell: Callable[..., None] = lambda *_: None) -> pathlib.Path:
    """Encodes a data set and returns the folder; goes on where it was cut off.

    Of many processes (`parallel.hosts`) each encodes every n-th shard of n; they share the folder.

    Args:
      tell: tell(text) of what is done, tell(text, done, total) of the examples.

    Raises:
      UserError: neither autoencoder nor text encoder, one that cannot be opened, images whose size
        the autoencoder does not divide, a set of that name of other things, finished or not.
    """
    shards.check_name(wanted.name)
    choose("--dtype", wanted.dtype, DTYPES)
    root, line = folders.data_root(wanted.data_dir), hosts.line()
    original = open_original(wanted)
    encoder = open_encoder(wanted, original)
    encoder, shape, about = described(wanted, original, encoder, tell)
    empty = {} if encoder.reader is None else read(encoder.reader, [""])
    empty = {name: np.asarray(array[0]) for name, array in empty.items()}
    sizes = {split: len(source) for split, source in original.splits.items()}
    plan = _plan(wanted, about, sizes, encoder.reader)
    if (before := shards.whole(root, wanted.name)) is not None:
        if differ := shards.differing(before, plan):
            raise UserError(
                f"{root / wanted.name} is another set: {differ}. Give another --name, or delete it."
            )
        tell(f"{root / wanted.name / shards.VERSION} is there already")
        return root / wanted.name / shards.VERSION
    written = shards.Shards(
        wanted.name, root, _features(original.kept, shape, about, wanted.dtype, empty), sizes,
        max(1, round(SHARD / wanted.batch)) * wanted.batch, _description(about),
    )  # fmt: skip
    with hosts.first_before_others("encode"):
        shards.begin(root, wanted.name, plan)
    _write(wanted, original, encoder, written, line, tell)
    _wait_for_all(line)
    if line.first:
        written.finish(about, _inherited(original.folder) | empty, plan)
    _wait_for_all(line)
    return written.target


def open_original(wanted: Wanted) -> Original:
    """The set of images, and what of it is kept.

    Raises:
      UserError: as `sources.source`; a set of latents; splits that it does not have.
    """
    import tensorflow_datasets as tfds

    features, folder, splits = {}, None, ("train", "test")
    if wanted.data == "digits":
        digits = sources.source("digits", "train").info
        features = {"label": tfds.features.ClassLabel(names=list(digits.label_names))}
    else:
        builder = folders.open_builder(wanted.data, wanted.data_dir)
        folder, splits = builder.data_path, tuple(sorted(builder.info.splits))
        plain = (tfds.features.ClassLabel, tfds.features.Text, tfds.features.Tensor,
                 tfds.features.Scalar)  # fmt: skip
        features = {
            name: feature for name, feature in sorted(builder.info.features.items())
            if type(feature) in plain and None not in feature.shape
        }  # fmt: skip
    for split in wanted.splits or ():
        choose(f"--splits: split of {wanted.data}", split, splits)
    fields = () if wanted.data == "digits" else tuple(features)
    chosen = {
        split: patience.readable(wanted.data, split, wanted.data_dir, fields, in_memory=False)
        for split in wanted.splits or splits
    }
    original = Original(chosen, features, folder)
    if original.info.latent:
        raise UserError(f"{wanted.data} holds latents already; name the set of their images.")
    return original


def open_encoder(wanted: Wanted, original: Original) -> Encoder:
    """The models.

    Raises:
      UserError: neither is wanted, one cannot be opened, or there is no such field of texts.
    """
    if wanted.autoencoder is None and wanted.text is None:
        raise UserError("nothing to encode with: give --autoencoder, --text, or both.")
    if wanted.mirrored and wanted.autoencoder is None:
        raise UserError("--flip is for latents; images are mirrored as they are read.")
    coder = reader = caption = None
    if wanted.autoencoder is not None:
        coder = latents.open_autoencoder(wanted.autoencoder)
    if wanted.text is not None:
        import tensorflow_datasets as tfds

        texts = [k for k, f in original.kept.items() if type(f) is tfds.features.Text]
        caption = choose(f"--caption: texts of {wanted.data}", wanted.caption or "caption", texts)
        reader = open_reader(wanted.text, wanted.tokenizer).replace(batch=wanted.batch)
        length = wanted.length or _longest(reader, wanted, caption, tuple(original.splits))
        reader = reader.replace(length=length)
    return Encoder(coder, reader, wanted.batch, wanted.dtype, caption=caption)


def open_reader(text: str, tokenizer: str | None = None) -> Any:
    """The `TextEncoder` that --text names.

    Raises:
      UserError: it cannot be opened.
    """
    if text == "minilm":
        from jdiff import texts

        return texts.minilm()
    from jdiff import interop

    options = {} if tokenizer is None else {"tokenizer": tokenizer}
    return interop.text_encoder(text, **options)


def _longest(reader: Any, wanted: Wanted, caption: str, splits: Sequence[str]) -> int:
    """Tokens of the longest text, rounded up to 8, at most as many as the encoder reads."""
    ends, most = reader.length - reader.tokenizer.room(reader.length), 1
    for split in splits:
        rows = sources.source(wanted.data, split, wanted.data_dir, in_memory=False)
        rows = dataclasses.replace(rows, features={caption: caption})  # and no images
        for start in range(0, len(rows), 1000):
            found = rows.gather(range(start, min(start + 1000, len(rows))))[caption]
            most = max(most, *(len(one.ids) for one in reader.tokenizer.pieces(list(found))))
    return min(reader.length, -(-(most + ends) // 8) * 8)


def described(
    wanted: Wanted, original: Original, encoder: Encoder, tell: Callable[..., None]
) -> tuple[Encoder, tuple[int, ...], encoded.Encoded]:
    """(the encoder, told what is kept of the latents; the shape of an image's latents, or of the
    image; what the folder says of itself): by its first batch."""
    feed = _feed(wanted, next(iter(original.splits.values())))
    if None in feed.shape:
        raise UserError(
            f"the images of {wanted.data} differ in size; give --size, and --crop=center."
        )
    about = encoded.Encoded(
        source=wanted.data, shape=tuple(feed.shape), size=wanted.size, crop=wanted.crop,
        resample=wanted.resample, text=wanted.text, caption=encoder.caption,
    )  # fmt: skip
    if encoder.coder is None:
        return encoder, about.shape, about
    mean, std = (np.asarray(part, np.float32) for part in encoder.moments(next(feed)["image"]))
    about = dataclasses.replace(
        about, autoencoder=str(pathlib.Path(wanted.autoencoder).expanduser().absolute()),
        digest=latents.digest(encoder.coder), factor=encoder.coder.factor, drawn=bool(std.any()),
        mirrored=wanted.mirrored,
    )  # fmt: skip
    spread = float(np.sqrt(mean.var() + np.square(std).mean()))
    tell(
        f"latents {list(mean.shape[1:])} of images {list(about.shape)}, deviation {spread:.2f} in "
        "the first batch (networks expect about 1: the autoencoder's scale)"
    )
    fields = about.latents(wanted.mirrored)
    return dataclasses.replace(encoder, fields=fields), mean.shape[1:], about


def _write(
    wanted: Wanted, original: Original, encoder: Encoder, written: shards.Shards, line: Any,
    tell: Callable[..., None],
) -> None:  # fmt: skip
    """Encodes and writes the shards that are missing, this process's part of them."""
    # A part of all, not of what is missing: of that, processes that look at other moments differ.
    mine = written.all()[line.index :: line.count]
    todo = [shard for shard in mine if not written.is_written(shard)]
    total, left = (sum(s.stop - s.start for s in some) for some in (mine, todo))
    if left < total:
        tell(f"going on: {len(mine) - len(todo)} of {len(mine)} files are there")
    done = total - left

    def rows(parts: Iterator[tuple[shards.Shard, list[dict[str, Any]]]]) -> Iterator[dict]:
        nonlocal done
        for shard, some in parts:
            yield from some
            done += len(some)
            tell(shard.split, done, total)

    made = _ahead(_batches(wanted, original, encoder, todo), 2)
    for shard, parts in itertools.groupby(made, key=lambda part: part[0]):
        written.write(shard, rows(parts))


def _batches(
    wanted: Wanted, original: Original, encoder: Encoder, todo: Sequence[shards.Shard]
) -> Iterator[tuple[shards.Shard, list[dict[str, Any]]]]:
    """(shard, some of its rows), in order; the devices work on the next batch meanwhile."""
    waiting = None
    for shard, batch in _read(wanted, original, todo):
        begun = shard, batch, encoder.begin(batch)
        if waiting is not None:
            yield waiting[0], _rows(original.kept, *waiting[1:])
        waiting = begun
    if waiting is not None:
        yield waiting[0], _rows(original.kept, *waiting[1:])


def _read(
    wanted: Wanted, original: Original, todo: Sequence[shards.Shard]
) -> Iterator[tuple[shards.Shard, dict[str, Any]]]:
    """(shard, a batch of images and what belongs to them)."""
    feed, split, at = None, None, 0
    for shard in todo:
        if shard.split != split:
            feed, split, at = _feed(wanted, original.splits[shard.split]), shard.split, 0
        first, last = shard.start // wanted.batch, -(-shard.stop // wanted.batch)
        if at != first:
            feed.set_state({"batches": first, "of": feed.identity})
        for _ in range(first, last):
            yield shard, next(feed)
        at = last


def _feed(wanted: Wanted, source: Any) -> pipeline.Batches:
    threads = min(8, os.cpu_count() or 1)
    return pipeline.batches(
        source, wanted.batch, train=False, crop=wanted.crop, size=wanted.size,
        resample=wanted.resample, shard_index=0, shard_count=1, threads=threads,
    )  # fmt: skip


def _rows(
    kept: Mapping[str, Any], batch: Mapping[str, Any], begun: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The examples of a batch, as the folder holds them; waits for what was begun."""
    columns = {name: batch[name] for name in kept}
    if not any(name in encoded.LATENTS for name in begun):
        columns["image"] = [_picture(image) for image in batch["image"]]
    columns |= {name: np.asarray(array) for name, array in begun.items()}
    count = len(batch["id"])
    return [{name: column[i] for name, column in columns.items()} for i in range(count)]


def _picture(image: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _ahead(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """The same, made in a thread, so many of them before they are asked for."""
    with ThreadPoolExecutor(1) as pool:
        waiting = collections.deque(pool.submit(next, items, _END) for _ in range(depth))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, items, _END))
            yield item


def _features(
    kept: Mapping[str, Any], shape: tuple[int, ...], about: encoded.Encoded, dtype: str,
    empty: Mapping[str, np.ndarray],
) -> Callable[[Any], Any]:  # fmt: skip
    """`tensorflow_datasets` -> the FeaturesDict."""

    def features(tfds: Any) -> Any:
        array = lambda shape, dtype: tfds.features.Tensor(
            shape=shape, dtype=np.dtype(dtype).type, encoding="bytes"
        )
        own = {name: array(shape, dtype) for name in about.latents(about.mirrored)}
        own = own or {"image": tfds.features.Image(shape=shape)}
        own |= {name: array(a.shape, a.dtype) for name, a in empty.items()}
        return tfds.features.FeaturesDict({**kept, **own})

    return features


def _plan(
    wanted: Wanted, about: encoded.Encoded, sizes: Mapping[str, int], reader: Any
) -> dict[str, Any]:
    """All that the records depend on; not where the models lie now."""
    plan = dataclasses.asdict(about) | {"splits": dict(sizes), "batch": wanted.batch}
    del plan["autoencoder"]
    plan |= {"dtype": wanted.dtype} if about.autoencoder else {}
    return plan | ({} if reader is None else {"length": reader.length})


def _inherited(folder: Any) -> dict[str, np.ndarray]:
    """The states of the empty text, of a set of images whose texts were encoded before."""
    return {} if folder is None else encoded.read_empty(folder)


def _description(about: encoded.Encoded) -> str:
    what = "Latents" if about.autoencoder else "Images"
    return f"{what} of {about.source}{', with encoded texts' if about.text else ''}."


def _wait_for_all(line: Any) -> None:
    if line.count > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("encoded")
