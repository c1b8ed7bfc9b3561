"""How much a first stage should shrink the image: latent diffusion by factor, at equal compute.

    jdiff prepare emoji lpips
    python experiments/ldm_downsampling.py            # hours on a GPU; resumable
    python experiments/ldm_downsampling.py --small    # 32 pixels, factors 1, 2 and 4: two cores
    python experiments/ldm_downsampling.py --quick    # 8 x 8 digits, factors 1 and 2, minutes
    python experiments/ldm_downsampling.py --small --report   # the tables of what is kept

The trade-off of Rombach et al. 2022 (2112.10752, section 4.1, figures 6 and 7) on emoji of 64 x 64
pixels: autoencoders of factors 2, 4 and 8, trained for equally many steps, and one U-Net, the same
for all but its input, that learns to draw their latents (factor 1: the pixels themselves), class by
class. A step costs the less the smaller the latents are, so each gets as many steps as make the
same number of operations; distances are measured after parts of them. A small factor spends its
compute on what is hardly seen; a large one loses it in the first stage, which the distance of
reconstructions shows.

Every network is a run directory, latents are a TFDS set, and every measured cell is a file below
--workdir: the same command goes on where it was cut off.
"""

import argparse
import json
import math
import pathlib
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from rich.console import Console

from jdiff import encoding, experiment, first_stage, generate, latents, models, runs, train
from jdiff.data import batches, folders, sources
from jdiff.data.prepare import records
from jdiff.errors import UserError
from jdiff.evaluation import classifier
from jdiff.evaluation.features import to_uint8
from jdiff.evaluation.moments import Moments, frechet
from jdiff.models.flops import flops
from jdiff.training.logs import replace_text

HERE = pathlib.Path(__file__).parents[1]


class Settings(NamedTuple):
    """What is trained and measured.

    Attributes:
      factors: pixels of a side that are one latent's.
      widths: of the autoencoders' levels; factor 2^n has the first n + 1.
      latent_channels: of the latents by factor.
      first_steps, first_rate: steps of training an autoencoder, and its learning rate.
      perceptual, adversarial: weights of its loss.
      steps: of training on pixels, which are the compute of all.
      parts: of it, after which distances are measured.
      evaluations: of the denoiser a sample.
    """

    data: str = "emoji"
    size: int = 64
    factors: tuple[int, ...] = (1, 2, 4, 8)
    widths: tuple[int, ...] = (64, 128, 128, 256)
    latent_channels: tuple[int, ...] = (3, 3, 4)
    first_steps: int = 20_000
    first_rate: float = 2e-4
    perceptual: float = 1.0
    adversarial: float = 0.5
    channels: int = 64
    multipliers: tuple[int, ...] = (1, 2, 2)
    steps: int = 4000
    batch: int = 64
    parts: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    num: int = 2000
    evaluations: int = 35
    dtype: str = "bfloat16"


# Without LPIPS, which would be most of a step of autoencoders as small as these.
SMALL = Settings(
    size=32, factors=(1, 2, 4), widths=(16, 32, 64), latent_channels=(3, 4), first_steps=1000,
    first_rate=1e-3, perceptual=0.0, adversarial=0.0, channels=32, steps=800, batch=32,
    parts=(0.25, 0.5, 1.0), num=1000, evaluations=17, dtype="float32",
)  # fmt: skip
QUICK = Settings(
    data="digits_rgb", size=8, factors=(1, 2), widths=(8, 16), latent_channels=(2,),
    first_steps=300, first_rate=2e-3, perceptual=0.0, adversarial=0.0, channels=8,
    multipliers=(1, 2), steps=60, parts=(0.5, 1.0), num=100, evaluations=9, dtype="float32",
)  # fmt: skip


class Figures(NamedTuple):
    """What a network came to after a part of the compute.

    Attributes:
      frechet: distance of its samples to the training split.
      step: of training.
      seconds: of training until then, without compilation and pictures.
      sampling: seconds a sample, decoding included.
    """

    frechet: float
    step: int
    seconds: float
    sampling: float


class Judge(NamedTuple):
    """What images are measured with."""

    features: Callable[[np.ndarray], np.ndarray]
    train: Moments
    held_out: Moments
    images: np.ndarray  # held-out images, uint8


def first_config(s: Settings, factor: int, workdir: pathlib.Path) -> Any:
    """The experiment that trains an autoencoder."""
    c, level = first_stage.defaults(), int(math.log2(factor))
    c.name = f"{s.data} {s.size} px, autoencoder of factor {factor}"
    c.data.update({"name": s.data, "size": s.size, "resample": "box",
                   "data_dir": str(data_dir(s, workdir))})  # fmt: skip
    c.model.update({"name": "kl", "widths": s.widths[: level + 1],
                    "channels": s.latent_channels[level - 1],
                    "groups": 32 if s.widths[0] % 32 == 0 else None})  # fmt: skip
    if s.size < 32:
        c.model.update({"attention": False, "blocks": 1})
    c.loss.update({"perceptual": s.perceptual, "adversarial": s.adversarial,
                   "start": s.first_steps // 10})  # fmt: skip
    c.optimizer.learning_rate = s.first_rate
    c.ema = {"ema": {"kind": "constant", "decay": 0.999 if s.size >= 32 else 0.9, "warmup": 0.05}}
    c.train.update({"batch_size": s.batch, "steps": s.first_steps, "sample_every": s.first_steps,
                    "checkpoint_every": max(1, s.first_steps // 10), "keep": 1})  # fmt: skip
    return c.lock()


def config(s: Settings, factor: int, workdir: pathlib.Path, steps: int) -> Any:
    """The experiment that learns to draw latents, or pixels if the factor is 1."""
    c = experiment.defaults()
    c.name = f"{s.data} {s.size} px, diffusion at factor {factor}"
    c.data.data_dir = str(data_dir(s, workdir))
    c.data.name, c.data.resample = (s.data, "box") if factor == 1 else (encoded(factor), "bicubic")
    c.data.size = s.size if factor == 1 else None
    c.model.update(
        {"name": "unet", "style": "adm", "channels": s.channels, "multipliers": s.multipliers,
         "blocks": 1, "attention_sizes": (), "dtype": s.dtype}
    )  # fmt: skip
    c.parameterization.sigma_data = 0.6 if factor == 1 else 1.0
    c.optimizer.learning_rate, c.optimizer.warmup, c.optimizer.clip = 5e-4, 0, 1.0
    c.ema = {"ema": {"kind": "constant", "decay": 0.999 if s.size >= 32 else 0.95, "warmup": 0.05}}
    c.train.update({"batch_size": s.batch, "steps": steps, "sample_every": 10**9,
                    "checkpoint_every": max(1, steps // 4), "keep": 1})  # fmt: skip
    c.sampling.grid.steps = (s.evaluations + 1) // 2
    c.sampling.batch = min(250, -(-s.num // 4))  # the first batch compiles, the others are timed
    return c.lock()


@cache
def operations(s: Settings, factor: int) -> int:
    """Of the forward pass of one image at a factor; training takes three times as many."""
    side = s.size // factor
    channels = 3 if factor == 1 else s.latent_channels[int(math.log2(factor)) - 1]
    build = lambda rngs: models.UNet(
        image_size=side, in_channels=channels, style="adm", channels=s.channels, blocks=1,
        multipliers=s.multipliers, attention_sizes=(), num_classes=10, rngs=rngs,
    )  # fmt: skip
    apply, shapes = models.abstract(build)
    like = lambda shape, dtype="float32": jax.ShapeDtypeStruct(shape, dtype)
    x, t = like((1, side, side, channels)), like((1,))
    return flops(apply, shapes, x, t, {"label": like((1,), "int32")})


def steps_of(s: Settings, factor: int, part: float = 1.0) -> int:
    """Steps of training at a factor that cost a part of the compute."""
    return max(1, round(part * s.steps * operations(s, 1) / operations(s, factor)))


def encoded(factor: int) -> str:
    """The name of the set of latents."""
    return f"latents_f{factor}"


def data_dir(s: Settings, workdir: pathlib.Path) -> pathlib.Path:
    """Where latents are written: a folder of TFDS sets, with a link to the images beside them.

    The images of the quick form, digits in grey as red, green and blue, are written there too.
    """
    root = workdir.absolute() / "data"
    root.mkdir(parents=True, exist_ok=True)
    if s.data == "digits_rgb":
        if not records.is_prepared(root / s.data / "1.0.0"):
            records.write(_digits(), root)
    elif not (root / s.data).exists():
        (root / s.data).symlink_to(folders.data_root(None) / s.data, target_is_directory=True)
    return root


def _digits() -> records.ImageSet:
    """The bundled digits with three equal channels."""

    def features(tfds: Any) -> Any:
        image = tfds.features.Image(shape=(8, 8, 3))
        label = tfds.features.ClassLabel(names=[str(k) for k in range(10)])
        return tfds.features.FeaturesDict({"image": image, "label": label})

    def examples(split: str) -> Any:
        for row in sources.source("digits", split):
            image = Image.fromarray(row["image"].repeat(3, axis=2))
            yield {"image": image, "label": row["label"]}

    return records.ImageSet(
        name="digits_rgb", version="1.0.0", description="", homepage="", citation="",
        features=features, splits={k: partial(examples, k) for k in ("train", "test")},
    )  # fmt: skip


def real(s: Settings, split: str, workdir: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 images, labels) of a split."""
    source = sources.source(s.data, split, data_dir(s, workdir))
    feed = batches(source, 1000, train=False, size=s.size, resample="box")
    images, labels = zip(*((part["image"], part["label"]) for part in feed))
    return np.concatenate(images), np.concatenate(labels)


def judged(s: Settings, workdir: pathlib.Path) -> Judge:
    """A classifier of the training split, kept in workdir, and the real images' features."""
    (images, labels), (held_out, _) = (real(s, split, workdir) for split in ("train", "test"))
    judge = classifier.train(images, labels, path=workdir / "classifier.safetensors",
                             steps=600 if s.size >= 32 else 200)  # fmt: skip
    moments = [Moments.of(judge.features(x)) for x in (images, held_out)]
    return Judge(judge.features, *moments, held_out)


def reconstructed(s: Settings, workdir: pathlib.Path, factor: int, judge: Judge) -> float:
    """Frechet distance of held-out images behind the autoencoder to themselves."""
    coder = latents.open_autoencoder(workdir / f"first_f{factor}")
    size = min(250, len(judge.images))
    through = jax.jit(lambda coder, x: to_uint8(coder.decode(coder.encode(x))))
    parts = []
    for start in range(0, len(judge.images), size):
        part = judge.images[start : start + size]
        filled = part[np.minimum(np.arange(size), len(part) - 1)]
        parts.append(
            np.asarray(through(coder, experiment.to_float(jnp.asarray(filled))))[: len(part)]
        )
    return frechet(Moments.of(judge.features(np.concatenate(parts))), judge.held_out)


def measured(s: Settings, workdir: pathlib.Path, factor: int, judge: Judge) -> Figures:
    """What the network of a factor comes to now; its first samples are kept."""
    run = runs.load_run(workdir / f"f{factor}")
    labels = generate.in_turn(list(range(run.info.num_classes)), s.num)
    parts, begun = [], 0.0
    for part in generate.images(run, num=s.num, labels=labels):
        begun = begun or time.monotonic()  # when the first batch, which compiles, is there
        parts.append(part)
    images, rest = np.concatenate(parts), s.num - len(parts[0])
    np.save(workdir / "cells" / f"f{factor}_{run.step}.npy", images[:16])
    return Figures(
        frechet(Moments.of(judge.features(images)), judge.train), run.step,
        trained_seconds(workdir / f"f{factor}"),
        (time.monotonic() - begun) / rest,
    )  # fmt: skip


def trained_seconds(workdir: pathlib.Path) -> float:
    """Seconds that steps of training took, by the images a second of metrics.jsonl."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    size, total, before = runs.read_config(workdir).train.batch_size, 0.0, 0
    for line in lines:
        if line.get("images_per_s"):
            total += (line["step"] - before) * size / line["images_per_s"]
            before = line["step"]
    return total


class Task(NamedTuple):
    """One thing to do: its name, whether it is done, and how it is done."""

    name: str
    done: Callable[[], bool]
    do: Callable[[], str]


def tasks(s: Settings, workdir: pathlib.Path, console: Any, judge: Callable[[], Judge]) -> list:
    """Factor by factor: the first stage, the latents, and the parts of training, each measured."""

    def finished(folder: pathlib.Path, steps: int) -> bool:
        known = runs.read_description(folder).get("state") == "finished"
        return known and runs.read_config(folder).train.steps >= steps

    def first(factor: int) -> str:
        result = train.train(
            first_config(s, factor, workdir), workdir / f"first_f{factor}", console
        )
        return f"loss {result.loss:.4f}"

    def encode(factor: int) -> str:
        wanted = encoding.Wanted(
            data=s.data, name=encoded(factor), size=s.size, resample="box",
            autoencoder=str(workdir / f"first_f{factor}"), data_dir=data_dir(s, workdir),
        )  # fmt: skip
        return str(encoding.encode(wanted))

    def reconstruct(factor: int) -> str:
        found = reconstructed(s, workdir, factor, judge())
        replace_text(workdir / "cells" / f"first_f{factor}.json", json.dumps(found) + "\n")
        return f"Frechet distance {found:.2f}"

    def measure(factor: int, part: float) -> str:
        steps, folder = steps_of(s, factor, part), workdir / f"f{factor}"
        if not finished(folder, steps):
            train.train(config(s, factor, workdir, steps), folder, console)
        found = measured(s, workdir, factor, judge())
        replace_text(kept(workdir, factor, part), json.dumps(found._asdict()) + "\n")
        return f"Frechet distance {found.frechet:.2f} after {found.step:,} steps"

    made = []
    for factor in s.factors:
        if factor > 1:
            done = partial(finished, workdir / f"first_f{factor}", s.first_steps)
            made.append(Task(f"factor {factor}, autoencoder", done, partial(first, factor)))
            info = workdir / "data" / encoded(factor) / "1.0.0" / "encoding.json"
            made.append(Task(f"factor {factor}, latents", info.exists, partial(encode, factor)))
            file = workdir / "cells" / f"first_f{factor}.json"
            do = partial(reconstruct, factor)
            made.append(Task(f"factor {factor}, reconstructions", file.exists, do))
        for part in s.parts:
            done, do = kept(workdir, factor, part).exists, partial(measure, factor, part)
            made.append(Task(f"factor {factor}, {part:.3g} of the compute", done, do))
    return made


def kept(workdir: pathlib.Path, factor: int, part: float) -> pathlib.Path:
    """The file of a measured cell."""
    return workdir / "cells" / f"f{factor}_{part:g}.json"


def claim(workdir: pathlib.Path, s: Settings) -> None:
    """Makes workdir the folder of these settings.

    Raises:
      UserError: it holds what was made with others.
    """
    file, text = workdir / "settings.json", json.dumps(s._asdict(), indent=2) + "\n"
    if file.exists() and file.read_text() != text:
        raise UserError(f"{workdir} was made with other settings (settings.json); name another.")
    (workdir / "cells").mkdir(parents=True, exist_ok=True)
    replace_text(file, text)


def collect(
    s: Settings, workdir: pathlib.Path
) -> tuple[dict[tuple[int, float], Figures], dict[int, float]]:
    """({(factor, part): figures}, {factor: distance of reconstructions}), of what is on disk."""
    cells = [(factor, part) for factor in s.factors for part in s.parts]
    found = {
        cell: Figures(**json.loads(kept(workdir, *cell).read_text()))
        for cell in cells if kept(workdir, *cell).exists()
    }  # fmt: skip
    files = {f: workdir / "cells" / f"first_f{f}.json" for f in s.factors}
    return found, {f: json.loads(p.read_text()) for f, p in files.items() if p.exists()}


def table(s: Settings, found: dict, first: dict[int, float]) -> str:
    """Markdown: a row a factor, and in the columns the distance after parts of the compute."""
    heads = [f"FD at {part:.3g}" for part in s.parts]
    lines = [
        "| " + " | ".join(["factor", "steps", "s/step", *heads, "FD of reconstructions",
                           "samples a second"]) + " |",
        "|---" * (5 + len(heads)) + "|",
    ]  # fmt: skip
    for factor in s.factors:
        mine = [found.get((factor, part)) for part in s.parts]
        last = next((m for m in reversed(mine) if m), None)
        if last is None:
            continue
        cells = [f"{m.frechet:.2f}" if m else "" for m in mine]
        again = f"{first[factor]:.2f}" if factor in first else "0" if factor == 1 else ""
        speed = f"{last.seconds / last.step:.3f}", f"{1 / last.sampling:.1f}"
        row = [str(factor), f"{last.step:,}", speed[0], *cells, again, speed[1]]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def picture(s: Settings, found: dict, floor: float, workdir: pathlib.Path,
            out: pathlib.Path) -> None:  # fmt: skip
    """Distance against time of training, against the speed of sampling, and samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    from jdiff import pictures

    factors = [f for f in s.factors if (f, s.parts[-1]) in found]
    figure = plt.figure(figsize=(10.5, 6))
    above, below = figure.add_gridspec(2, 1, height_ratios=(1, 0.9))
    left, right = above.subgridspec(1, 2).subplots()
    for factor, style in zip(s.factors, ("o-", "s--", "^-", "v:")):
        rows = [found[factor, part] for part in s.parts if (factor, part) in found]
        label = f"factor {factor}"
        left.plot([r.seconds for r in rows], [r.frechet for r in rows], style, label=label)
        right.plot([1 / r.sampling for r in rows[-1:]], [r.frechet for r in rows[-1:]], style[0])
    for axis, words in ((left, "seconds of training"), (right, "samples a second")):
        axis.axhline(floor, color="0.5", linestyle=":", label="held-out images")
        axis.set(xlabel=words, ylabel="Fréchet distance", xscale="log", yscale="log")
        for line in (axis.xaxis, axis.yaxis):
            line.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            line.set_major_formatter("{x:g}")
            line.set_minor_locator(ticker.NullLocator())
    left.legend()
    cells = below.subgridspec(1, max(1, len(factors)))
    for i, factor in enumerate(factors):
        axis = figure.add_subplot(cells[0, i])
        images = np.load(workdir / "cells" / f"f{factor}_{found[factor, s.parts[-1]].step}.npy")
        axis.imshow(pictures.grid(images, columns=4))
        axis.set_title(f"factor {factor}")
        axis.axis("off")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=90, bbox_inches="tight")
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[tuple[int, float], Figures]:
    """Does what is missing, prints the table and, unless quick, writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--small", action="store_true", help="emoji of 32 x 32 pixels, on two cores")
    form.add_argument("--quick", action="store_true", help="digits, factors 1 and 2")
    parser.add_argument("--report", action="store_true", help="train and measure nothing")
    parser.add_argument("--workdir", type=pathlib.Path, help="where everything is kept")
    parser.add_argument("--out", type=pathlib.Path, help="the file of the figure")
    args = parser.parse_args(argv)
    s = QUICK if args.quick else SMALL if args.small else Settings()
    name = "ldm_downsampling" + ("_quick" if args.quick else "_small" if args.small else "")
    workdir = args.workdir or pathlib.Path("runs") / name
    console = Console()
    claim(workdir, s)
    judge = cache(lambda: judged(s, workdir))
    todo = [] if args.report else [t for t in tasks(s, workdir, console, judge) if not t.done()]
    for i, task in enumerate(todo, 1):
        console.print(f"[{i}/{len(todo)}] {task.name}: {task.do()}")
    found, first = collect(s, workdir)
    floor = frechet(judge().held_out, judge().train)
    print("\n" + table(s, found, first))
    print(f"\nheld-out images: {floor:.2f}\n", flush=True)
    out = args.out or (None if args.quick else HERE / "docs" / "images" / f"{name}.png")
    if out is not None and found:
        picture(s, found, floor, workdir, out)
    return found


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
