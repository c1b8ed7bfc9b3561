"""The training step of a config as a program, laid out on devices that are not here."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jdiff import experiment
from jdiff.parallel import mesh as meshes
from jdiff.planning import spread
from jdiff.planning.program import Program, flatten
from jdiff.pytree import PyTree
from jdiff.training import step as steps


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A step on a mesh of `count` devices.

    Attributes:
      state, batch: shapes of the step's arguments.
      placed: the sharding of each leaf of the state.
      mesh: size of each axis.
      program: of all devices; every value knows how it is split.
      messages: what the devices say to each other.
      jaxpr: of the step.
    """

    exp: experiment.Experiment
    state: steps.State
    batch: PyTree
    placed: PyTree
    mesh: dict[str, int]
    program: Program
    messages: list[spread.Message]
    jaxpr: Any

    def size(self, program: Program, v: int) -> int:
        """Bytes of a value on one device."""
        return spread.size(program, v, self.mesh)


def trace(config: Any, info: Any, count: int) -> Traced:
    """Traces the step of `config` for `count` devices; computes nothing.

    Raises:
      UserError: as `experiment.build` and `experiment.layout`.
    """
    exp, frozen = build(config, info, mesh(config, count))
    state, batch = arguments(exp, info, frozen)
    jaxpr = jax.make_jaxpr(step(exp))(state, batch)
    placed = exp.placed(state)
    shape = dict(exp.layout.mesh.shape)
    whole, rows = exp.layout.whole, exp.layout.batch
    shardings = [*jax.tree.leaves(placed), *(rows for _ in jax.tree.leaves(batch))]
    program = flatten(jaxpr)
    specs = [
        spread.spec_of(s if v.ndim else whole, v.ndim) for s, v in zip(shardings, jaxpr.in_avals)
    ]
    messages = spread.spread(program, specs, shape)
    return Traced(exp, state, batch, placed, shape, program, messages, jaxpr.jaxpr)


def mesh(config: Any, count: int) -> jax.sharding.AbstractMesh:
    """The mesh of `config.mesh` on `count` devices, without them."""
    shape = meshes.fit({axis: config.mesh[axis] for axis in meshes.AXES}, count)
    kinds = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=kinds)


def build(config: Any, info: Any, mesh: Any) -> tuple[experiment.Experiment, PyTree]:
    """The experiment on a mesh, abstract or not, and its teacher's weights."""
    frozen = teacher = None
    if config.loss.teacher is not None:
        from jdiff import runs

        frozen, teacher = runs.teacher(config.loss.teacher, info)
    exp = experiment.build(config, info, teacher, experiment.layout(config, mesh))
    experiment.check(exp, info)
    return exp, frozen


def arguments(
    exp: experiment.Experiment, info: Any, frozen: PyTree = None
) -> tuple[steps.State, PyTree]:
    """Shapes of the state and of a batch."""
    from jdiff import models

    _, params = models.abstract(exp.build)
    start = lambda params, key, frozen: steps.start(
        params, key, exp.optimizer, exp.averages, frozen
    )
    state = jax.eval_shape(start, params, jax.random.key(0), frozen)
    rows = exp.config.train.batch_size
    batch = {"image": jax.ShapeDtypeStruct((rows, *info.shape), jnp.uint8)}
    if info.num_classes:
        batch["label"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return state, batch


def step(exp: experiment.Experiment) -> steps.Step:
    """The step that `jdiff train` compiles."""
    return steps.make_step(exp.loss, exp.optimizer, exp.averages, exp.config.train.accumulate)
