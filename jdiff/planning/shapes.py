"""What a plan needs of the data: the size of an image and the number of classes. Nothing is read.

A prepared set says so itself. Of sets that are not prepared on this machine, the usual ones are
known; of others the user says it.
"""

from typing import Any

from jdiff.data.sources import Info
from jdiff.errors import UserError

#: (shape, classes), from the sets' own papers and TFDS's catalogue; None: images differ in size.
KNOWN: dict[str, tuple[tuple[int | None, int | None, int], int]] = {
    "digits": ((8, 8, 1), 10),
    "mnist": ((28, 28, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "svhn_cropped": ((32, 32, 3), 10),
    "imagenet2012": ((None, None, 3), 1000),
    "imagenet_resized/8x8": ((8, 8, 3), 1000),
    "imagenet_resized/16x16": ((16, 16, 3), 1000),
    "imagenet_resized/32x32": ((32, 32, 3), 1000),
    "imagenet_resized/64x64": ((64, 64, 3), 1000),
    "downsampled_imagenet/32x32": ((32, 32, 3), 0),
    "downsampled_imagenet/64x64": ((64, 64, 3), 0),
    "celeb_a": ((218, 178, 3), 0),
    "celeb_a_hq/256": ((256, 256, 3), 0),
}


def info(
    config: Any, shape: tuple[int, int, int] | None = None, classes: int | None = None
) -> Info:
    """The `data.Info` of `config.data`, without its size; images as the pipeline hands them on.

    Args:
      shape: [H, W, C] of the images, and `classes`: instead of what is known of the set.

    Raises:
      UserError: the set is neither prepared nor known, or its images differ in size.
    """
    from jdiff.experiment import prepared

    name = config.data.name
    if shape is not None:
        return Info(name, "train", tuple(shape), 0 if classes is None else classes, (), 0)
    usual = None if config.data.conditions else KNOWN.get(name.partition(":")[0])
    known, number, *fields = usual or _prepared(name, config.data)
    number = number if classes is None else classes
    return prepared(Info(name, "train", known, number, (), 0, *fields), config.data)


def _prepared(name: str, data: Any) -> tuple[tuple, int, tuple, Any]:
    """What the folder of a prepared set says of `config.data`, without opening its records."""
    import tensorflow_datasets as tfds

    from jdiff.data import encoded, folders, sources

    try:
        builder = folders.open_builder(name, data.data_dir)
        features, origin = builder.info.features, encoded.read(builder.data_path)
    except UserError as error:
        raise UserError(
            f"{error} To plan without it, say what its images are: --shape=64,64,3 --classes=1000."
        ) from None
    try:
        _, shape = sources.pictured(features, origin, name)
    except UserError as error:
        raise UserError(f"{error}; say --shape=H,W,C.") from None
    label = sources.main(features, "label", tfds.features.ClassLabel)
    number = 0 if label is None else features[label].num_classes
    known = [name for name in data.conditions if name in features]  # of others the experiment tells
    return shape, number, sources.arrays(features, known, name), origin
