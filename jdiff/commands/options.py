"""Options that several commands share, and how their values are read."""

import argparse
import math
import pathlib
from collections.abc import Callable
from typing import Any

from jdiff.commands.stages import PerStage, add_stage
from jdiff.errors import UserError

#: Written out, so that --help need not import jax. docs/solvers.md has orders and sources.
SOLVERS = (
    "one call of the network a step: euler, ddim, dpmpp_2m, dpmpp_3m, dpmpp_3m_published, "
    "dpm_solver_2m, deis, unipc, res_multistep, lms, plms, pndm, ipndm, gradient_estimation; more: "
    "heun, midpoint, dpm_2, rk4, dpm_solver, dpm_solver_fast, dpmpp_2s, res_singlestep, exp_heun, "
    "adaptive; stochastic: ddpm, edm, euler_ancestral, dpm_2_ancestral, dpmpp_2s_ancestral, "
    "res_multistep_ancestral, euler_maruyama, dpmpp_sde, dpmpp_2m_sde, dpmpp_3m_sde, seeds_1, "
    "seeds_2, seeds_3, er_sde, sa_solver, reverse_diffusion, predictor_corrector, "
    "annealed_langevin; for models trained so: consistency, flow_map"
)
GRIDS = (
    "karras, uniform, uniform_logsnr (exponential, lu), polyexponential, vp, beta, beta_sigma, "
    "kl_optimal, linear_quadratic, shifted; on discrete tables: leading, trailing, linspace, "
    "simple, normal, ddim_uniform, sgm_uniform, iddpm; align_your_steps"
)
# The options of add_sampling that say how a denoiser samples.
_SAMPLER = (
    "autoencoder",
    "solver", "solver_args", "steps", "grid", "grid_args", "guidance_scale", "interval", "rescale",
    "threshold", "threshold_args", "aug_level", "truncate",
)  # fmt: skip


def add_workdir(parser: argparse.ArgumentParser) -> None:
    """--workdir of a command that reads a run."""
    parser.add_argument(
        "--workdir", type=pathlib.Path, required=True, metavar="DIR",
        help="the run directory, or the folder of a cascade, which `jdiff train` wrote",
    )  # fmt: skip


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The options that choose weights, solver, grid and guidance."""
    weights = parser.add_argument_group("weights")
    PerStage(weights).add_argument(
        "--ema", metavar="NAME",
        help="which average of the weights, by its name in the config (config.ema); `params` for "
        "the weights themselves (default: the config's, config.sampling.ema)",
    )  # fmt: skip
    weights.add_argument(
        "--step", type=whole(0), metavar="N",
        help="the checkpoint of which training step (default: the newest)",
    )  # fmt: skip
    weights.add_argument(
        "--mesh", type=mesh, metavar="A=N,...",
        help="over how many devices what is split, e.g. fsdp=4,data=2; -1 for what the others "
        "leave (default: the config's, config.mesh, as far as the devices at hand allow)",
    )  # fmt: skip
    weights.add_argument(
        "--autoencoder", metavar="DIR",
        help="of a run on latents: where their autoencoder lies now, if it was moved since "
        "`jdiff encode`",
    )  # fmt: skip
    sampler = parser.add_argument_group(
        "sampler", "What is not given is as in the config of the run (config.sampling)."
    )
    group = PerStage(sampler)
    group.add_argument("--solver", metavar="NAME", help=SOLVERS)
    group.add_argument(
        "--solver_args", type=assignments, metavar="A=X,...",
        help="numbers of the solver, e.g. eta=0.5 (ddim: 0 to 1), variance=1 (ddpm: 0 to 1), "
        "churn=40,s_min=0.05,s_max=50,noise=1.003 (edm)",
    )  # fmt: skip
    group.add_argument(
        "--steps", type=whole(1), metavar="N",
        help="solver steps from noise to image; heun and edm call the network twice a step",
    )  # fmt: skip
    group.add_argument("--grid", metavar="NAME", help=f"spacing of the steps: {GRIDS}")
    group.add_argument(
        "--grid_args", type=assignments, metavar="A=X,...", help="numbers of the grid, e.g. rho=7"
    )
    group.add_argument(
        "--guidance_scale", type=number(), metavar="W",
        help="classifier-free guidance: 1 is the conditional model, 0 the unconditional one, above "
        "1 exaggerates the label",
    )  # fmt: skip
    group.add_argument(
        "--interval", type=interval, metavar="LOW,HIGH",
        help="guide only where LOW < log(SNR) <= HIGH; `none` for everywhere",
    )  # fmt: skip
    group.add_argument(
        "--rescale", type=number(0, 1), metavar="R", nargs="?", const=0.7,
        help="give the guided image back this share of its standard deviation, 0 to 1 (0.7 if the "
        "option has no value)",
    )  # fmt: skip
    group.add_argument(
        "--threshold", choices=("static", "dynamic", "none"), metavar="NAME",
        help="keep each predicted image in its range: static (clipped), dynamic (clipped at a "
        "quantile of its own pixels and scaled back), or none",
    )  # fmt: skip
    group.add_argument(
        "--threshold_args", type=assignments, metavar="A=X,...",
        help="numbers of the threshold, e.g. quantile=0.995 (dynamic)",
    )  # fmt: skip
    group.add_argument(
        "--aug_level", type=number(0), metavar="L",
        help="of a super-resolution stage: how strongly its low-resolution input is augmented, in "
        "the units of the augmentation (gaussian: a time of its schedule); 0 leaves it as it is",
    )  # fmt: skip
    group.add_argument(
        "--truncate", type=truth, metavar="yes|no",
        help="of a super-resolution stage: the stage before stops at that level, in place of "
        "noise being added to its image",
    )  # fmt: skip
    add_stage(sampler)
    sampler.add_argument(
        "--batch", type=whole(1), metavar="B",
        help="images at a time; changes speed and memory, never the images",
    )  # fmt: skip
    sampler.add_argument(
        "--seed", type=whole(0), default=0, metavar="S",
        help="image i depends on the seed, i and its label alone (default: %(default)s)",
    )  # fmt: skip


def choices(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    """The sampler options that were given, as `runs.sampler` takes them.

    A name replaces a whole entry of config.sampling; arguments alone change the one that is there.

    Raises:
      UserError: an unknown name; any of them, of a run that samples nothing.
    """
    from jdiff import grids, solvers
    from jdiff.errors import choose

    if "solver" not in config.sampling:
        for name in _SAMPLER:
            if getattr(args, name) is not None:
                raise UserError(f"--{name}: {args.workdir} is no run of a model that samples.")
        return {}
    chosen: dict[str, Any] = {}
    if args.solver is not None:
        same = args.solver == config.sampling.solver.name
        before = dict(config.sampling.solver) if same else {}
        name = choose("--solver", args.solver, solvers.BY_NAME)
        chosen["solver"] = {**before, "name": name, **(args.solver_args or {})}
    elif args.solver_args:
        chosen["solver"] = {**dict(config.sampling.solver), **args.solver_args}
    grid = dict(config.sampling.grid)
    if args.grid is not None and args.grid != grid["name"]:
        grid = {"name": choose("--grid", args.grid, grids.BY_NAME), "steps": grid["steps"]}
    if args.steps is not None:
        grid["steps"] = args.steps
    chosen["grid"] = {**grid, **(args.grid_args or {})}
    guide: dict[str, Any] = {}
    if args.guidance_scale is not None:
        guide["scale"] = args.guidance_scale
    if args.interval is not None:
        guide["interval"] = args.interval or None
    if args.rescale is not None:
        guide["rescale"] = args.rescale
    if guide:
        chosen["guidance"] = guide
    if args.threshold is not None or args.threshold_args:
        chosen["threshold"] = _threshold(args, config.sampling.threshold)
    if args.aug_level is not None:
        chosen["aug_level"] = args.aug_level
    if args.truncate is not None:
        chosen["truncate"] = args.truncate
    return chosen


def _threshold(args: argparse.Namespace, before: Any) -> dict[str, Any] | None:
    """The section of --threshold and --threshold_args over that of the config."""
    before = {"name": before} if isinstance(before, str) else dict(before or {"name": "none"})
    name = args.threshold or before["name"]
    if name != "none":
        kept = before if name == before["name"] else {"name": name}
        return {**kept, **(args.threshold_args or {})}
    if args.threshold_args:
        raise UserError("--threshold_args: there is no threshold; give --threshold=dynamic too.")
    return None


def whole(low: int) -> Callable[[str], int]:
    """Reads a whole number that is at least `low`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} given; a whole number is needed") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} given; at least {low} is needed")
        return value

    return read


def number(low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """Reads a finite number from `low` to `high`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} given; a number is needed") from None
        if not (math.isfinite(value) and low <= value <= high):
            bounds = f" from {low:g} to {high:g}" if math.isfinite(low + high) else ""
            raise argparse.ArgumentTypeError(f"{text} given; a finite number{bounds} is needed")
        return value

    return read


def truth(text: str) -> bool:
    """Reads yes or no."""
    found = {"yes": True, "true": True, "no": False, "false": False}.get(text.lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} given; yes or no is needed")
    return found


def interval(text: str) -> tuple[float, float] | tuple[()]:
    """Reads LOW,HIGH, or `none` as the empty tuple."""
    if text.lower() == "none":
        return ()
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} given; two numbers are needed, as -3,5"
        ) from None
    if not low < high:
        raise argparse.ArgumentTypeError(f"{text} given; the first number must be the smaller one")
    return low, high


def assignments(text: str) -> dict[str, float]:
    """Reads name=number pairs."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        try:
            if not (name.strip() and equals):
                raise ValueError
            found[name.strip()] = int(value) if value.strip().isdigit() else float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{part!r} given; name=number is needed, as eta=0.5"
            ) from None
    return found


def mesh(text: str) -> dict[str, int]:
    """Reads axis=size pairs."""
    found = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        try:
            if not equals:
                raise ValueError
            found[name.strip()] = int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{part!r} given; axis=number is needed, as fsdp=4"
            ) from None
    return found


def output(path: str | pathlib.Path, option: str, suffix: str) -> pathlib.Path:
    """A file to be written, checked before the work that fills it.

    Raises:
      UserError: another suffix, a folder that does not exist, or a folder of this name.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() != suffix:
        raise UserError(f"{option}={path}: the name must end in {suffix}.")
    if not path.parent.is_dir():
        raise UserError(f"{option}={path}: the folder {path.parent} does not exist.")
    if path.is_dir():
        raise UserError(f"{option}={path} is a folder; name a file.")
    return path
