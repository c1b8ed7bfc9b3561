"""What `jdiff encode` costs beside the encoder itself.

    python benchmarks/encode.py            # --quick: fewer images

Images of 128 x 128 in a TFDS folder are read, decoded, resized to 64 x 64, put through an
autoencoder of random weights (f = 4, 4 channels), and written with means and deviations; the bare
encoder gets as many batches that are in memory already. Images a second of the one over those of
the other, which has to be at least 0.9. What is done once, whatever the number of images (opening
the set, the digest of the weights, a first batch that tells the latents' scale), is told apart.
"""

import argparse
import itertools
import pathlib
import tempfile
import time

import jax
import numpy as np
from PIL import Image
from timing import table, verdict

from jdiff import encoding, interop, latents, models
from jdiff.autoencoders import KL, autoencoder, kl_sd
from jdiff.data.prepare import records

BATCH, SIDE = 64, 64


def prepare(root: pathlib.Path, count: int) -> None:
    """A set of smooth pictures, of which PNG files are about as large as of drawings."""
    random = np.random.default_rng(0)

    def examples():
        for _ in range(count):
            small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            yield {"image": small.resize((128, 128), Image.Resampling.BICUBIC), "label": 0}

    def features(tfds):
        return tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(128, 128, 3)),
                "label": tfds.features.ClassLabel(num_classes=1),
            }
        )

    records.write(
        records.ImageSet("pics", "1.0.0", "", "", "", features, {"train": examples}), root
    )


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true")
    p.add_argument("--width", type=int, default=64, help="channels of the first level (default 64)")
    p.add_argument("--batches", type=int, default=32, help=f"of {BATCH} images (default 32)")
    p.add_argument("--rounds", type=int, default=3, help="repetitions, the best counts (default 3)")
    a = p.parse_args()
    batches, rounds = (5, 2) if a.quick else (a.batches, a.rounds)
    count, names = batches * BATCH, itertools.count()
    fields = kl_sd(widths=(a.width, 2 * a.width, 2 * a.width), blocks=1, attention=False)
    coder = autoencoder(*models.init(lambda rngs: KL(**fields, rngs=rngs), jax.random.key(0)))
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        prepare(root, count)
        interop.save(interop.autoencoder_component("AutoencoderKL", coder, **fields), root / "vae")
        opened = latents.open_autoencoder(root / "vae")
        bare = encoding.Encoder(opened, None, BATCH, "float32")
        images = np.random.default_rng(0).integers(0, 256, (BATCH, SIDE, SIDE, 3), dtype=np.uint8)

        def encoder() -> float:
            start = time.perf_counter()
            for _ in range(batches):
                jax.block_until_ready(bare.moments(images))
            return time.perf_counter() - start

        def command() -> tuple[float, float]:
            """Seconds (before the first image, from then on)."""
            start, begun = time.perf_counter(), []
            wanted = encoding.Wanted(
                "pics", f"made_{next(names)}", size=SIDE, autoencoder=str(root / "vae"),
                batch=BATCH, data_dir=root,
            )  # fmt: skip
            encoding.encode(wanted, lambda *_: begun.append(time.perf_counter()))
            return begun[0] - start, time.perf_counter() - begun[0]

        jax.block_until_ready(bare.moments(images))  # compiles
        turns = [(encoder(), *command()) for _ in range(rounds)]
    alone, once, all_of_it = (min(column) for column in zip(*turns))
    ratio = alone / all_of_it
    what = f"encode {count / all_of_it:,.0f} / bare encoder {count / alone:,.0f} images/s"
    title = f"jdiff encode, {models.count(coder.params) / 1e6:.1f} M parameters, {count:,} images"
    rows = [(what, f"{ratio:.3f}", "at least 0.9", verdict(ratio, 0.9, at_least=True))]
    table(title, [*rows, ("once, before the first image", f"{once:.2f} s", "", "")])


if __name__ == "__main__":
    main()
