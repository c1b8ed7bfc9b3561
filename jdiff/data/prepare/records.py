"""Image sets as ordinary TFDS folders (array_record), written without TensorFlow.

The folder `<data_dir>/<name>/<version>` is built beside its place, checked by reading it back,
and renamed when it is whole: a half-written set never looks prepared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jdiff.data import folders
from jdiff.data.prepare import packages

Example = Mapping[str, Any]  # images as PIL images: TFDS encodes those without TensorFlow


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """What a TFDS folder will hold.

    Attributes:
      name, version: the folder; TFDS's own where it knows the set.
      description, homepage, citation: for dataset_info.json.
      features: a function of the `tensorflow_datasets` module that gives its FeaturesDict.
      splits: split name -> function that yields the examples in order.
      shuffle: store the examples in TFDS's hashed order. False keeps the given one, so that record
        i is example i.
    """

    name: str
    version: str
    description: str
    homepage: str
    citation: str
    features: Callable[[Any], Any]
    splits: Mapping[str, Callable[[], Iterable[Example]]]
    shuffle: bool = False


def folder(name: str, version: str, data_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """Where a set lies, or would lie."""
    return folders.data_root(data_dir) / name / version


def is_prepared(path: pathlib.Path) -> bool:
    """Whether a whole set lies in `path`: TFDS writes dataset_info.json last."""
    return (path / "dataset_info.json").is_file()


def write(
    image_set: ImageSet,
    data_dir: str | os.PathLike | None = None,
    check: Callable[[pathlib.Path], None] = lambda data_dir: None,
) -> pathlib.Path:
    """Writes `image_set` below `data_dir` and returns its folder.

    `check(data_dir)` reads the finished set back from where it lies for now, and raises if it is
    not what it should be; only then it is moved to its place.

    Raises:
      packages.PrepareError: from `check`, or another file stands where the folder should go.
    """
    import tensorflow_datasets as tfds

    root = folders.data_root(data_dir)
    target = folder(image_set.name, image_set.version, data_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise packages.PrepareError(f"{target} exists and is no prepared set; move it away")
    root.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".incomplete-{image_set.name}-", dir=root))
    try:
        builder = _builder_class(tfds, image_set)(data_dir=scratch, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            builder.download_and_prepare()  # its bars and its banner name the scratch folder
        built = folder(image_set.name, image_set.version, scratch)
        check(scratch)
        target.parent.mkdir(exist_ok=True)
        try:
            os.replace(built, target)
        except OSError:
            if not is_prepared(target):  # by another process, meanwhile: as good as ours
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _builder_class(tfds: Any, image_set: ImageSet) -> type:
    # TFDS registers builders by class; ours would collide with its own cifar10.
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = image_set.name
        VERSION = tfds.core.Version(image_set.version)
        code_path = None  # TFDS would need the package importlib_resources to find this file

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description=image_set.description,
                features=image_set.features(tfds),
                supervised_keys=("image", "label"),
                homepage=image_set.homepage,
                citation=image_set.citation,
                disable_shuffling=not image_set.shuffle,
            )

        def _split_generators(self, dl_manager):
            del dl_manager  # the packages are here already
            return {s: self._generate_examples(make) for s, make in image_set.splits.items()}

        def _generate_examples(self, make):
            yield from enumerate(make())

    return Builder
