"""A small set of pictures, a tiny autoencoder, and a text encoder of words: what `encode` takes."""

import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jdiff import interop, models
from jdiff.autoencoders import kl
from jdiff.data.prepare import records

SIZES = {"train": 21, "test": 6}
SHAPE = (8, 8, 3)
FIELDS = {"channels": 3, "widths": (8, 8), "blocks": 1, "groups": 4, "attention": False}
WORDS, LENGTH, WIDTH = 7, 4, 5


def rows(split: str) -> list[dict]:
    """Pictures that are no mirror images of themselves, with a label and a caption."""
    random = np.random.default_rng(len(split))
    return [
        {
            "image": random.integers(0, 256, SHAPE, dtype=np.uint8),
            "label": i % 3,
            "caption": " ".join(["word"] * (1 + i % 3)) + f" {i}",
            "weight": np.float32(i / 7),
        }
        for i in range(SIZES[split])
    ]


def prepare(root: pathlib.Path) -> pathlib.Path:
    """Writes the set `pics` below `root`, which it returns."""

    def features(tfds):
        return tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=SHAPE),
                "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
                "caption": tfds.features.Text(),
                "weight": tfds.features.Scalar(np.float32),
            }
        )

    def examples(split):
        for row in rows(split):
            yield row | {"image": Image.fromarray(row["image"])}

    splits = {split: lambda split=split: examples(split) for split in SIZES}
    records.write(records.ImageSet("pics", "1.0.0", "", "", "", features, splits), root)
    return root


def save_autoencoder(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """Writes a folder of the diffusers layout with every weight random; returns it."""
    _, shapes = models.abstract(lambda rngs: kl.KL(**FIELDS, rngs=rngs))
    leaves, treedef = jax.tree.flatten(shapes)
    random = np.random.default_rng(seed)
    drawn = [jnp.asarray(0.3 * random.normal(size=a.shape), a.dtype) for a in leaves]
    made = interop.component("AutoencoderKL", treedef.unflatten(drawn), **FIELDS)
    made.config["scaling_factor"] = 0.7
    interop.save_component(made, folder)
    return folder


class Reader:
    """As a `TextEncoder`: the states of a text are functions of the numbers of its letters."""

    length = LENGTH

    @property
    def tokenizer(self):
        return self

    def room(self, length):
        """Nothing begins or ends a text."""
        return length

    def pieces(self, texts):
        """A word is a token."""
        return [types.SimpleNamespace(ids=text.split()) for text in texts]

    def replace(self, **fields):
        """It has one length."""
        assert fields.get("length", LENGTH) == LENGTH
        return self

    def encode(self, texts, *, sharding=None):
        seen = np.asarray([[i < len(t.split()) for i in range(LENGTH)] for t in texts])
        sums = np.asarray([sum(map(ord, t)) % 97 for t in texts], np.float32)
        text = np.sin(sums[:, None, None] + np.arange(LENGTH * WIDTH).reshape(LENGTH, WIDTH))
        pooled = np.cos(sums[:, None] + np.arange(WIDTH))
        return {k: jnp.asarray(v) for k, v in
                {"text": text, "mask": seen, "pooled": pooled}.items()}  # fmt: skip
