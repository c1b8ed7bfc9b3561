"""jdiff generate: draws what prompts say, by a checkpoint's folder."""

import argparse
import math
import pathlib
import re
import time
import warnings
from typing import Any

from jdiff.commands.options import GRIDS, SOLVERS, assignments, number, output, whole
from jdiff.commands.sample import tell, tell_picture, tell_speed
from jdiff.errors import UserError

SUMMARY = "draw images from prompts with a text-to-image checkpoint"
DESCRIPTION = """\
Draws images of one or more prompts with a folder in the diffusers layout (the one with a
model_index.json), and writes them as one PNG picture, a prompt's images side by side.

What is read: Stable Diffusion 1, 2, XL (and its refiner), 3 and 3.5, FLUX.1, PixArt, Qwen-Image and
Z-Image, with the scheduler of the folder or any solver and grid of jdiff's.

What is not given is as in diffusers for this kind of model: its number of steps, its scale, its
size. The same seed draws the same images, whatever the batch."""
EXAMPLES = """\
examples:
  jdiff generate "a red fox in the snow" --model=stable-diffusion-v1-5 --out=fox.png
  jdiff generate "a red fox" "a blue door" --model=sdxl --num=4 --batch=4 --compute=bfloat16
  jdiff generate "a red fox" --model=sdxl --negative="blurred, text" --guidance_scale=6 --steps=30
  jdiff generate "a red fox" --model=sdxl --solver=dpmpp_2m --grid=karras --steps=20
  jdiff generate "a (red:1.3) fox" --model=sdxl --weights=interpolate --size=832x1216

more by a few lines of Python (interop.load): hand-over to a refiner, crops, guidance of your own:
  pipe = jdiff.interop.load("sdxl", compute="bfloat16")
  images = pipe(jax.random.key(0), ["a red fox"], steps=30, num=4)"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw, in quotes")
    parser.add_argument(
        "--model", type=pathlib.Path, required=True, metavar="FOLDER",
        help="the checkpoint's folder, with its model_index.json",
    )  # fmt: skip
    what = parser.add_argument_group("images")
    what.add_argument(
        "--negative", metavar="TEXT", help="what to guide away from (default: the empty prompt)"
    )
    what.add_argument(
        "--num", type=whole(1), default=1, metavar="N",
        help="images of each prompt (default: %(default)s)",
    )  # fmt: skip
    what.add_argument(
        "--size", type=size, metavar="N|HxW",
        help="pixels: one side of a square, or height x width (default: the model's)",
    )  # fmt: skip
    what.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("generated.png"), metavar="FILE.png",
        help="the picture (default: %(default)s); a file that is there is replaced",
    )  # fmt: skip
    what.add_argument(
        "--weights", choices=("interpolate", "scale"), metavar="HOW",
        help="read (word:1.3) and [word] as weights: interpolate (between the prompt and the empty "
        "one) or scale (the states); without it brackets are text",
    )  # fmt: skip
    what.add_argument(
        "--chunks", type=whole(1), metavar="N",
        help="let a CLIP read prompts of up to N times its 77 tokens (default: cut, with a note)",
    )  # fmt: skip
    how = parser.add_argument_group("sampler", "What is not given is as in the folder.")
    how.add_argument("--steps", type=whole(1), metavar="N", help="solver steps from noise to image")
    how.add_argument(
        "--guidance_scale", type=number(), metavar="W",
        help="as diffusers counts it for this model: 1 is no guidance (Z-Image: 0)",
    )  # fmt: skip
    how.add_argument("--solver", metavar="NAME", help=SOLVERS)
    how.add_argument(
        "--solver_args", type=assignments, metavar="A=X,...",
        help="numbers of the solver, e.g. eta=0.5",
    )  # fmt: skip
    how.add_argument("--grid", metavar="NAME", help=f"spacing of the steps: {GRIDS}")
    how.add_argument(
        "--seed", type=whole(0), default=0, metavar="S",
        help="image i depends on the seed, i and its prompt alone (default: %(default)s)",
    )  # fmt: skip
    run = parser.add_argument_group("memory and speed")
    run.add_argument(
        "--batch", type=whole(1), metavar="B",
        help="images at a time; changes speed and memory, never the images (default: all)",
    )  # fmt: skip
    run.add_argument(
        "--compute", choices=("float32", "bfloat16"), metavar="DTYPE",
        help="of the activations: float32 or bfloat16 (default: float32)",
    )  # fmt: skip
    run.add_argument(
        "--dtype", choices=("float32", "bfloat16"), metavar="DTYPE",
        help="of the weights in memory (default: as in the files)",
    )  # fmt: skip
    run.add_argument(
        "--variant", metavar="NAME", help="which weights, if the folder has several, e.g. fp16"
    )


def run(args: argparse.Namespace) -> int:
    """Draws, writes, and says where the picture is."""
    from rich.console import Console

    console = Console()
    out = output(args.out, "--out", ".png")
    if not args.model.is_dir():
        raise UserError(f"--model={args.model} is not a folder.")
    options = chosen(args)

    import jax
    import numpy as np

    from jdiff import cache, interop, pictures
    from jdiff.commands.timing import compile_clock

    cache.enable()
    given = {"compute": args.compute, "dtype": args.dtype, "variant": args.variant}
    pipe = interop.load(args.model, **{k: v for k, v in given.items() if v is not None})
    if not isinstance(pipe, interop.Pipeline):
        raise UserError(f"--model={args.model} is one network; give the folder around it.")
    start = time.monotonic()
    with compile_clock() as clock, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        images = pipe(
            jax.random.key(args.seed), args.prompts, args.negative, progress=console, **options
        )
        images = np.asarray(images)
    for line in dict.fromkeys(str(one.message) for one in told if _of_texts(one)):
        tell(console, f"note     {line}")
    across = args.num if args.num > 1 and len(args.prompts) > 1 else None
    columns = across or math.ceil(math.sqrt(len(images)))
    pictures.save(out, pictures.grid(images, columns=columns, scale=1))
    tell_speed(console, len(images), time.monotonic() - start, clock.seconds)
    tell_picture(console, out, len(images), len(images))
    return 0


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as the pipeline takes them.

    Raises:
      UserError: a solver, a grid or an argument that there is not, by the option.
    """
    from jdiff import grids, solvers
    from jdiff.errors import call, choose

    names = ("steps", "guidance_scale", "size", "num", "batch")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    texts = {name: getattr(args, name) for name in ("weights", "chunks")}
    options["texts"] = {name: value for name, value in texts.items() if value is not None}
    if args.solver is not None:
        named = {"name": args.solver, **(args.solver_args or {})}
        options["solver"] = call("--solver", solvers.BY_NAME, named)
    elif args.solver_args:
        raise UserError("--solver_args are for a solver: give --solver=NAME too.")
    if args.grid is not None:
        options["grid"] = grids.BY_NAME[choose("--grid", args.grid, grids.BY_NAME)]
    return options


def size(text: str) -> int | tuple[int, int]:
    """Reads 512, or 512x768 as (height, width)."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if not found or "0" in (found[1], found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} given; a size is 512, or 512x768")
    return int(found[1]) if found[2] is None else (int(found[1]), int(found[2]))


def _of_texts(warning: warnings.WarningMessage) -> bool:
    """Whether the warning is one of ours: a text that was cut, or a weight that was not read."""
    return warning.category.__module__.startswith("jdiff.")
