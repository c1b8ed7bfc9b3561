"""Small sets for the data tests."""

import numpy as np
import pytest
from PIL import Image

from jdiff.data import sources
from jdiff.data.prepare import records


def array_source(size=103, shape=(4, 6, 3), name="toy", split="train"):
    """`size` different random images, labelled i mod 10."""
    images = np.random.default_rng(7).integers(0, 256, (size, *shape), dtype=np.uint8)
    labels = np.arange(size, dtype=np.int32) % 10
    info = sources.Info(name, split, shape, 10, tuple("abcdefghij"), size)
    return sources.ArraySource(info, {"image": images, "label": labels})


def embeddings(split):
    """The texts [25, 3, 4] of the set `tiny`."""
    return np.random.default_rng(len(split)).normal(size=(25, 3, 4)).astype(np.float32)


@pytest.fixture(scope="session")
def make_source():
    return array_source


@pytest.fixture(scope="session")
def toy():
    return array_source()


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """A prepared TFDS set `tiny` (25 train, 11 test) with captions and embeddings of them.

    Returns its data_dir.
    """
    data_dir = tmp_path_factory.mktemp("tfds")
    sets = {"train": array_source(25, (5, 7, 3)), "test": array_source(11, (5, 7, 3))}

    def features(tfds):
        return tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(5, 7, 3)),
                "label": tfds.features.ClassLabel(names=list("abcdefghij")),
                "caption": tfds.features.Text(),
                "text": tfds.features.Tensor(shape=(3, 4), dtype=np.float32),
                "text_mask": tfds.features.Tensor(shape=(3,), dtype=np.bool_),
            }
        )

    def examples(split):
        for i, row in enumerate(sets[split]):
            caption = f"{split} picture {i} \u00e9"
            told = {"text": embeddings(split)[i], "text_mask": np.arange(3) <= i % 3}
            yield {**row, **told, "image": Image.fromarray(row["image"]), "caption": caption}

    image_set = records.ImageSet(
        name="tiny",
        version="1.0.0",
        description="",
        homepage="",
        citation="",
        features=features,
        splits={split: lambda split=split: examples(split) for split in sets},
    )
    records.write(image_set, data_dir)
    return data_dir
