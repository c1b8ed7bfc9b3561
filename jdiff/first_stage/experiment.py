"""From the config of an autoencoder to the parts of its experiment."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from jdiff.errors import UserError, accepted, choose, not_negative
from jdiff.evaluation import lpips
from jdiff.experiment import divides, split_over, to_float
from jdiff.first_stage import adversary, discriminator, networks, objective, pixels
from jdiff.first_stage.discriminator import PatchGAN
from jdiff.models.functional import Apply
from jdiff.parallel.layout import CONVOLUTIONAL, Layout, within
from jdiff.parallel.shardings import of_state
from jdiff.pytree import Array, PyTree
from jdiff.training import ema, optimizers
from jdiff.training.step import State

#: Channels of the images that the networks take; grey ones are repeated.
COLOURS = 3


class Experiment(NamedTuple):
    """What a config stands for; see `jdiff.kinds.Kind`. The weights are those of "autoencoder" and,
    where there is one, of "discriminator"."""

    config: ml_collections.ConfigDict
    network: networks.Network
    builds: Mapping[str, Any]  # of each part, rngs -> module
    applies: Mapping[str, Apply]  # the same, as pure functions
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    averages: dict[str, ema.Average]
    layout: Layout | None

    @property
    def empty(self) -> dict[str, Any]:
        """Nothing is guided here, so nothing of the empty text is kept."""
        return {}

    def init(self, key: Array) -> PyTree:
        """Fresh parameters."""
        from jdiff import models

        keys = jax.random.split(key, len(self.builds))
        with within(self.layout):
            return {
                name: models.init(build, k)[1]
                for (name, build), k in zip(self.builds.items(), keys)
            }

    def shapes(self) -> PyTree:
        """The shapes of the parameters; nothing is computed."""
        from jdiff import models

        return {name: models.abstract(build)[1] for name, build in self.builds.items()}

    def placed(self, state: PyTree) -> PyTree:
        """Where the leaves of `state` (the weights, or a training state) live on the mesh."""
        from jdiff import models

        axes = {name: models.axes(build) for name, build in self.builds.items()}
        return of_state(state, axes, self.layout)

    def on(self, layout: Layout) -> "Experiment":
        """The same on other devices."""
        applies = {name: apply.with_layout(layout) for name, apply in self.applies.items()}
        return self._replace(applies=applies, layout=layout)

    @property
    def apply(self) -> Apply:
        """The autoencoder, without its weights."""
        return self.applies["autoencoder"]

    @property
    def objective(self) -> objective.Objective:
        """What is minimised."""
        c, judge = self.config.loss, self.applies.get("discriminator")
        game = adversary.BY_NAME[self.config.discriminator.loss]
        return objective.Objective(
            through=lambda weights, x, key: self.network.through(self.apply, weights, x, key, c.kl),
            last=networks.LAST,
            pixels=pixels.BY_NAME[c.pixels],
            perceptual=c.perceptual,
            lpips=lpips.distance,
            game=game if judge else None,
            judge=judge and judge.method("__call__"),
            adversarial=c.adversarial,
            start=c.start,
        )

    def loss(
        self, params: PyTree, key: Array, batch: dict[str, Array], state: State
    ) -> tuple[Array, dict[str, Array]]:
        """The loss `[B]` of a batch {"image": uint8 `[B, H, W, C]`}, and figures to log.

        See `objective.loss`.
        """
        x = in_colour(to_float(batch["image"]))
        return objective.loss(self.objective, params, key, x, state.step, state.frozen)


def build(
    config: ml_collections.ConfigDict, info: Any, teacher: None = None,
    layout: Layout | None = None,
) -> Experiment:  # fmt: skip
    """The experiment of a config; its networks take images of any size that their factor divides.

    Raises:
      UserError: an unknown name or argument, or numbers that make no sense, naming the field.
    """
    from jdiff import latents, models

    latents.refuse(info)
    c = config.loss
    not_negative(
        "config.loss", perceptual=c.perceptual, kl=c.kl, adversarial=c.adversarial, start=c.start
    )
    measure = pixels.BY_NAME[choose("config.loss.pixels", c.pixels, pixels.BY_NAME)]
    choose("config.discriminator.loss", config.discriminator.loss, adversary.BY_NAME)
    network, construct = _network(config, measure)
    builds = {"autoencoder": construct}
    if c.adversarial:
        builds["discriminator"] = lambda rngs: PatchGAN(
            channels=config.discriminator.channels, depth=config.discriminator.layers, rngs=rngs
        )
    try:
        applies = {
            name: models.abstract(make)[0].with_layout(layout) for name, make in builds.items()
        }
    except ValueError as error:
        raise UserError(f"config.model, config.discriminator: {error}") from error
    by = config.train.accumulate * (layout.batch_parts if layout else 1)
    what = "mesh.data x mesh.fsdp x train.accumulate"
    divides("config.train.batch_size", config.train.batch_size, by, what)
    optimizer, learning_rate = _optimizers(config, applies["autoencoder"].skeleton())
    return Experiment(
        config=config,
        network=network,
        builds=builds,
        applies=applies,
        optimizer=optimizer,
        learning_rate=learning_rate,
        averages=ema.build(config.ema, config.train.batch_size),
        layout=layout,
    )


def layout(config: ml_collections.ConfigDict, mesh: Any = None) -> Layout:
    """The layout of `config.mesh` on all devices, or on another mesh.

    Raises:
      UserError: sizes that do not make the number of devices, or an axis that convolutions are not
        split over.
    """
    return split_over(CONVOLUTIONAL, config, mesh, "an autoencoder is")


def check(exp: Experiment, info: Any) -> None:
    """Compares the sizes of the networks with the images, and traces the loss on two of them.

    Raises:
      UserError: images that the factor does not divide, too small ones, or of 2 or 4 channels.
    """
    height, width, channels = info.shape
    factor, c = exp.apply.skeleton().factor, exp.config
    if channels not in (1, COLOURS):
        raise UserError(f"{info.name} has images of {channels} channels; 1 or 3 are needed.")
    if height % factor or width % factor:
        near = max(factor, factor * round(min(height, width) / factor))
        raise UserError(
            f"images of {height} x {width} are not divisible by the factor {factor} of "
            f"config.model.widths; config.data.size={near} is."
        )
    side = min(height, width)
    if c.loss.perceptual and side < lpips.SMALLEST:
        raise UserError(
            f"config.loss.perceptual={c.loss.perceptual}: LPIPS takes images of {lpips.SMALLEST} "
            f"pixels a side or more, these have {side}; give 0, or a larger config.data.size."
        )
    least = discriminator.smallest(c.discriminator.layers)
    if exp.objective.game is not None and side < least:
        raise UserError(
            f"config.discriminator.layers={c.discriminator.layers}: a patch needs images of "
            f"{least} pixels a side or more, these have {side}; give fewer layers."
        )
    x = jax.ShapeDtypeStruct((2, height, width, COLOURS), jnp.float32)
    weights = exp.shapes()["autoencoder"]
    try:
        jax.eval_shape(exp.objective.through, weights, x, jax.random.key(0))
    except ValueError as error:
        raise UserError(f"config.model does not fit the data {info.name}: {error}") from error


def in_colour(x: Array) -> Array:
    """Images [B, H, W, 3] of colour ones or grey ones."""
    return jnp.broadcast_to(x, (*x.shape[:-1], COLOURS))


def _network(
    config: ml_collections.ConfigDict, measure: pixels.Pixels
) -> tuple[networks.Network, Any]:
    """The family, and rngs -> module."""
    arguments = dict(config.model)
    name = choose("config.model.name", arguments.pop("name", None), networks.BY_NAME)
    network = networks.BY_NAME[name]
    cls = network.plain if measure.outputs == 1 else network.logit_laplace
    known = set(accepted(cls)) - {"rngs", "in_channels", "out_channels"}
    for argument in arguments:
        choose(f"config.model ({name}) field", argument, known)
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    out = COLOURS * measure.outputs
    return network, lambda rngs: cls(**arguments, out_channels=out, rngs=rngs)


def _optimizers(
    config: ml_collections.ConfigDict, module: Any
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """One for each player, and plain descent for what moves by averaging; the first one's rate."""
    theirs = config.optimizer.copy_and_resolve_references()
    with theirs.unlocked():
        theirs.learning_rate = config.discriminator.learning_rate or config.optimizer.learning_rate
    averaged = set(getattr(module, "moved_by_averaging", ()))
    own, rate = optimizers.build(config.optimizer, config.train.steps)
    made = {
        "autoencoder": own,
        "discriminator": optimizers.build(theirs, config.train.steps)[0],
        "averaged": optax.sgd(1.0),
    }

    def label(path: tuple, leaf: Any) -> str:
        player, *rest = (str(entry.key) for entry in path)
        return "averaged" if tuple(rest) in averaged else player

    return optax.partition(made, lambda p: jax.tree_util.tree_map_with_path(label, p)), rate
