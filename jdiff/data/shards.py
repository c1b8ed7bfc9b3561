"""A TFDS folder that is written shard by shard, so that work on it may be cut off and taken up.

Until it is whole it lies beside its place, as `.unfinished-<name>`: each shard is a file that is
there in full or not at all, and a plan says what the shards are of. Nothing depends on when the
work was cut off: the finished folder is the same, byte for byte.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jdiff.data import encoded
from jdiff.errors import UserError

VERSION = "1.0.0"
_PLAN = "plan.json"


class Shard(NamedTuple):
    """Examples [start, stop) of a split, in one file; `number` of `count` of the split's."""

    split: str
    number: int
    count: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Shards:
    """The folder in the making.

    Attributes:
      name: of the set.
      root: the folder of TFDS sets.
      features: a function of the `tensorflow_datasets` module that gives its FeaturesDict.
      sizes: examples of each split.
      length: examples of a shard.
      description: for dataset_info.json.
    """

    name: str
    root: pathlib.Path
    features: Callable[[Any], Any]
    sizes: Mapping[str, int]
    length: int
    description: str = ""

    @property
    def target(self) -> pathlib.Path:
        """Where the whole set will lie."""
        return self.root / self.name / VERSION

    @property
    def work(self) -> pathlib.Path:
        """Where it lies until then."""
        return unfinished(self.root, self.name)

    def all(self) -> list[Shard]:
        """Every shard, split by split."""
        found = []
        for split, size in self.sizes.items():
            count = max(1, -(-size // self.length))
            for k in range(count):
                ends = k * self.length, min((k + 1) * self.length, size)
                found.append(Shard(split, k, count, *ends))
        return found

    def is_written(self, shard: Shard) -> bool:
        """Whether its file is there, whole."""
        return self.path(shard).is_file()

    def path(self, shard: Shard) -> pathlib.Path:
        """The file of a shard."""
        end = f"{shard.number:05d}-of-{shard.count:05d}"
        return self.work / f"{self.name}-{shard.split}.array_record-{end}"

    def write(self, shard: Shard, rows: Iterable[Mapping[str, Any]]) -> None:
        """The examples of a shard, in order; the file is there once all of them are in it."""
        import tensorflow_datasets as tfds
        from array_record.python import array_record_module
        from tensorflow_datasets.core import example_serializer

        features = self.features(tfds)
        serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
        partial = self.work / f".{self.path(shard).name}.{os.getpid()}"
        # Floats are not worth compressing: it takes five times as long, for six percent.
        writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
        try:
            for row in rows:
                example = serializer.get_tf_example(features.encode_example(row))
                writer.write(example.SerializeToString(deterministic=True))
            writer.close()
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(self.path(shard))
        finally:
            if writer.is_open():
                writer.close()
            partial.unlink(missing_ok=True)

    def finish(
        self, about: encoded.Encoded, empty: Mapping[str, Any], plan: Mapping[str, Any]
    ) -> pathlib.Path:
        """Writes what belongs to a whole set, and puts it in its place, which it returns."""
        import tensorflow_datasets as tfds

        splits = []
        for split in self.sizes:
            files = [shard for shard in self.all() if shard.split == split]
            template = tfds.core.ShardedFileTemplate(
                dataset_name=self.name, split=split, filetype_suffix="array_record",
                data_dir=self.work,
            )  # fmt: skip
            splits.append(
                tfds.core.SplitInfo(
                    name=split, shard_lengths=[shard.stop - shard.start for shard in files],
                    num_bytes=sum(self.path(shard).stat().st_size for shard in files),
                    filename_template=template,
                )
            )  # fmt: skip
        info = _builder(tfds, self).info
        info.set_splits(tfds.core.splits.SplitDict(splits))
        info.write_to_directory(self.work)
        for path in (self.work / "features.json", self.work / "dataset_info.json"):
            tree = json.loads(path.read_text())  # TFDS's order is another in every process
            path.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n")
        encoded.write(self.work, about, empty, plan)
        for path in self.work.iterdir():
            if path.name == _PLAN or path.name.startswith("."):  # what a killed process left
                path.unlink()
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.work.replace(self.target)
        return self.target


def unfinished(root: pathlib.Path, name: str) -> pathlib.Path:
    """Where the set `name` lies until it is whole."""
    return root / f".unfinished-{name}"


def begin(root: pathlib.Path, name: str, plan: Mapping[str, Any]) -> None:
    """Makes the folder of the unfinished set, or checks that it is of this plan.

    Args:
      plan: all that the records depend on, as JSON-able values.

    Raises:
      UserError: an unfinished set of another plan; it says what differs. Or it cannot be written.
    """
    work = unfinished(root, name)
    path = work / _PLAN
    try:
        if path.is_file():
            differ = differing(json.loads(path.read_text()), plan)
            if differ:
                raise UserError(
                    f"{work} is the beginning of another set: {differ}. Go on with that one, name "
                    f"another --name, or delete the folder."
                )
            return
        if work.exists():  # killed before it had a plan: nothing in it is of use
            shutil.rmtree(work)
        work.mkdir(parents=True)
        partial = path.with_name(f".{_PLAN}.{os.getpid()}")
        partial.write_text(json.dumps(plan, indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{work} cannot be written: {error.strerror or error}.") from error


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`size was 64 and is 32; ...`: in what two plans differ."""
    before, now = json.loads(json.dumps(before)), json.loads(json.dumps(now))
    names = [*now, *(name for name in before if name not in now)]
    return "; ".join(
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    )


def whole(root: pathlib.Path, name: str) -> dict[str, Any] | None:
    """The plan of what lies in the place of a set already; None if nothing does.

    Raises:
      UserError: something else lies there.
    """
    target = root / name / VERSION
    if not target.exists():
        return None
    if encoded.read(target) is None:
        raise UserError(f"{target} was not written by `jdiff encode`; give another --name.")
    return encoded.read_plan(target)


def check_name(name: str) -> str:
    """`name`, if a set may be called so.

    Raises:
      UserError: it may not.
    """
    if not re.fullmatch(r"[a-zA-Z]\w*", name):
        raise UserError(
            f"--name={name!r}: letters, digits and _ make a set's name, as emoji_latents."
        )
    return name


def _builder(tfds: Any, shards: Shards) -> Any:
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = shards.name
        VERSION = tfds.core.Version(VERSION)
        code_path = None  # TFDS would need the package importlib_resources to find this file

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, description=shards.description, features=shards.features(tfds),
                disable_shuffling=True,
            )  # fmt: skip

        def _split_generators(self, dl_manager):
            raise NotImplementedError  # its files are written by `Shards.write`

        def _generate_examples(self):
            raise NotImplementedError

    return Builder(data_dir=shards.root, file_format="array_record")
