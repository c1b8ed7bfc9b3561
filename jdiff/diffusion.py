"""The kind of experiment that most are: a denoiser, see `jdiff.experiment`."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from jdiff import assess as assessment
from jdiff import drawing as pictured
from jdiff import experiment, runs
from jdiff.pytree import PyTree
from jdiff.report import diffusion as reported

OPENER = "jdiff.load_run"

defaults = experiment.defaults
layout = experiment.layout
build = experiment.build
check = experiment.check
drawing = pictured.drawing
table = assessment.table
page = reported.page


def frozen(
    config: ml_collections.ConfigDict, info: Any, sizes: Mapping[str, int] | None = None
) -> tuple[PyTree, Any]:
    """The weights of the run that config.loss.teacher names, and how they sample; (None, None)."""
    if config.loss.teacher is None:
        return None, None
    return runs.teacher(config.loss.teacher, info, config.low_res, sizes)


def check_later(exp: experiment.Experiment) -> None:
    """Makes the sampler, whose errors are to come before training."""
    exp.nulls(exp.shapes())
    experiment.sampler(exp.config, exp.denoiser(None), exp.null)


def open(workdir: Any, **options: Any) -> runs.Run:  # shadows a builtin that is not used here
    """See `runs.load_run`."""
    return runs.load_run(workdir, **options)


def assess(run: runs.Run, **options: Any) -> dict[str, Any]:
    """See `jdiff.assess.assess`."""
    return assessment.assess(run, **options)
