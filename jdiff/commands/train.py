"""jdiff train: trains the experiment of a config file, evaluates it and writes its report."""

import argparse
import math
import os
import pathlib
import sys
from typing import Any

from jdiff import exits
from jdiff.commands.many import add_hosts, joined
from jdiff.errors import told

SUMMARY = "train the model of a config file, evaluate it and write its report"
DESCRIPTION = """\
Trains the experiment that a config file describes: a denoiser, or what else config.kind says, such
as an autoencoder (docs/latent.md). When it is done, the model is evaluated and WORKDIR/report.html
is written.

Any field of the config can be overridden: --config.train.batch_size=64, --config.data.flip,
--noconfig.data.flip, --config.model.multipliers=1,2,2, --config.optimizer.clip=None, or a whole
section as JSON, --config.sampling.solver='{"name": "ddim", "eta": 0.5}'.

The same command on the same directory resumes where training stopped, bit for bit, whatever
stopped it. Ctrl-C, SIGTERM and SIGUSR1 save first. A directory that belongs to another config is
left alone.

The stages of a cascade's config (docs/cascades.md) are trained one after the other, each in a
directory of its own, WORKDIR/stage0, WORKDIR/stage1, ...; those that are finished are passed over,
and in the end the cascade is evaluated as a whole. --config.stage=1 trains that one alone, so that
stages can be trained at the same time, each by a command of its own.

On many hosts, start the same command once a host; see "many hosts" below."""
EXAMPLES = """\
examples:
  jdiff train --config=configs/digits.py --workdir=runs/digits
  jdiff train --config=configs/digits.py --workdir=runs/small --config.train.batch_size=64 \\
      --config.train.steps=500
  jdiff train --config=configs/digits_dit_flow.py --workdir=runs/flow --no-evaluate
  jdiff train --config=configs/digits.py --workdir=runs/digits --profile=101:10
  jdiff train --config=configs/autoencoder_emoji.py:small --workdir=runs/autoencoder
  jdiff train --config=configs/cdm_digits.py --workdir=runs/cdm
  jdiff train --config=configs/cdm_digits.py --workdir=runs/cdm --config.stage=1 \
      --config.stages.1.train.steps=4000

WORKDIR then holds:
  config.json, run.json         the config, and where and when it ran, with which versions
  metrics.jsonl, tb/            loss and speed, as JSON lines and for TensorBoard
  profile/                      with --profile: a trace of some steps, and what it adds up to
  checkpoints/                  Orbax checkpoints: weights, averages, optimiser, data order
  samples/step_*.png            a picture of samples every config.train.sample_every steps
  classifier.safetensors        the classifier of the real training split that judges samples
  evaluation.json, report.html  the figures, and everything on one page

A cascade's WORKDIR holds cascade.json, its config, such a directory for each stage, and the
evaluation.json, pictures/ and report.html of the whole."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:TEXT]",
        help="a Python file with get_config(); with :TEXT, get_config(TEXT) is called",
    )  # fmt: skip
    parser.add_argument(
        "--workdir", type=pathlib.Path, required=True, metavar="DIR",
        help="the run directory: new, empty, or of an earlier run of this config",
    )  # fmt: skip
    parser.add_argument(
        "--no-evaluate", action="store_true", help="only train; the report has no evaluation then"
    )
    parser.add_argument(
        "--profile", nargs="?", const="11:5", metavar="FIRST:COUNT",
        help="trace COUNT steps, from the FIRST that this start takes (11:5 unless given), into "
        "WORKDIR/profile; the report then says where their time went",
    )  # fmt: skip
    add_hosts(parser)


def run(args: argparse.Namespace) -> int:
    """Trains, evaluates, reports."""
    from jdiff.training import stop

    with stop.at_once(), joined(args) as console:
        return _run(args, console)


def _run(args: argparse.Namespace, console: Any) -> int:
    from jdiff import config, staged

    settings = config.load(args.config, args.overrides)
    if staged.is_config(settings):
        return _cascade(args, settings, console)
    return _one(args, settings, args.workdir, console)


def _cascade(args: argparse.Namespace, settings: Any, console: Any) -> int:
    """The stage that config.stage names, or all in order."""
    from jdiff import runs, staged
    from jdiff.parallel import hosts
    from jdiff.training.checkpoints import any_process

    only = staged.chosen(settings)
    parts = staged.parts(settings)
    if only is None:
        staged.check(settings)
    if hosts.line().first:
        staged.claim(args.workdir, settings)
    begun = False
    for k in range(len(parts)) if only is None else [only]:
        where = staged.folder(args.workdir, k)
        said = f"stage {k} of {len(parts)}, {parts[k].name}: "
        left = not staged.finished(where, parts[k], evaluate=not args.no_evaluate)
        if only is None and not any_process(left):  # all, before any of them changes it
            if hosts.line().first:
                runs.claim(where, parts[k])  # what may change of a run is as given now
            _tell(console, said + "finished before")
            continue
        _tell(console, said + str(where))
        if code := _one(args, parts[k], where, console):
            return code
        begun = True
    return exits.OK if only is not None else _whole(args, settings, console, anew=begun)


def _whole(args: argparse.Namespace, settings: Any, console: Any, *, anew: bool) -> int:
    """Evaluates and reports a cascade whose stages are trained; `anew`: whatever was measured."""
    from jdiff import report, staged
    from jdiff.assess_cascade import assess_cascade, table
    from jdiff.parallel import hosts
    from jdiff.training.checkpoints import any_process

    if not args.no_evaluate and any_process(anew or not staged.measured(args.workdir, settings)):
        opened = staged.load_cascade(args.workdir)
        console.print(table(assess_cascade(opened, console=console)))
    if hosts.line().first:
        _tell(console, f"report   {report.write_cascade(args.workdir)}")
    return exits.OK


def _one(args: argparse.Namespace, settings: Any, workdir: pathlib.Path, console: Any) -> int:
    """Trains, evaluates and reports one run."""
    from jdiff import kinds, report
    from jdiff.data.patience import Unreadable
    from jdiff.parallel import hosts
    from jdiff.profiling import tracer
    from jdiff.train import Stopped, train

    first = hosts.line().first
    profile = None if args.profile is None else tracer.profile(args.profile)
    try:
        result = train(settings, workdir, console, profile)
    except Stopped as stop:
        if first:
            print(stop, file=sys.stderr)
        return stop.code
    except Unreadable as error:
        if error.hung and hosts.line().count == 1:  # Python would wait for the reader at exit
            text, code = told(error)
            print(text, file=sys.stderr, flush=True)
            os._exit(code)
        raise
    if math.isnan(result.loss):  # a diverged run raises; here no step was left to do
        _tell(console, f"nothing left to train: step {result.step:,} was reached before")
    else:
        done = f"trained {result.step:,} steps in {result.seconds:.0f} s, loss {result.loss:.4f}"
        _tell(console, done)
    if not args.no_evaluate:
        kind = kinds.of(settings)
        console.print(kind.table(kind.assess(kind.open(workdir), console=console)))
    if first:
        _tell(console, f"report   {report.write(workdir)}")
    return exits.OK


def _tell(console: Any, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
