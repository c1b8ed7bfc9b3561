"""From a config to the parts of an experiment: every name is looked up in its module's BY_NAME.

`defaults()` is the whole config with every field and its meaning; a file in configs/ edits it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import ml_collections
import optax

from jdiff import (
    couplings,
    grids,
    guidance,
    latents,
    parallel,
    schedules,
    solvers,
    super_resolution,
)
from jdiff.conditioning import LEARNED, drop, floats
from jdiff.data import conditions, encoded
from jdiff.defaults import defaults as defaults
from jdiff.denoisers import Network, network
from jdiff.errors import UserError, accepted, call, choose
from jdiff.losses.denoising import normal
from jdiff.objective import objective
from jdiff.parallel.all_to_all import all_to_all
from jdiff.parallel.layout import CONVOLUTIONAL, Layout, within
from jdiff.parallel.mesh import AXES
from jdiff.parallel.ring import ring
from jdiff.parallel.shardings import of_state
from jdiff.predictions import Parameterization, parameterization
from jdiff.pytree import Array, PyTree, is_concrete
from jdiff.solvers.few_step import FlowMap
from jdiff.training import ema, optimizers
from jdiff.training.step import State

# Entry of cond -> the model's field that has its width.
_WIDTHS = {"text": "text_width", "pooled": "pooled_width"}

#: What draws samples: (guided denoiser, solver, times).
Sampler = tuple[Any, solvers.Solver, Array]
#: A teacher is a sampler but for its weights, which the training state holds.
Teacher = Callable[[PyTree], Sampler]


class Experiment(NamedTuple):
    """What a config stands for. Arrays are made by `init`; everything here is structure."""

    config: ml_collections.ConfigDict
    apply: Any
    build: Any
    schedule: PyTree
    parameterization: Parameterization
    objective: Callable[..., Array]  # the loss and the arguments that the config gives it
    coupling: Callable[..., tuple] | None
    teacher: Teacher | None
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    averages: dict[str, ema.Average]
    null: dict[str, float | bool]  # `nulls` has the arrays in it
    null_rate: Any  # as `conditioning.drop` takes it
    empty: Mapping[str, Any]  # what became of the empty text, if config.data.null asks for it
    told: tuple[str, ...]  # entries of cond that a batch of the data holds
    layout: Layout | None
    low_res: Any  # the `cascades.LowRes` of a super-resolution stage, else None

    def init(self, key: Array) -> PyTree:
        """Fresh parameters."""
        from jdiff import models

        with within(self.layout):
            return models.init(self.build, key)[1]

    def shapes(self) -> PyTree:
        """The shapes of the parameters; nothing is computed."""
        from jdiff import models

        return models.abstract(self.build)[1]

    def placed(self, state: PyTree) -> PyTree:
        """Where the leaves of `state` (the weights, or a training state) live on the mesh."""
        from jdiff import models

        return of_state(state, models.axes(self.build), self.layout)

    def on(self, layout: Layout) -> "Experiment":
        """The same on other devices, however many the batch of training was made for."""
        return self._replace(apply=_laid_out(self.apply, self.config, layout), layout=layout)

    def denoiser(self, params: PyTree) -> Network:
        """The denoiser with these weights."""
        return network(self.apply, params, self.schedule, self.parameterization)

    def nulls(self, params: PyTree) -> dict[str, Any]:
        """What stands for no condition, for guidance and dropping: {"label": 10, "text": `[S, D]`}.

        Raises:
          UserError: the empty text's states are wanted, and are not to be found.
        """
        if self.config.data.null == "learned":
            return self.null | params.get(LEARNED, {})
        if self.config.data.null != "empty":
            return self.null
        for name in self.config.data.conditions:
            if name not in self.empty:
                raise UserError(
                    f"config.data.null='empty': {self.config.data.name} does not hold {name!r} of "
                    "the empty text; `jdiff encode --text` writes it. Or give 'zero' or 'learned'."
                )
        return self.null | {name: self.empty[name] for name in self.config.data.conditions}

    def cond(self, batch: dict[str, Array]) -> dict[str, Array]:
        """What the network is told of a batch of the data; floats of any precision as float32."""
        return floats({name: batch[name] for name in self.told})

    def loss(
        self, params: PyTree, key: Array, batch: dict[str, Array], state: State | None = None
    ) -> Array:
        """The training loss `[B]` of a batch {"image": uint8 `[B, H, W, C]`, "label": `[B]`}
        and what config.data.conditions names; of latents, {"latent", "latent_std"} (see `latents`).

        Of the arguments of the loss that config.loss.name names, those called as an entry of
        `given` below are given by training. `state` is the training's, for losses that make their
        own targets; `denoising` and `flow_matching` do without.
        """
        key_loss, key_drop, key_dropout = jax.random.split(key, 3)
        if encoded.MEAN in batch:
            x0 = latents.draw(jax.random.fold_in(key, 3), batch)
        else:
            x0 = to_float(batch["image"])
        cond, null = self.cond(batch), self.nulls(params)
        if null and self.null_rate:
            cond = drop(key_drop, cond, null, self.null_rate)
        if self.low_res is not None:
            x0, small = self.low_res.training(jax.random.fold_in(key, 2), x0)
            cond |= small
        given = {"dropout_key": key_dropout, "null": null}
        if self.coupling is not None:
            key_eps, key_pair = jax.random.split(jax.random.fold_in(key, 1))
            x0, given["eps"], cond = self.coupling(key_pair, x0, normal(key_eps, x0), cond)
        if state is not None:
            name = self.config.loss.target
            target = params if name == "params" else state.averages[name]
            given |= {
                "step": state.step,
                "total": self.config.train.steps,
                "target": self.denoiser(jax.lax.stop_gradient(target)),
            }
        if self.teacher is not None:
            given["sampler"] = self.teacher(state.frozen)
            given["teacher"] = given["sampler"][0]
        wanted = accepted(self.objective)
        given = {name: value for name, value in given.items() if name in wanted}
        return self.objective(key_loss, self.denoiser(params), x0, cond, **given)


def build(
    config: ml_collections.ConfigDict, info: Any, teacher: Teacher | None = None,
    layout: Layout | None = None,
) -> Experiment:  # fmt: skip
    """The experiment of a config on the data that `info` (`data.Info`) describes.

    Args:
      teacher: what config.loss.teacher names, from `runs.teacher`; only training needs it.
      layout: of the devices it is to run on, from `layout`; None for one.

    Raises:
      UserError: an unknown name or argument, a network that does not fit the data, or sizes that do
        not divide, naming the field.
    """
    from jdiff import models

    schedule = call("config.schedule", schedules.BY_NAME, config.schedule)
    told = conditions.named(config.data.conditions, info)
    null = {"label": info.num_classes} if _classes(config, info) else {}
    null |= conditions.null(told, config.data.null)
    latents.check(config, info)
    low_res = super_resolution.low_res(config, info)
    construct = _model(config, info, low_res)
    try:
        apply, _ = models.abstract(construct)
    except ValueError as error:
        raise UserError(f"config.model does not fit the data {info.name}: {error}") from error
    parts = layout.batch_parts if layout else 1
    divides("config.train.batch_size", config.train.batch_size, parts, "mesh.data x mesh.fsdp")
    per_step = config.train.accumulate * parts
    divides("config.train.batch_size", config.train.batch_size, per_step, "x train.accumulate")
    optimizer, learning_rate = optimizers.build(config.optimizer, config.train.steps)
    if constrained := getattr(models.BY_NAME[config.model.name], "constrained", None):
        optimizer = constrained(optimizer)  # EDM2: every step ends with weights of unit length
    return Experiment(
        config=config,
        apply=_laid_out(apply, config, layout),
        build=construct,
        schedule=schedule,
        parameterization=parameterization(**config.parameterization),
        objective=objective(config),
        coupling=call(
            "config.loss.coupling",
            couplings.BY_NAME | {"independent": lambda: None},
            config.loss.coupling,
        ),
        teacher=teacher,
        optimizer=optimizer,
        learning_rate=learning_rate,
        averages=ema.build(config.ema, config.train.batch_size),
        null=null,
        null_rate=conditions.groups(config.loss.null_rate, tuple(null)),
        empty=conditions.empty(config.data) if config.data.null == "empty" and told else {},
        told=tuple(dict.fromkeys((*null, *config.data.conditions))),
        layout=layout,
        low_res=low_res,
    )


def layout(config: ml_collections.ConfigDict, mesh: Any = None) -> Layout:
    """The layout of `config.mesh` on all devices.

    Args:
      mesh: another one, such as a `jax.sharding.AbstractMesh` of devices that are not here.

    Raises:
      UserError: sizes that do not make the number of devices, or an axis over which the model's
        family cannot be split.
    """
    from jdiff import models

    name = choose("config.model.name", config.model.get("name"), models.BY_NAME)
    rules = getattr(models.BY_NAME[name], "rules", CONVOLUTIONAL)
    return split_over(rules, config, mesh, f"a network of the kind {name!r} is")


def split_over(
    rules: Mapping[str, tuple[str, ...]], config: ml_collections.ConfigDict, mesh: Any, what: str
) -> Layout:
    """The layout of `config.mesh`, or of another mesh, by a family's rules.

    Args:
      what: is split, and the verb, for an error: "an autoencoder is".

    Raises:
      UserError: as `layout`.
    """
    c = config.mesh
    reached = {axis for axes in rules.values() for axis in axes}
    sizes = c if mesh is None else mesh.shape
    for axis in AXES:
        if sizes[axis] != 1 and axis not in reached:
            raise UserError(
                f"mesh.{axis}={sizes[axis]}: {what} not split over {axis!r}; give 1, and use data "
                "and fsdp."
            )
    mesh = parallel.make({axis: c[axis] for axis in AXES}) if mesh is None else mesh
    return parallel.layout.layout(mesh, rules, c.rules)


def _laid_out(apply: Any, config: ml_collections.ConfigDict, layout: Layout | None) -> Any:
    """The network on the layout, with attention that goes over split tokens."""
    from jdiff.models.attention import by_head

    apply = apply.with_layout(layout)
    if layout is None or layout.mesh.shape["sequence"] == 1:
        return apply
    kernels = {"ring": ring, "all_to_all": all_to_all}
    name = choose("config.mesh.attention", config.mesh.attention, kernels)
    kernel = kernels[name](layout)
    if config.loss.name == "meanflow":  # takes forward-mode derivatives
        if name == "ring":
            raise UserError(
                "config.mesh.attention='ring' has no forward-mode derivatives, which the loss "
                "'meanflow' takes; give 'all_to_all'."
            )
        kernel = all_to_all(layout, by_head)
    return apply.with_attention(kernel, "attention")  # not that to a whole text


def check(exp: Experiment, info: Any) -> None:
    """Traces the network on one batch of the data, computing nothing, so that errors come early.

    Raises:
      UserError: the network does not take such images, or its output has another shape.
    """
    from jdiff import models

    x = jax.ShapeDtypeStruct((2, *info.shape), "float32")
    t = jax.ShapeDtypeStruct((2,), "float32")
    cond = {"label": jax.ShapeDtypeStruct((2,), "int32")} if "label" in exp.null else {}
    for field in conditions.named(exp.config.data.conditions, info):
        dtype = "bool" if field.dtype == "bool" else "float32"
        cond[field.name] = jax.ShapeDtypeStruct((2, *field.shape), dtype)
    cond |= {name.removeprefix("t-"): t for name in exp.config.model.get("scalars", ())}
    if exp.low_res is not None:
        key = jax.eval_shape(lambda: jax.random.key(0))
        cond |= jax.eval_shape(exp.low_res.training, key, x)[1]
    try:
        traced, out = jax.make_jaxpr(exp.apply, return_shape=True)(
            models.abstract(exp.build)[1], x, t, cond
        )
    except ValueError as error:
        raise UserError(f"config.model does not fit the data {info.name}: {error}") from error
    used = {id(v) for step in traced.jaxpr.eqns for v in step.invars}
    for name, v in zip(sorted(cond), traced.jaxpr.invars[-len(cond) :]):
        if name in exp.config.data.conditions and id(v) not in used:
            raise UserError(
                f"config.data.conditions: the network {exp.config.model.name!r} of config.model "
                f"takes no {name!r}."
            )
    twice = exp.parameterization.variance != "fixed"
    wanted = (*info.shape[:-1], info.shape[-1] * (1 + twice))
    if out.shape[1:] != wanted:
        raise UserError(
            f"config.model: the output for {info.name} is {out.shape[1:]}, not {wanted}."
        )


def prepared(info: Any, config: Any) -> Any:
    """`info` as the pipeline hands the images on: `config.data.size` is their height and width.

    Raises:
      UserError: images of different sizes and no size to resize them to; latents of others than
        the config asks for.
    """
    if info.latent:
        encoded.check(info.encoded, info.name, config.crop, config.size, config.flip)
        return info
    if config.size is not None:
        return dataclasses.replace(info, shape=(config.size, config.size, info.shape[-1]))
    if None in info.shape:
        raise UserError(
            f"config.data.size: the images of {info.name} differ in size ({info.shape}); give the "
            "size to crop or resize them to, e.g. 64."
        )
    return info


def sampler(config: ml_collections.ConfigDict, denoiser: Any, null: dict[str, float]) -> Sampler:
    """(guided denoiser, solver, times) of `config.sampling`.

    Raises:
      UserError: an unknown solver, grid or argument, a solver that does not serve the schedule or
        the network, or guidance of a model without labels.
    """
    c = config.sampling
    schedule = denoiser.schedule
    solver = call("config.sampling.solver", solvers.BY_NAME, c.solver)
    grid = dict(c.grid)
    steps = grid.pop("steps")
    name = choose("config.sampling.grid", grid.pop("name"), grids.BY_NAME)
    for argument in grid:
        choose(f"config.sampling.grid {name}: argument", argument, accepted(grids.BY_NAME[name]))
    times = grids.BY_NAME[name](schedule, steps, **grid)
    if is_concrete((schedule, times)):  # not where a training step draws from its teacher
        solver.check(schedule, times)
    listens = {"s", "t-s"} & set(config.model.get("scalars", ()))
    if bool(listens) != isinstance(solver, FlowMap):
        raise UserError(
            f"config.sampling.solver={c.solver.name!r}: a flow map (config.model.scalars with s) "
            "is sampled by 'flow_map', and no other network is."
        )

    if c.guidance.scale != 1.0:
        if not null:
            raise UserError(
                f"config.sampling.guidance.scale={c.guidance.scale}: the model was trained without "
                "labels or further conditions, so there is nothing to guide; give 1."
            )
        denoiser = guidance.cfg(
            denoiser, c.guidance.scale, null, interval=c.guidance.interval and
            tuple(c.guidance.interval), rescale=c.guidance.rescale,
        )  # fmt: skip
    if c.threshold is not None:
        known = {"static": guidance.static_threshold, "dynamic": guidance.dynamic_threshold}
        given = {"name": c.threshold} if isinstance(c.threshold, str) else c.threshold
        limit = 2.0 if config.low_res.residual else 1.0  # one image less another reaches 2
        made = {name: partial(fn, denoiser, limit=limit) for name, fn in known.items()}
        denoiser = call("config.sampling.threshold", made, given)
    return denoiser, solver, times


def to_float(images: Array) -> Array:
    """uint8 `[0, 255]` as float32 in [-1, 1]: x / 127.5 - 1. Inverse of `evaluation.to_uint8`."""
    return images.astype("float32") / 127.5 - 1.0


def _model(config: ml_collections.ConfigDict, info: Any, low_res: Any) -> Any:
    """rngs -> module, with what the data and the low-resolution input fix filled in."""
    from jdiff import models
    from jdiff.models.null import with_null

    arguments = dict(config.model)
    cls = models.BY_NAME[choose("config.model.name", arguments.pop("name", None), models.BY_NAME)]
    known = [name for name in accepted(cls) if name != "rngs"]
    for name in arguments:
        choose(f"config.model ({cls.__name__}) field", name, known)
    fixed = {
        "in_channels": info.shape[-1],
        "num_classes": _classes(config, info),
        "image_size": info.shape[0],
    }
    told = conditions.named(config.data.conditions, info)
    for field in told:
        if field.name in _WIDTHS and field.shape:
            fixed[_WIDTHS[field.name]] = field.shape[-1]
    for name, value in fixed.items():
        if name in known and arguments.setdefault(name, value) != value:
            raise UserError(
                f"config.model.{name}={arguments[name]} does not fit {info.name}: it has {value}."
            )
    arguments = super_resolution.filled(arguments, config.model.name, known, info, low_res)
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    build = lambda rngs: cls(**arguments, rngs=rngs)
    if config.data.null != "learned":
        return build
    learned = {f.name: f.shape for f in told if f.dtype != "bool"}
    return with_null(build, learned) if learned else build


def _classes(config: ml_collections.ConfigDict, info: Any) -> int:
    """How many classes the model is told of: the data's, or 0 if config.model.num_classes is 0.

    Of a network that takes no classes, 0.
    """
    from jdiff import models

    network = models.BY_NAME.get(config.model.get("name"))
    if network is not None and "num_classes" not in accepted(network):
        return 0
    return 0 if config.model.get("num_classes", None) == 0 else (info.num_classes or 0)


def divides(field: str, given: int, by: int, what: str) -> None:
    """Refuses a number that is no multiple of `by`, which is `what`; names the nearest that is."""
    if given < 1 or given % by:
        near = max(by, round(given / by) * by)
        raise UserError(f"{field}={given} is not a multiple of {by} ({what}); try {near}.")
