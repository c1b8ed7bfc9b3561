"""Sampler options of single stages: those behind --stage=K are of stage K alone."""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

from jdiff.errors import UserError

#: What belongs to a low-resolution input, which the base of a cascade does not have.
_OF_INPUT = ("aug_level", "truncate")


class PerStage:
    """A group of options each of which may be given for all stages and for single ones."""

    def __init__(self, group: Any):
        self._group = group

    def add_argument(self, *names: str, **settings: Any) -> None:
        """As argparse's; the value goes to the stage that was named last, if one was."""
        self._group.add_argument(*names, action=_Value, **settings)


def add_stage(group: Any) -> None:
    """--stage."""
    group.add_argument(
        "--stage", action=_Stage, metavar="K",
        help="of a cascade: --ema and the sampler options behind it, up to the next --stage, are "
        "of stage K alone (0 is the base); those before the first one are of all stages. E.g. "
        "--steps=20 --stage=1 --steps=10 --aug_level=0.2",
    )  # fmt: skip


def of_run(args: argparse.Namespace, config: Any) -> None:
    """Checks the options of a command that was given a run.

    Raises:
      UserError: options of a cascade, or of a low-resolution input that the run does not have.
    """
    if args.stages is not None:
        raise UserError(
            f"--stage is for a cascade's folder; {args.workdir} is a run, to which all options "
            "apply."
        )
    for name in _OF_INPUT:
        if config.get("low_res", {}).get("factor") is None and getattr(args, name) is not None:
            raise UserError(
                f"--{name}: {args.workdir} has no low-resolution input (config.low_res.factor)."
            )


def of_cascade(
    args: argparse.Namespace, configs: Sequence[Any]
) -> tuple[list[str | None], list[dict[str, Any]]]:
    """(the average of the weights, the sampler options as `runs.sampler` takes them) of each stage.

    Args:
      configs: of the stages, the base first.

    Raises:
      UserError: a stage that the cascade does not have, an option that is for runs, or a name that
        is not known.
    """
    from jdiff.commands.options import choices

    own = args.stages or {}
    for k in own:
        if k >= len(configs):
            raise UserError(f"--stage={k}: {args.workdir} has stages 0 to {len(configs) - 1}.")
    if args.step is not None:
        raise UserError(
            f"--step is for a run; of the cascade {args.workdir} every stage's newest checkpoint "
            "is taken."
        )
    for name in _OF_INPUT:
        if name in own.get(0, {}):
            raise UserError(f"--stage=0 --{name}: the base has no low-resolution input.")
    averages, chosen = [], []
    for k, config in enumerate(configs):
        given = argparse.Namespace(**vars(args) | own.get(k, {}))
        if k == 0:
            given.aug_level = given.truncate = None
        averages.append(given.ema)
        chosen.append(choices(given, config))
    return averages, chosen


def folder(workdir: pathlib.Path) -> bool:
    """Whether the directory of a command is a cascade's."""
    return (workdir / "cascade.json").is_file()


class _Value(argparse.Action):
    """Stores a value for all stages, or for the one that --stage named."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        if namespace.stages is None:
            setattr(namespace, self.dest, values)
        else:
            namespace.stages[list(namespace.stages)[-1]][self.dest] = values


class _Stage(argparse.Action):
    """Names the stage that the values after it are for: {number: {option: value}}, the last named
    one at the end."""

    def __init__(self, option_strings: Any, dest: str, **settings: Any):
        super().__init__(option_strings, "stages", **settings)

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        from jdiff.commands.options import whole

        try:
            k = whole(0)(values)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        before = namespace.stages or {}
        namespace.stages = {n: v for n, v in before.items() if n != k} | {k: before.get(k, {})}
