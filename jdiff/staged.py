"""Cascades of trained stages: one config for all of them, and the folder of their runs.

WORKDIR/cascade.json (the whole config)  WORKDIR/stage0  WORKDIR/stage1 ... (run directories)
"""

import dataclasses
import json
import operator
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from jdiff import experiment, runs, super_resolution
from jdiff.config import completed, differences, from_json, to_json
from jdiff.errors import UserError, choose

#: What makes a folder a cascade's.
FILE = "cascade.json"

#: Replaces entries of config.sampling, see `runs.sampler`.
Choices = Mapping[str, Any]


class Opened(NamedTuple):
    """A trained cascade.

    Attributes:
      cascade: a `cascades.Cascade`: `cascade.sample(key, cond, num)` draws.
      runs: each stage's run, the base first.
      config: of the whole, as `config` made it.
    """

    cascade: Any
    runs: tuple[runs.Run, ...]
    config: ml_collections.ConfigDict


def config(name: str, *stages: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config of a cascade: what get_config() of its file returns.

    Args:
      name: of the cascade, for reports.
      stages: an experiment's config (`experiment.defaults`) each, the base first. All but the base
        have a low_res.factor.

    Its fields are `name`; `stages`, which has each stage's config under its number
    (--config.stages.1.train.steps=500); and `stage`, which one to train (--config.stage=1, or by
    the name of its config), None for all in order.

    Raises:
      UserError: no stages, or a config that is not an experiment's.
    """
    if not stages:
        raise UserError("staged.config: a cascade has one stage or more; none was given.")
    c = ml_collections.ConfigDict()
    c.name = name
    c.stage = None  # which one to train, by its number or name; None: all in order
    c.stages = ml_collections.ConfigDict()
    for k, stage in enumerate(stages):
        if not isinstance(stage, ml_collections.ConfigDict) or "train" not in stage:
            raise UserError(f"staged.config: stage {k} is no experiment's config but {stage!r}.")
        c.stages[str(k)] = stage
    return c


def is_config(config: ml_collections.ConfigDict) -> bool:
    """Whether it is a cascade's, and not an experiment's."""
    return "stages" in config


def parts(config: ml_collections.ConfigDict) -> tuple[ml_collections.ConfigDict, ...]:
    """The experiment's config of each stage, the base first."""
    return tuple(config.stages[str(k)] for k in range(len(config.stages)))


def chosen(config: ml_collections.ConfigDict) -> int | None:
    """The number of the stage that config.stage names, by number or name; None for all.

    Raises:
      UserError: there is no such stage (the nearest is named).
    """
    if config.stage is None:
        return None
    numbers = {str(k): k for k in range(len(config.stages))}
    names = {part.name: k for k, part in enumerate(parts(config)) if part.name} | numbers
    return names[choose("config.stage", str(config.stage), names)]


def one(config: ml_collections.ConfigDict, command: str) -> ml_collections.ConfigDict:
    """The experiment's config that a command for one run is to take: itself, or the chosen stage's.

    Raises:
      UserError: a cascade's config without config.stage, or with one that it does not have.
    """
    if not is_config(config):
        return config
    k = chosen(config)
    if k is None:
        listed = ", ".join(f"{i} ({part.name})" for i, part in enumerate(parts(config)))
        raise UserError(
            f"the config is a cascade's, and `jdiff {command}` takes one stage of it: give "
            f"--config.stage=K, one of {listed}."
        )
    return parts(config)[k]


def check(config: ml_collections.ConfigDict) -> None:
    """Builds all stages on their data, so that what does not fit is told before training.

    Raises:
      UserError: as `built`; a data set that is not prepared.
    """
    from jdiff.data import sources

    sets = [part.data for part in parts(config)]
    infos = [
        sources.source(c.name, c.train_split, c.data_dir, fields=c.conditions, in_memory=False).info
        for c in sets
    ]
    built(config, infos)


def built(
    config: ml_collections.ConfigDict, infos: Sequence[Any]
) -> tuple[experiment.Experiment, ...]:
    """The experiment of every stage; nothing is computed.

    Args:
      infos: the `data.Info` of each stage's data, as they are before config.data.size.

    Raises:
      UserError: as `experiment.build` and `cascades.cascade`; names the stage.
    """
    from jdiff.cascades.cascade import cascade

    experiments, made, shape = [], [], None
    for k, (part, info) in enumerate(zip(parts(config), infos, strict=True)):
        try:
            info = experiment.prepared(info, part.data)
            exp = experiment.build(part, info)
            shape = _size(part, exp.low_res, info, shape)
            for size in dict.fromkeys((info.shape, shape)):  # of crops, and of what they make
                experiment.check(exp, dataclasses.replace(info, shape=size))
            made.append(_stage(part, exp.denoiser(None), exp.null, exp.low_res, shape))
        except UserError as error:
            raise UserError(f"stage {k} ({part.name}): {error}") from error
        experiments.append(exp)
    cascade(*made)
    return tuple(experiments)


def folder(workdir: str | pathlib.Path, k: int) -> pathlib.Path:
    """The run directory of stage k."""
    return pathlib.Path(workdir) / f"stage{k}"


def is_cascade(workdir: str | pathlib.Path) -> bool:
    """Whether a folder is a cascade's."""
    return (pathlib.Path(workdir) / FILE).is_file()


def read(workdir: str | pathlib.Path) -> ml_collections.ConfigDict:
    """The config of a cascade's folder, of this version or an earlier one.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    path = pathlib.Path(workdir) / FILE
    if not path.is_file():
        raise UserError(f"{workdir} is not a cascade (no {FILE}); `jdiff train` writes one.")
    try:
        found = from_json(path.read_text())
        with found.unlocked():
            for part in parts(found):
                completed(part, experiment.defaults())
        return found
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def claim(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Makes `workdir` the folder of this cascade, or checks that it already is.

    Raises:
      UserError: it holds a cascade of another config (the differences are named), or other files.
    """
    if (workdir / "config.json").is_file():
        raise UserError(f"{workdir} is the directory of a run; name another for a cascade.")
    kept = config.copy_and_resolve_references()
    with kept.unlocked():
        kept.stage = None  # which one is trained is the command's, not the cascade's
    differ = lambda: _unlike(read(workdir), config)
    runs.take(workdir, FILE, to_json(kept), differ, "cascade", "cascade")


def finished(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, *, evaluate: bool
) -> bool:  # fmt: skip
    """Whether the run directory of a stage needs nothing more.

    Args:
      config: the stage's, as it is asked for now.
      evaluate: whether an evaluation of its last step belongs to it, as `config` samples.
    """
    if runs.read_description(workdir).get("state") != "finished":
        return False
    before = runs.read_config(workdir)  # as it was asked for then
    steps = before.train.steps
    if steps < config.train.steps or not evaluate:
        return steps >= config.train.steps
    if any(line.startswith(("sampling.", "evaluation.")) for line in differences(before, config)):
        return False
    return _evaluation(workdir).get("settings", {}).get("step", -1) >= steps


def measured(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> bool:
    """Whether the cascade as a whole is evaluated, after the last step of every stage."""
    steps = [row["settings"].get("step", -1) for row in _evaluation(workdir).get("stages", ())]
    wanted = [part.train.steps for part in parts(config)]
    return len(steps) == len(wanted) and all(map(operator.ge, steps, wanted))


def load_cascade(
    workdir: str | pathlib.Path, *, ema: str | Sequence[str | None] | None = None,
    sampling: Choices | Sequence[Choices | None] | None = None,
    mesh: Mapping[str, int] | None = None,
) -> Opened:  # fmt: skip
    """Opens a cascade's folder: all its stages, ready to sample as one.

    Args:
      workdir: a folder in which `jdiff train` trained every stage.
      ema: which average of the weights, of all stages or one a stage; each config's own unless
        given, "params" for the weights themselves.
      sampling: replaces entries of config.sampling of all stages, or of each: see `runs.sampler`.
        The base has no input: aug_level and truncate of all stages are not for it.
      mesh: devices an axis, as of `load_run`.

    Raises:
      UserError: no cascade there, a stage that is not trained, as `load_run`, or stages that do
        not fit each other.

    >>> opened = jdiff.load_cascade("runs/cdm_digits")
    >>> images = opened.cascade.sample(key, {"label": labels}, num=64)
    """
    from jdiff.cascades.cascade import cascade

    config = read(workdir)
    count = len(config.stages)
    averages, choices = _each("ema", ema, count, str), _each("sampling", sampling, count, Mapping)
    opened, made, shape = [], [], None
    for k, part in enumerate(parts(config)):
        if not any(folder(workdir, k).glob("checkpoints/*")):
            raise UserError(
                f"{workdir}: stage {k} ({part.name}) is not trained yet; `jdiff train` with "
                f"--config.stage={k} does that."
            )
        run = runs.load_run(folder(workdir, k), ema=averages[k], mesh=mesh)
        own = dict(choices[k] or {})
        if run.low_res is None and isinstance(sampling, Mapping):
            own = {name: v for name, v in own.items() if name not in ("aug_level", "truncate")}
        shape = _size(run.config, run.low_res, run.info, shape)
        made.append(stage(run, own, shape))
        opened.append(run)
    return Opened(cascade(*made), tuple(opened), config)


def stage(
    run: runs.Run, choices: Choices | None = None, shape: tuple[int, int, int] | None = None
) -> Any:
    """The `cascades.Stage` of a trained run; `choices` replace entries of config.sampling.

    Args:
      shape: of its images, (H, W, C), where they are larger than those of its training.

    Raises:
      UserError: as `runs.sampler`, or a level of the augmentation that is missing or out of range.
    """
    settings = runs.chosen(run.config, dict(choices or {}))
    return _stage(settings, run.denoiser, run.null, run.low_res, shape or tuple(run.info.shape))


def _stage(
    config: ml_collections.ConfigDict, denoiser: Any, null: dict[str, Any], low_res: Any,
    shape: tuple[int, int, int],
) -> Any:  # fmt: skip
    """The `cascades.Stage` of a trained denoiser and its config."""
    from jdiff.cascades.stages import stage

    denoise, solver, times = experiment.sampler(config, denoiser, null)
    super_resolution.level(config, low_res)  # its errors name the field
    return stage(
        denoise, times=times, shape=shape, solver=solver, low_res=low_res,
        level=config.sampling.aug_level, truncate=config.sampling.truncate,
        batch=config.sampling.batch,
    )  # fmt: skip


def _size(
    config: ml_collections.ConfigDict, low_res: Any, info: Any, before: tuple[int, int, int] | None
) -> tuple[int, int, int]:
    """The shape of a stage's images: trained on crops, it enlarges whatever the stage before made.

    Raises:
      UserError: a base with a low-resolution input, a later stage without.
    """
    if info.latent:
        raise UserError(f"{info.name} holds latents; the stages of a cascade make images.")
    if (low_res is None) != (before is None):
        first = "the base of a cascade has no low-resolution input; give None"
        later = "a stage above the base has a low-resolution input; give e.g. 2"
        raise UserError(
            f"config.low_res.factor={config.low_res.factor}: {first if before is None else later}."
        )
    if before is not None and config.data.crop == "patch":
        height, width, _ = before
        return (
            round(height * low_res.factor), round(width * low_res.factor), info.shape[-1]
        )  # fmt: skip
    return tuple(info.shape)


def _evaluation(workdir: pathlib.Path) -> dict[str, Any]:
    """evaluation.json; nothing if there is none, or it cannot be read."""
    try:
        return json.loads((workdir / "evaluation.json").read_text())
    except (OSError, ValueError):
        return {}


def _each(name: str, given: Any, count: int, kind: type) -> list[Any]:
    """One entry a stage: the same for all, or those of a sequence."""
    if given is None or isinstance(given, kind):
        return [given] * count
    if len(given) != count:
        raise UserError(f"{name}: {len(given)} entries given for {count} stages.")
    return list(given)


def _unlike(before: ml_collections.ConfigDict, now: ml_collections.ConfigDict) -> list[str]:
    """The differences, a line each, that keep the stages of the one from being the other's."""
    if len(before.stages) != len(now.stages):
        return [f"{len(before.stages)} stages -> {len(now.stages)}"]
    return [
        f"stages.{k}.{line}"
        for k, pair in enumerate(zip(parts(before), parts(now)))
        for line in runs.unlike(*pair)
    ]
