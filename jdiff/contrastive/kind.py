"""The kind "contrastive", as `jdiff.kinds` asks for it: training, pictures, assessment, report."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jdiff import runs
from jdiff.contrastive import assess as assessment
from jdiff.contrastive import experiment
from jdiff.contrastive.experiment import Experiment
from jdiff.experiment import to_float
from jdiff.pictures import Drawing
from jdiff.pytree import Array, PyTree
from jdiff.report.words import Words

OPENER = "jdiff.contrastive.scorer.load"

defaults = experiment.defaults
layout = experiment.layout
build = experiment.build
check = experiment.check
assess = assessment.assess
table = assessment.table

# Of the pictures of training: pictures that are searched, captions, and what is shown of each.
_SEARCHED, _CAPTIONS, _NEAREST = 256, 8, 7


def frozen(
    config: ml_collections.ConfigDict, info: Any, sizes: Mapping[str, int] | None = None
) -> tuple[PyTree, Any]:
    """Nothing: what makes embeddings of the texts worked before, see `jdiff encode`."""
    return None, None


def check_later(exp: Experiment) -> None:
    """Refuses an evaluation that could not be made.

    Raises:
      UserError: as `assess.check`.
    """
    assessment.check(exp.config)


def drawing(
    exp: Experiment, config: ml_collections.ConfigDict, key: Array, info: Any
) -> Drawing:  # fmt: skip
    """A row for each of some held-out captions: its own picture, then the nearest of 256."""
    from jdiff.drawing import held_out

    del key
    batch = held_out(config, _SEARCHED)
    x, cond = to_float(batch["image"]), exp.cond(batch)
    count, shown = min(_CAPTIONS, len(x)), min(_NEAREST, len(x))

    @jax.jit
    def found(params: PyTree) -> Array:
        texts = exp.texts(params, {name: entry[:count] for name, entry in cond.items()})
        order = jnp.argsort(-texts @ exp.images(params, x).T, axis=1)[:, :shown]
        places = jnp.concatenate([jnp.arange(count)[:, None], order], axis=1)
        return jnp.asarray(x)[places.reshape(-1)]

    def draw(state: Any) -> Array:
        name = config.sampling.ema
        return found(state.params if name == "params" else state.averages[name])

    return Drawing(draw, np.asarray, 1 + shown)


def open(workdir: Any, **options: Any) -> runs.Restored:  # shadows a builtin not used here
    """See `runs.restored`."""
    return runs.restored(workdir, **options)


def page(facts: Any) -> Words:
    """The words of the report."""
    workdir = json.dumps(str(facts.workdir))
    return Words(
        parts=("contrastive",),
        same="held-out captions: their own picture, then the nearest of the first 256",
        python=(
            "from jdiff.contrastive import scorer\n\n"
            f"judge = scorer.load({workdir})\n"
            "images, texts = judge.images(pictures), judge.texts(captions)  # unit vectors\n"
            "scores = scorer.clip_score(images, texts)"
        ),
        shown="pictures",
        curves=(
            ("found", "Found in the batch", "images whose own text is the nearest"),
            ("scale", "Scale", "1 / temperature"),
        ),
    )
