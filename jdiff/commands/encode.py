"""jdiff encode: caches the latents and the texts of a data set."""

import argparse
import pathlib
import time
import warnings
from typing import Any

from jdiff.commands.many import add_hosts, joined
from jdiff.commands.options import whole

SUMMARY = "cache the latents, and the encoded texts, of a data set"
DESCRIPTION = """\
Puts the images of a prepared data set through an autoencoder, and their captions through a text
encoder, once, and writes what comes out as another data set. Training on it costs neither network:
a config needs another config.data.name, and nothing else. Each epoch draws its latents anew, from
the mean and the deviation that are kept. Samples, pictures of training and evaluations are decoded;
what they are compared with are the real images themselves.

Cut off and started again by the same command, it goes on where it stopped; the folder that comes
out is the same, byte for byte."""
EXAMPLES = """\
examples:
  jdiff train --config=configs/autoencoder_emoji.py --workdir=runs/emoji_vae
  jdiff encode --data=emoji --size=64 --autoencoder=runs/emoji_vae --flip --name=emoji_latents
  jdiff train --config=configs/x.py --config.data.name=emoji_latents --workdir=runs/latent

  jdiff encode --data=emoji --size=64 --autoencoder=stable-diffusion/vae --name=emoji_sd
  jdiff encode --data=emoji --size=64 --text=minilm --length=32 --name=emoji_texts   # images stay

what the folder holds of an example:
  latent, latent_std     float [H / factor, W / factor, C]: (z - shift) * scale of the autoencoder
  latent_mirrored, ...   with --flip, the same of the mirror image
  image                  without --autoencoder: the image, resized
  text, text_mask        with --text: float16 [S, D] and bool [S], the states of the caption
  pooled                 float16 [P], where the text encoder has one
  label, caption, ...    as they were

config.data.conditions=text,text_mask,pooled tells a network of the texts, and config.data.null what
it is told in guidance for no text: zero, empty (what became of the text "", which is kept too) or
learned."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    what = parser.add_argument_group("the images")
    what.add_argument(
        "--data", required=True, metavar="NAME",
        help="the set: bundled, or prepared in the folder of TFDS sets",
    )  # fmt: skip
    what.add_argument(
        "--name", required=True, metavar="NAME", help="of the set that is written beside it"
    )
    what.add_argument(
        "--size", type=whole(1), metavar="N",
        help="resize the images to N x N pixels (default: as they are)",
    )  # fmt: skip
    what.add_argument(
        "--crop", choices=("center", "adm"), metavar="HOW",
        help="of images that are not square: center (the largest square) or adm",
    )  # fmt: skip
    what.add_argument(
        "--resample", default="bicubic", metavar="FILTER",
        help="bicubic, bilinear, box, hamming or lanczos (default: %(default)s)",
    )  # fmt: skip
    what.add_argument(
        "--splits", type=lambda text: tuple(text.split(",")), metavar="LIST",
        help="those to encode, e.g. train,test (default: all)",
    )  # fmt: skip
    what.add_argument(
        "--data_dir", type=pathlib.Path, metavar="DIR",
        help="folder of TFDS sets (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets)",
    )  # fmt: skip
    coder = parser.add_argument_group("latents")
    coder.add_argument(
        "--autoencoder", metavar="DIR",
        help="the run directory of an autoencoder, or a folder of the diffusers layout (of a "
        "pipeline, or its vae)",
    )  # fmt: skip
    coder.add_argument(
        "--flip", action="store_true",
        help="encode the mirror images too, for config.data.flip: the mirrored latents of an image "
        "are not the latents of the mirrored image",
    )  # fmt: skip
    coder.add_argument(
        "--dtype", default="float32", metavar="TYPE",
        help="of the latents on disk: float32 or float16 (default: %(default)s)",
    )  # fmt: skip
    texts = parser.add_argument_group("texts")
    texts.add_argument(
        "--text", metavar="DIR",
        help="`minilm` (after `jdiff prepare minilm`), or the folder of a text encoder",
    )  # fmt: skip
    texts.add_argument(
        "--tokenizer", metavar="DIR", help="its folder, where it is not beside the encoder's"
    )
    texts.add_argument(
        "--caption", metavar="FIELD", help="the field of the texts (default: caption)"
    )
    texts.add_argument(
        "--length", type=whole(1), metavar="S",
        help="tokens of a text, which longer ones are cut to (default: as many as the longest "
        "has, rounded up to 8); an example takes 2 S D bytes",
    )  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument(
        "--batch", type=whole(1), default=64, metavar="B",
        help="images at a time, over all devices of a process (default: %(default)s)",
    )  # fmt: skip
    add_hosts(parser)


def run(args: argparse.Namespace) -> int:
    """Encodes, and says where the set lies."""
    with joined(args) as console:
        return _run(args, console)


def _run(args: argparse.Namespace, console: Any) -> int:
    from jdiff import cache, encoding
    from jdiff.commands.timing import compile_clock

    cache.enable()
    wanted = encoding.Wanted(
        data=args.data, name=args.name, size=args.size, crop=args.crop, resample=args.resample,
        autoencoder=args.autoencoder, mirrored=args.flip, dtype=args.dtype, text=args.text,
        tokenizer=args.tokenizer, length=args.length, caption=args.caption, splits=args.splits,
        batch=args.batch, data_dir=args.data_dir,
    )  # fmt: skip
    start = time.monotonic()
    with compile_clock() as clock, _bar(console) as tell, warnings.catch_warnings():
        warnings.simplefilter("once")  # a text that is cut
        place = encoding.encode(wanted, tell)
    seconds = time.monotonic() - start
    _line(console, f"data set {args.name}  {place}  ({seconds:.0f} s, of which {clock.seconds:.0f} "
                   "of compilation)")  # fmt: skip
    if args.autoencoder:
        _line(console, f"to train on it: --config.data.name={args.name}")
    return 0


class _bar:
    """A progress bar that goes when it is over; a context that gives tell(text, done, total)."""

    def __init__(self, console: Any):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._console, self._task, self._begun = console, None, None
        self._progress = Progress(
            TextColumn("[bold]encode"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.description}"), TimeRemainingColumn(), console=console,
            transient=True,
        )  # fmt: skip

    def __enter__(self) -> Any:
        self._progress.__enter__()
        return self.tell

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def tell(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """A line; or how far the work is."""
        if done is None:
            _line(self._console, text)
            return
        now = time.monotonic()
        if self._task is None:
            self._task, self._begun = self._progress.add_task("", total=total), (done, now)
        first, since = self._begun
        rate = (done - first) / max(now - since, 1e-9)
        described = f"{text}, {rate:,.0f} a second" if done > first else text
        self._progress.update(self._task, completed=done, description=described)


def _line(console: Any, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
