"""The command line: `jdiff train | sample | generate | evaluate | report | ...`.

This module reads the words and picks the command; the work is in jdiff/commands, which import what
they need only when they run, so that help and mistakes answer at once.
"""

import argparse
import difflib
import re
import shutil
import sys
from collections.abc import Sequence
from typing import NoReturn

from jdiff import commands
from jdiff.errors import UserError, choose, told

DESCRIPTION = """\
Diffusion and flow models in JAX: train, sample, evaluate and report.

A run lives in one directory: its config, metrics, checkpoints, pictures, evaluation and report.
`jdiff COMMAND --help` tells everything about a command."""

EPILOG = """\
examples:
  jdiff train --config=configs/digits.py --workdir=runs/digits
  jdiff sample --workdir=runs/digits --labels=0-9 --guidance_scale=2 --out=digits.png
  jdiff generate "a red fox" --model=stable-diffusion-v1-5 --out=fox.png
  jdiff evaluate --workdir=runs/digits --num=2000
  jdiff report --workdir=runs/digits
  jdiff train --config=configs/cdm_digits.py --workdir=runs/cdm    # a cascade: sample takes it too
  jdiff plan --config=configs/imagenet64_edm.py --devices=8xH100
  jdiff sweep --config=configs/digits.py --workdir=runs/lr --parallel=2
  jdiff prepare --list

exit codes:
  0    done
  1    something failed that is not a mistake in the command (--traceback shows where)
  2    a mistake in the command, the config or the files it names; one line on stderr says which
  65   training diverged: the loss or gradient is not finite
  74   the disk is full or the data cannot be read; the same command resumes once that is repaired
  75   stopped by SIGTERM, saved: the same command resumes (schedulers requeue this code)
  76   another process of the run was lost; the same command resumes
  130  stopped by Ctrl-C; training saves first, and the same command resumes"""

TRACEBACK = "--traceback"

# The commands that read a config file; overrides of its fields are theirs.
_TAKE_CONFIG = ("train", "sweep", "plan", "launch")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code (see EPILOG); `argv` is without the program."""
    words = list(sys.argv[1:] if argv is None else argv)
    traceback_wanted = TRACEBACK in words
    try:
        return _run(words)
    except SystemExit as stop:  # argparse, after --help or --version
        return int(stop.code or 0)
    except (
        BrokenPipeError
    ):  # the reader of our output has gone, as in `jdiff prepare --list | head`
        sys.stderr.close()
        return 1
    except (KeyboardInterrupt, Exception) as error:
        if traceback_wanted:
            raise
        text, code = told(error)
        print(text, file=sys.stderr)
        return code


def _run(words: list[str]) -> int:
    words, overrides = split_overrides(words)
    parser = build()
    args, unknown = parser.parse_known_args(parser.spell(words))
    chosen = parser.commands.choices[args.command] if args.command else parser
    if unknown:
        chosen.refuse(unknown[0])
    if args.command is None:
        parser.print_help()
        return 0
    if args.command in _TAKE_CONFIG:
        args.overrides = overrides
    elif overrides:
        raise UserError(
            f"{overrides[0]}: `jdiff {args.command}` takes no config fields, as `jdiff train` does;"
            f" `jdiff {args.command} --help` lists what it takes."
        )
    return args.run(args)


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(other words, overrides): `--config.a=1`, and `--config.a 1` with the value that follows."""
    rest: list[str] = []
    overrides: list[str] = []
    waiting = False  # for the value of an override without "="
    for word in words:
        if word.startswith(("--config.", "--noconfig.")):
            overrides.append(word)
            waiting = "=" not in word
        elif waiting and not word.startswith("--"):
            overrides.append(word)
            waiting = False
        else:
            rest.append(word)
            waiting = False
    return rest, overrides


def build() -> "Parser":
    """The parser of the whole command line."""
    from importlib.metadata import version

    parser = Parser(prog="jdiff", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"jdiff {version('jdiff')}")
    parser.commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", parser_class=Parser
    )
    for name, module in commands.ALL.items():
        sub = parser.commands.add_parser(
            name, help=module.SUMMARY, description=module.DESCRIPTION, epilog=module.EXAMPLES
        )
        module.configure(sub)
        sub.add_argument(
            TRACEBACK, action="store_true", help="on an error, show Python's traceback"
        )
        sub.set_defaults(run=module.run)
    return parser


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that offer the nearest choice, and untouched help texts."""

    commands: argparse._SubParsersAction

    def __init__(self, **options):
        options.setdefault("allow_abbrev", False)
        super().__init__(formatter_class=_Formatter, **options)

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage and leaving."""
        stop = "" if message.endswith(("?", ".")) else "."
        raise UserError(f"{message}{stop} See {self.prog} --help")

    def refuse(self, word: str) -> NoReturn:
        """Says that a word is not known here, and which option may have been meant."""
        option = word.partition("=")[0]
        known = [o for o in self._option_string_actions if o.startswith("--")]
        near = difflib.get_close_matches(option, known, n=1)
        kind = "option" if option.startswith("-") else "argument"
        hint = f" Did you mean {near[0]}?" if near else ""
        self.error(f"{kind} {option} is not known.{hint}")

    def spell(self, words: Sequence[str]) -> list[str]:
        """The words with `--a-b` for `--a_b` and the like, and `--interval -3,3` joined by "="."""
        options = [*self._option_string_actions]
        for sub in self.commands.choices.values():
            options += sub._option_string_actions
        spelled = {option.replace("-", "_"): option for option in options}
        out: list[str] = []
        for word in words:
            option, equals, value = word.partition("=")
            before = out[-1] if out else ""
            if option.startswith("--"):
                out.append(spelled.get(option.replace("-", "_"), option) + equals + value)
            elif re.match(r"-[\d.]", word) and before.startswith("--") and "=" not in before:
                out[-1] = f"{before}={word}"
            else:
                out.append(word)
        return out

    def _check_value(self, action: argparse.Action, value: str) -> None:
        if action.choices is not None:
            what = "command" if action.dest == "command" else "/".join(action.option_strings)
            choose(what, value, action.choices)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions, and gives options room."""

    def __init__(self, prog: str):
        width = min(shutil.get_terminal_size().columns, 100)
        super().__init__(prog, max_help_position=28, width=width)


if __name__ == "__main__":
    sys.exit(main())
