"""The experiment of kind "contrastive": a config as towers, loss and optimiser."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from ml_collections import config_dict

from jdiff.conditioning import floats
from jdiff.contrastive.loss import info_nce, limited
from jdiff.contrastive.towers import TwoTowers
from jdiff.data import conditions
from jdiff.defaults import common
from jdiff.errors import UserError, accepted, choose
from jdiff.experiment import split_over, to_float
from jdiff.parallel.layout import CONVOLUTIONAL, Layout, within
from jdiff.parallel.shardings import of_state
from jdiff.pytree import Array, PyTree
from jdiff.training import ema, optimizers

# Entry of cond -> the field of the towers that has its width; a mask has none.
_WIDTHS = {"text": "text_width", "pooled": "pooled_width"}


def defaults() -> ml_collections.ConfigDict:
    """Every field of a contrastive config, with its default."""
    c = common("contrastive")  # config.model: fields of `towers.TwoTowers`
    c.data.conditions = ("text", "text_mask", "pooled")  # what the texts are told by
    c.data.captions = "caption"  # the field of the data that holds the texts themselves
    c.texts = ml_collections.ConfigDict()
    # What reads new texts: "minilm" or a folder; None: what the data were encoded by.
    c.texts.encoder = config_dict.placeholder(str)
    c.loss = ml_collections.ConfigDict()
    c.loss.shift = 0.0  # images are moved by up to this share of their side, anew at each step
    c.sampling.batch = 256  # images and texts at a time, wherever they are measured
    c.evaluation.num = 10_000  # pictures at most
    c.evaluation.top = (1, 5)  # recall at these
    # A regular expression: what it matches in a caption is no difference ("the same thing").
    c.evaluation.same = config_dict.placeholder(str)
    return c


class Experiment(NamedTuple):
    """What a contrastive config stands for; see `jdiff.kinds.Kind` for what is expected of one."""

    config: ml_collections.ConfigDict
    apply: Any
    build: Any
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    averages: dict[str, ema.Average]
    told: tuple[str, ...]
    layout: Layout | None

    @property
    def empty(self) -> dict[str, Any]:
        """Nothing is guided here, so nothing of the empty text is kept."""
        return {}

    def init(self, key: Array) -> PyTree:
        """Fresh weights."""
        from jdiff import models

        with within(self.layout):
            return models.init(self.build, key)[1]

    def shapes(self) -> PyTree:
        """The shapes of the weights; nothing is computed."""
        from jdiff import models

        return models.abstract(self.build)[1]

    def placed(self, state: PyTree) -> PyTree:
        """Where the leaves of `state` (the weights, or a training state) live on the mesh."""
        from jdiff import models

        return of_state(state, models.axes(self.build), self.layout)

    def on(self, layout: Layout) -> "Experiment":
        """The same on other devices."""
        return self._replace(apply=self.apply.with_layout(layout), layout=layout)

    def cond(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """What a batch of the data says of its texts; floats of any precision as float32."""
        return floats({name: jnp.asarray(batch[name]) for name in self.told})

    def images(self, params: PyTree, x: Array) -> Array:
        """Unit vectors `[B, dim]` of images `[B, H, W, C]` in [-1, 1]."""
        return self.apply.method("image")(params, x)

    def texts(self, params: PyTree, cond: Mapping[str, Array]) -> Array:
        """Unit vectors `[B, dim]` of texts, from `cond`."""
        return self.apply.method("text")(params, cond)

    def loss(
        self, params: PyTree, key: Array, batch: dict[str, Array], state: Any = None
    ) -> tuple[Array, dict[str, Array]]:
        """The loss `[B]` of a batch, and beside it 1 / temperature and the share of the images
        whose own text is the nearest of the batch's."""
        key_shift, key_drop = jax.random.split(key)
        x = shifted(key_shift, to_float(batch["image"]), self.config.loss.shift)
        pair = self.apply.method("pair")
        images, texts, scale = pair(params, x, self.cond(batch), key_drop)
        values = info_nce(images, texts, scale, self._rows)
        nearest = self._rows(images @ texts.T).argmax(axis=1)
        found = jnp.mean(nearest == jnp.arange(len(images)), dtype=values.dtype)
        return values, {"scale": scale, "found": found}

    def _rows(self, logits: Array) -> Array:
        """Logits `[N, N]`, row by row where the images are."""
        if self.layout is None:
            return logits
        return jax.lax.with_sharding_constraint(logits, self.layout.batch)


def shifted(key: Array, x: Array, share: float) -> Array:
    """Images `[B, H, W, C]`, each moved by up to `share` of its side; the border is repeated."""
    reach = round(share * x.shape[1])
    if not reach:
        return x
    padded = jnp.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    offsets = jax.random.randint(key, (len(x), 2), 0, 2 * reach + 1)
    cut = lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), x.shape[1:])
    return jax.vmap(cut)(padded, offsets)


def layout(config: ml_collections.ConfigDict, mesh: Any = None) -> Layout:
    """The layout of `config.mesh` on all devices, or on another mesh.

    Raises:
      UserError: sizes that do not make the number of devices, or an axis other than data and fsdp.
    """
    return split_over(CONVOLUTIONAL, config, mesh, "contrastive towers are")


def build(
    config: ml_collections.ConfigDict, info: Any, teacher: Any = None,
    layout: Layout | None = None,
) -> Experiment:  # fmt: skip
    """The experiment on the data that `info` describes; computes nothing.

    Raises:
      UserError: data without embedded texts, a field that does not fit, or a batch that cannot be
        divided, naming the field.
    """
    from jdiff import latents, models

    latents.refuse(info)
    told = conditions.named(config.data.conditions, info)
    fields = {"in_channels": info.shape[-1], "image_size": info.shape[0]}
    for field in told:
        choose("config.data.conditions: entry", field.name, (*_WIDTHS, "text_mask"))
        if field.name in _WIDTHS:
            fields[_WIDTHS[field.name]] = field.shape[-1]
    given = dict(config.model)
    for name in given:
        choose("config.model (TwoTowers) field", name, accepted(TwoTowers))
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in (fields | given).items()}
    construct = lambda rngs: TwoTowers(**arguments, rngs=rngs)
    try:
        apply, _ = models.abstract(construct)
    except ValueError as error:
        raise UserError(f"config.model does not fit the data {info.name}: {error}") from error
    if config.train.accumulate != 1:
        raise UserError(
            f"config.train.accumulate={config.train.accumulate}: the pairs of a batch are each "
            "other's negatives, so it cannot be cut into micro-batches; give 1."
        )
    size, parts = config.train.batch_size, layout.batch_parts if layout else 1
    if size < 2 or size % parts:
        raise UserError(
            f"config.train.batch_size={size} is not a multiple of {parts} (mesh.data x mesh.fsdp) "
            "above 1."
        )
    if not 0 <= config.loss.shift < 0.5:
        raise UserError(f"config.loss.shift={config.loss.shift} must lie in 0..0.5.")
    optimizer, rate = optimizers.build(config.optimizer, config.train.steps)
    return Experiment(
        config=config, apply=apply.with_layout(layout), build=construct,
        optimizer=limited(optimizer), learning_rate=rate,
        averages=ema.build(config.ema, size),
        told=tuple(config.data.conditions), layout=layout,
    )  # fmt: skip


def check(exp: Experiment, info: Any) -> None:
    """Traces the loss on a batch of the data, computing nothing, so that errors come early.

    Raises:
      UserError: the towers do not take such images or texts.
    """
    batch = {"image": jax.ShapeDtypeStruct((2, *info.shape), "uint8")}
    for field in conditions.named(exp.config.data.conditions, info):
        batch[field.name] = jax.ShapeDtypeStruct((2, *field.shape), field.dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))
    alone = exp._replace(layout=None, apply=exp.apply.with_layout(None))
    try:
        jax.eval_shape(alone.loss, exp.shapes(), key, batch)
    except ValueError as error:
        raise UserError(f"config.model does not fit the data {info.name}: {error}") from error
