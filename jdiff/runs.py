"""Run directories: who they belong to, and opening one to sample from it.

config.json  run.json  metrics.jsonl  tb/  checkpoints/  samples/*.png  evaluation.json  report.html
empty.npz, if config.data.null is "empty": what the text encoder made of the empty text
"""

import dataclasses
import json
import pathlib
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from jdiff import experiment, kinds, latents, parallel
from jdiff.conditioning import LEARNED
from jdiff.config import EITHER, completed, differences, from_json, to_json
from jdiff.data import encoded
from jdiff.errors import UserError, choose
from jdiff.parallel.layout import Layout
from jdiff.parallel.mesh import AXES, adapted
from jdiff.pytree import Array, PyTree
from jdiff.training import checkpoints
from jdiff.training.logs import replace_text, temporary

# What may change when a run is taken up again: how long it goes on and what it tells.
_MAY_CHANGE = (
    "train.steps", "train.log_every", "train.sample_every", "train.checkpoint_every", "train.keep",
    "train.peak_flops",
    "sampling.", "evaluation.", "mesh.", "compile_cache", "cache_dir",
    "data.data_dir", "data.threads", "data.timeout", "data.autoencoder",
)  # fmt: skip

# What of config.low_res decides which images a stage makes, and from what.
_MADE = ("factor", "down", "up", "residual")


class Run(NamedTuple):
    """A trained run, ready to sample from.

    Attributes:
      denoiser: the trained denoiser, unguided.
      null: the null condition for `guidance.cfg`, e.g. {"label": number of classes}, or {}; by
        config.data.null, arrays among them.
      schedule: the denoiser's.
      info: what the data is: shape, num_classes, label_names.
      step: the checkpoint's.
      ema: which weights these are.
      layout: of the devices that hold them; None for one device.
      low_res: a super-resolution stage's `cascades.LowRes`: what its input is; else None.
      autoencoder: of a run on latents, the `autoencoders.Autoencoder` that decodes its samples:
        `run.autoencoder.decode(latents)`; else None.
    """

    workdir: pathlib.Path
    config: ml_collections.ConfigDict
    denoiser: Any
    null: dict[str, Any]
    schedule: PyTree
    info: Any
    step: int
    ema: str
    layout: Layout | None = None
    low_res: Any = None
    autoencoder: Any = None


def load_run(
    workdir: str | pathlib.Path, *, ema: str | None = None, step: int | None = None,
    mesh: Mapping[str, int] | None = None, autoencoder: str | None = None,
) -> Run:  # fmt: skip
    """Opens a run directory: the trained denoiser and what belongs to it.

    Args:
      workdir: a directory that `jdiff train` wrote.
      ema: which average of the weights; config.sampling.ema unless given, "params" for the weights.
      step: which checkpoint; the newest unless given.
      mesh: devices an axis, as in config.mesh, e.g. {"fsdp": 4, "data": 2}. The config's unless
        given, if it fits the devices at hand; else what of it does. The weights are read to where
        they belong on it, and are never whole anywhere if it splits them.
      autoencoder: of a run on latents, where their autoencoder lies now, if it was moved.

    Raises:
      UserError: no run there, no such average, no complete checkpoint or a damaged one, a mesh
        that does not fit the devices or the network, or an autoencoder that is not there any more
        or is another one.

    >>> run = jdiff.load_run("runs/digits")
    >>> denoise = guidance.cfg(run.denoiser, scale=2.0, null=run.null)
    """
    opened = restored(workdir, ema=ema, step=step, mesh=mesh)
    exp = opened.experiment
    if not isinstance(exp, experiment.Experiment):
        kind = opened.config.kind
        raise UserError(
            f"{workdir} is a run of the kind {kind!r}, which makes no images from noise; "
            f"{kinds.named(kind).OPENER} opens it."
        )
    exp = exp._replace(empty=encoded.read_empty(workdir) or exp.empty)
    if autoencoder is not None and not opened.info.latent:
        raise UserError(f"{workdir} is a run on images; there is no autoencoder to name.")
    where = autoencoder or opened.config.data.autoencoder
    coder = latents.decoder(opened.info, where, exp.layout and exp.layout.whole)
    return Run(
        opened.workdir, opened.config, exp.denoiser(opened.params), exp.nulls(opened.params),
        exp.schedule, opened.info, opened.step, opened.ema, exp.layout, exp.low_res, coder,
    )  # fmt: skip


class Restored(NamedTuple):
    """What a run directory of any kind holds.

    Attributes:
      experiment: what its kind builds of the config.
      params: the weights, on the devices of `experiment.layout`.
      info: what the data is.
      step: the checkpoint's.
      ema: which weights these are.
    """

    workdir: pathlib.Path
    config: ml_collections.ConfigDict
    experiment: Any
    params: PyTree
    info: Any
    step: int
    ema: str


def restored(
    workdir: str | pathlib.Path, *, ema: str | None = None, step: int | None = None,
    mesh: Mapping[str, int] | None = None,
) -> Restored:  # fmt: skip
    """Opens a run directory of any kind; arguments and errors as of `load_run`."""
    from jdiff.data.sources import Info

    workdir = pathlib.Path(workdir)
    config = read_config(workdir)
    kind = kinds.of(config)
    ema = config.sampling.ema if ema is None else ema
    choose("ema", ema, [*config.ema, "params"])
    described = read_description(workdir)
    if "data" not in described:
        raise UserError(f"{workdir}/run.json does not say what the data was: training never began.")
    info = Info.of(described["data"])
    exp = kind.build(config, info)
    layout = _layout(kind, config, mesh)
    like = exp.shapes()
    if layout is not None:
        exp = exp.on(layout)
        at = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        like = jax.tree.map(at, like, exp.placed(like))
    with checkpoints.opened(workdir, write=False) as saved:
        found = saved.restore_average(like, ema, step)
    return Restored(workdir, config, exp, found.state, info, found.step, ema)


def _layout(
    kind: kinds.Kind, config: ml_collections.ConfigDict, sizes: Mapping[str, int] | None
) -> Layout | None:
    """Of all devices; None for one."""
    count = jax.device_count()
    if sizes is None:
        sizes = adapted({axis: config.mesh[axis] for axis in AXES}, count)
    mesh = parallel.make(sizes)
    return kind.layout(config, mesh) if count > 1 else None


def teacher(
    workdir: str | pathlib.Path,
    info: Any,
    low_res: ml_collections.ConfigDict,
    mesh: Mapping[str, int] | None = None,
) -> tuple[PyTree, Callable[[PyTree], experiment.Sampler]]:
    """(weights, weights -> (guided denoiser, solver, times)) of the run that another learns from.

    It is guided and steps as its own config.sampling says, with the average that says.

    Args:
      workdir: what config.loss.teacher names.
      info: of the data of the run that learns.
      low_res: its config.low_res.
      mesh: its devices an axis: the teacher's weights are split over it too.

    Raises:
      UserError: as `load_run`, or the run's images, classes or low-resolution input are others.
    """
    run = load_run(workdir, mesh=mesh)
    theirs, ours = ((i.shape, i.num_classes, i.fields) for i in (run.info, info))
    if theirs != ours:
        raise UserError(
            f"config.loss.teacher={str(workdir)!r} was trained on {run.info.name}, with (shape, "
            f"classes, conditions) {theirs}; {info.name} has {ours}."
        )
    made = lambda c: [c[name] for name in _MADE] if c.factor else None
    theirs, ours = made(run.config.low_res), made(low_res)
    if theirs != ours:
        raise UserError(
            f"config.loss.teacher={str(workdir)!r} was trained with config.low_res "
            f"({', '.join(_MADE)}) {theirs}; this run has {ours}."
        )

    def of(weights: PyTree) -> experiment.Sampler:
        denoiser = dataclasses.replace(run.denoiser, params=weights)
        return experiment.sampler(run.config, denoiser, run.null | weights.get(LEARNED, {}))

    of(run.denoiser.params)  # its errors now: inside a training step values are not known
    return run.denoiser.params, of


def weights(
    workdir: str | pathlib.Path, like: PyTree, mesh: Mapping[str, int] | None = None
) -> PyTree:
    """The weights of a run that another starts from: the average with which it samples.

    Raises:
      UserError: as `load_run`, or its network is another than that of `like`.
    """
    found = restored(workdir, mesh=mesh).params
    shapes = lambda tree: {
        jax.tree_util.keystr(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    theirs, ours = shapes(found), shapes(like)
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"config.train.start={str(workdir)!r} is of another network: {name} is "
                f"{theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here."
            )
    return found


def sampler(run: Run, **choices: Any) -> tuple[Any, Any, Array]:
    """(guided denoiser, solver, times) of a run; `choices` replace entries of config.sampling.

    >>> denoise, solver, times = runs.sampler(run, guidance={"scale": 3.0})
    """
    config = chosen(run.config, choices)
    latents.check(config, run.info)
    return experiment.sampler(config, run.denoiser, run.null)


def chosen(config: ml_collections.ConfigDict, choices: dict[str, Any]) -> ml_collections.ConfigDict:
    """A copy of `config` whose sampling section has `choices` in it.

    A section is replaced by a dict with a "name", and updated by one without.

    Raises:
      UserError: a choice that is no entry of config.sampling.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for name, value in choices.items():
            choose("sampling", name, config.sampling)
            if isinstance(value, dict) and "name" not in value:
                config.sampling[name].update(value)
                continue
            if f"config.sampling.{name}" in EITHER:
                del config.sampling[name]  # it may be of another type
            new = ml_collections.ConfigDict(value) if isinstance(value, dict) else value
            config.sampling[name] = new
    return config


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """The config of a run directory, of this version or an earlier one.

    Raises:
      UserError: there is no run, or its config.json cannot be read.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        _refuse_sweep(pathlib.Path(workdir))
        _refuse_cascade(pathlib.Path(workdir))
        raise UserError(f"{workdir} is not a run directory (no config.json); train writes one.")
    try:
        return _completed(from_json(path.read_text()))
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _completed(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    return completed(config, kinds.of(config).defaults())


def _refuse_sweep(workdir: pathlib.Path) -> None:
    """Says of a sweep's folder which of its points are runs."""
    if not (workdir / "sweep.json").is_file():
        return
    points = sorted(p.parent.name for p in workdir.glob("*/config.json"))
    shown = ", ".join(points[:8]) + (f" and {len(points) - 8} more" if len(points) > 8 else "")
    name = points[0] if points else "NAME"
    raise UserError(
        f"{workdir} is a sweep; name one of its points, as --workdir={workdir / name}. "
        f"Those that have begun: {shown or 'none'}."
    )


def _refuse_cascade(workdir: pathlib.Path) -> None:
    """Says of a cascade's folder which of its stages are runs."""
    if not (workdir / "cascade.json").is_file():
        return
    stages = sorted(p.parent.name for p in workdir.glob("stage*/config.json"))
    raise UserError(
        f"{workdir} is a cascade; name one of its stages, as --workdir={workdir / 'stage0'}. Those "
        f"that have begun: {', '.join(stages) or 'none'}."
    )


def unlike(before: ml_collections.ConfigDict, now: ml_collections.ConfigDict) -> list[str]:
    """The differences, a line each, that keep a run of the one config from going on with the other.

    Fields that `before` lacks, being of an earlier version, count as their defaults.
    """
    before = _completed(before)
    return [line for line in differences(before, now) if not line.startswith(_MAY_CHANGE)]


def claim(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Makes `workdir` the directory of this config, or checks that it already is.

    Raises:
      UserError: it holds a run of another config (the differences are named), or other files.
    """
    differ = lambda: unlike(read_config(workdir), config)
    take(workdir, "config.json", to_json(config), differ, "config", "run")


def keep_empty(workdir: pathlib.Path, empty: Mapping[str, Any]) -> None:
    """What the empty text became, so that the run can be guided where its data are not."""
    path = workdir / encoded.EMPTY
    if empty and not path.exists():
        with path.with_suffix(".partial").open("wb") as file:
            np.savez(file, **empty)
        path.with_suffix(".partial").replace(path)


def take(
    workdir: pathlib.Path, file: str, text: str, differ: Callable[[], list[str]], whose: str,
    kind: str,
) -> None:  # fmt: skip
    """Writes `file` into a directory that is new, empty, or of the same owner.

    Args:
      text: of the file.
      differ: what keeps the owner that is there from being this one, a line each.
      whose, kind: what the file and its directory are called, for messages.

    Raises:
      UserError: the directory is another's, holds other files, or cannot be written.
    """
    path = workdir / file
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a directory.")
    if path.exists():
        if lines := differ():
            more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
            raise UserError(
                f"{workdir} belongs to another {whose}: {'; '.join(lines[:3])}{more}. "
                "Name another --workdir, or move this one away."
            )
    elif workdir.exists() and not all(map(temporary, workdir.iterdir())):
        raise UserError(f"{workdir} is not empty and is not a {kind}; name another --workdir.")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}.") from error


def read_description(workdir: pathlib.Path) -> dict[str, Any]:
    """What run.json says of a run; nothing if there is none yet.

    Raises:
      UserError: the file cannot be read.
    """
    path = workdir / "run.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Train again to write it anew.") from error


def describe(workdir: pathlib.Path, **entries: Any) -> None:
    """Updates run.json with `entries`."""
    known = read_description(workdir) | entries
    replace_text(workdir / "run.json", json.dumps(known, indent=2) + "\n")


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    names = ["jdiff", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"]
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}
