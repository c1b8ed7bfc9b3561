"""From config.loss to one function: a loss by its name, with what the config says of it."""

import functools
import inspect
from collections.abc import Callable

import ml_collections

from jdiff import distributions, losses, schedules, solvers, weightings
from jdiff.errors import UserError, call, choose
from jdiff.pytree import Array

# The arguments of a loss that config.loss.arguments does not give: those that training hands over
# at each step, and those that have a section of config.loss.
_BY_TRAINING = ("dropout_key", "null", "eps", "step", "total", "target", "teacher", "sampler")
_SECTIONS = {
    "distribution": distributions.BY_NAME, "solver": solvers.BY_NAME,
    "weighting": weightings.BY_NAME | {"own": lambda: None},
}  # fmt: skip
_TEACHERS = {"teacher", "sampler"}


def objective(config: ml_collections.ConfigDict) -> Callable[..., Array]:
    """The loss of config.loss: (key, denoiser, x0, cond, *, what training hands over) -> `[B]`.

    Raises:
      UserError: an unknown name or argument, a teacher missing or superfluous, a network or a
        weighting that the loss cannot serve; names the field.
    """
    c = config.loss
    name = choose("config.loss.name", c.name, losses.BY_NAME)
    takes = inspect.signature(losses.BY_NAME[name]).parameters
    needed = {n for n, p in takes.items() if p.default is p.empty}
    arguments = _arguments(c, name, takes, needed)
    choose("config.loss.target", c.target, [*config.ema, "params"])
    if needed & _TEACHERS and c.teacher is None:
        raise UserError(f"config.loss.teacher: {name} learns from a run; name its directory.")
    if c.teacher is not None and not takes.keys() & _TEACHERS:
        raise UserError(f"config.loss.teacher={c.teacher!r}: {name} has no teacher; give None.")
    if name in losses.FLOW_MAPS:
        _check_flow_map(config)
    for section, table in _SECTIONS.items():
        made = call(f"config.loss.{section}", table, c[section])
        if section in takes:
            arguments[section] = made
        elif section == "weighting" and made is not None:
            raise UserError(f"config.loss.weighting: {name} has its own; give the name 'own'.")
    return functools.partial(losses.BY_NAME[name], **arguments)


def _arguments(c: ml_collections.ConfigDict, name: str, takes: dict, needed: set[str]) -> dict:
    """config.loss.arguments, after checking them against what the loss takes."""
    own = [
        n for n, p in takes.items()
        if p.kind is p.KEYWORD_ONLY and n not in _BY_TRAINING and n not in _SECTIONS
    ]  # fmt: skip
    for argument in c.arguments:
        choose(f"config.loss.arguments ({name}) entry", argument, own)
    missing = [n for n in own if n in needed and n not in c.arguments]
    if missing:
        raise UserError(f"config.loss.arguments: {name} needs {', '.join(missing)}.")
    return dict(c.arguments)


def _check_flow_map(config: ml_collections.ConfigDict) -> None:
    """The network has to hear of the target time, in the units in which it hears of t."""
    name, scalars = config.loss.name, list(config.model.get("scalars", ()))
    if not {"s", "t-s"} & set(scalars):
        raise UserError(
            f"config.model.scalars={scalars}: {name} trains a flow map, which is told where its "
            "step ends; give ('t-s',)."
        )
    if config.parameterization.time not in (None, "t"):
        raise UserError(
            f"config.parameterization.time={config.parameterization.time!r}: a flow map is told t "
            "and s in the same units; give 't', and config.model.time_scale the scale of both."
        )
    try:  # what cannot be sampled in the end is not trained
        schedule = call("config.schedule", schedules.BY_NAME, config.schedule)
        solvers.flow_map().check(schedule, None)
    except UserError as error:
        raise UserError(f"config.schedule.name={config.schedule.name!r}: {error}") from error
