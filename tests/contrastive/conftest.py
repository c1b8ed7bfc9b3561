"""A set of coloured pictures whose captions name the colour, and a run that has learnt it."""

import numpy as np
import pytest
from made_colours import SIDE, STYLE, TOKENS, WIDTH, pictures, told
from PIL import Image
from rich.console import Console

from jdiff import train
from jdiff.contrastive import kind
from jdiff.data.prepare import records


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """The data_dir of the prepared set `colours`."""
    data_dir = tmp_path_factory.mktemp("colours")

    def features(tfds):
        return tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(SIDE, SIDE, 3)),
                "caption": tfds.features.Text(),
                "text": tfds.features.Tensor(shape=(TOKENS, WIDTH), dtype=np.float32),
                "text_mask": tfds.features.Tensor(shape=(TOKENS,), dtype=np.bool_),
                "pooled": tfds.features.Tensor(shape=(WIDTH,), dtype=np.float32),
            }
        )

    def examples(split):
        for image, caption in pictures(split):
            yield {"image": Image.fromarray(image), "caption": caption, **told(caption)}

    records.write(
        records.ImageSet(
            name="colours", version="1.0.0", description="", homepage="", citation="",
            features=features,
            splits={split: lambda split=split: examples(split) for split in ("train", "test")},
        ),
        data_dir,
    )  # fmt: skip
    return data_dir


@pytest.fixture(scope="session")
def config(colours):
    """Trains in seconds, over the four devices."""
    c = kind.defaults()
    c.name = "colours"
    c.data.update({"name": "colours", "data_dir": str(colours), "threads": 0})
    c.model.update({"dim": 16, "channels": 8, "multipliers": (1,), "stem": 4, "blocks": 1,
                    "text_tokens": 16, "text_depth": 1})  # fmt: skip
    c.loss.shift = 0.125
    c.optimizer.update({"name": "adam", "learning_rate": 3e-3, "clip": 1.0})
    c.ema = {"ema": {"kind": "constant", "decay": 0.9}}
    c.train.update({"batch_size": 32, "steps": 60, "log_every": 20})
    c.sampling.batch = 32
    c.evaluation.same = STYLE
    return c


@pytest.fixture(scope="session")
def trained(config, tmp_path_factory):
    """The directory of a run of `config`."""
    workdir = tmp_path_factory.mktemp("runs") / "colours"
    train.train(config, workdir, Console(quiet=True))
    return workdir
