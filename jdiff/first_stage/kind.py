"""The kind "autoencoder", for `jdiff.kinds`."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jdiff import assess as assessed
from jdiff import drawing as pictured
from jdiff import parallel
from jdiff.autoencoders import autoencoder
from jdiff.evaluation import lpips
from jdiff.first_stage import assessment, experiment, trained
from jdiff.first_stage.defaults import defaults as defaults
from jdiff.pictures import Drawing
from jdiff.pytree import Array, PyTree
from jdiff.report.facts import Facts
from jdiff.report.words import Words
from jdiff.training.step import State

OPENER = "jdiff.load_autoencoder"

build = experiment.build
check = experiment.check
layout = experiment.layout
open = trained.load  # shadows a builtin that is not used here
assess = assessment.assess
table = assessed.table

# Held-out images in the pictures of training, each beside its reconstruction, and cells in a row.
_SHOWN, _COLUMNS = 16, 8


def frozen(
    config: ml_collections.ConfigDict, info: Any, sizes: Mapping[str, int] | None = None
) -> tuple[PyTree, None]:
    """LPIPS' weights, a copy on every device, or None if config.loss.perceptual is 0.

    Of a plan (`sizes` is None) their shapes.

    Raises:
      UserError: they are not prepared.
    """
    if not config.loss.perceptual:
        return None, None
    if sizes is None:
        return lpips.shapes(), None
    weights = lpips.load()
    if jax.device_count() > 1:
        whole = jax.NamedSharding(parallel.make(dict(sizes)), jax.P())
        weights = jax.device_put(weights, whole)
    return weights, None


def check_later(exp: experiment.Experiment) -> None:
    """Nothing: what is done with an autoencoder later asks for nothing in its config."""


def drawing(
    exp: experiment.Experiment, config: ml_collections.ConfigDict, key: Array, info: Any
) -> Drawing:
    """Held-out images, each with its reconstruction on its right: of the latents' means."""
    images = pictured.held_out(config, _SHOWN)["image"]

    @jax.jit
    def reconstructed(weights: PyTree, images: Array) -> Array:
        return trained.reconstruct(autoencoder(exp.apply, weights), images)

    def draw(state: State) -> Array:
        name = config.sampling.ema
        weights = state.params if name == "params" else state.averages[name]
        return reconstructed(weights["autoencoder"], jnp.asarray(images))

    def arranged(made: Any) -> Any:
        truth = np.asarray(images, np.float32) / 127.5 - 1
        return np.stack([truth, np.asarray(made)], axis=1).reshape(-1, *images.shape[1:])

    return Drawing(draw, arranged, _COLUMNS)


def page(facts: Facts) -> Words:
    """The words of an autoencoder's report."""
    config = facts.config_of
    workdir = json.dumps(str(facts.workdir))
    widths = config.get("model.widths")
    factor = f"f = {2 ** (len(widths) - 1)}" if widths else None
    return Words(
        parts=(f"autoencoder {config.get('model.name')}", factor),
        same="held-out images, each with its reconstruction on its right",
        python=(
            "import jdiff\n\n"
            f"coder = jdiff.load_autoencoder({workdir})\n"
            "latents = coder.encode(images)         # [B, H, W, 3] in [-1, 1]\n"
            "images = coder.decode(latents)"
        ),
        shown="reconstructions",
        curves=(
            ("pixels", "Pixels", f"{config.get('loss.pixels')}, a mean over entries"),
            ("lpips", "LPIPS", "of reconstructions in training"),
            ("kl", "KL divergence", "nats an image"),
            ("perplexity", "Code perplexity", "of a batch"),
            ("generator", "Generator", "its loss in the game"),
            ("discriminator", "Discriminator", "its loss in the game"),
            ("adversarial_weight", "Weight of the game", "by the ratio of gradients"),
        ),
    )
