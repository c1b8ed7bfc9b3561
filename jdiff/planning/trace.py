"""A training step as a program, laid out on devices that are not here."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jdiff import kinds
from jdiff.parallel import mesh as meshes
from jdiff.parallel.layout import Layout
from jdiff.planning import spread
from jdiff.planning.program import Program, flatten
from jdiff.pytree import PyTree
from jdiff.training import step as steps


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A step on a mesh.

    Attributes:
      state, batch: shapes of the step's arguments.
      placed: the sharding of each leaf of the state.
      mesh: size of each axis.
      program: of all devices; every value knows how it is split.
      messages: what the devices say to each other.
      jaxpr: of the step.
    """

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
      UserError: as `build` and `layout` of the config's kind, see `jdiff.kinds`.
    """
    exp, frozen = build(config, info, mesh(config, count))
    state, batch = arguments(exp, info, frozen)
    return of_step(step(exp), state, batch, exp.placed(state), exp.layout)


def of_step(
    step: steps.Step, state: steps.State, batch: PyTree, placed: PyTree, layout: Layout
) -> Traced:
    """Traces any step, of a loop of one's own too.

    Args:
      step: (state, batch) -> (state, metrics), the state to be donated.
      state, batch: arrays or `jax.ShapeDtypeStruct`s.
      placed: the sharding of each leaf of the state, from `parallel.of_state`.
      layout: of the mesh, which may be a `jax.sharding.AbstractMesh`.
    """
    jaxpr = jax.make_jaxpr(step)(state, batch)
    shape = dict(layout.mesh.shape)
    shardings = [*jax.tree.leaves(placed), *(layout.batch for _ in jax.tree.leaves(batch))]
    specs = [
        spread.spec_of(where if v.aval.ndim else layout.whole, v.aval.ndim)
        for where, v in zip(shardings, jaxpr.jaxpr.invars, strict=True)
    ]
    program = flatten(jaxpr)
    messages = spread.spread(program, specs, shape)
    return Traced(state, batch, placed, shape, program, messages, jaxpr.jaxpr)


def mesh(config: Any, count: int) -> jax.sharding.AbstractMesh:
    """The mesh of `config.mesh` on `count` devices, without them."""
    return abstract({axis: config.mesh[axis] for axis in meshes.AXES}, count)


def abstract(sizes: dict[str, int], count: int) -> jax.sharding.AbstractMesh:
    """As `parallel.make`, of devices that need not exist."""
    shape = meshes.fit(sizes, count)
    kinds = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=kinds)


def build(config: Any, info: Any, mesh: Any) -> tuple[Any, PyTree]:
    """The experiment on a mesh, abstract or not, and its teacher's weights."""
    kind = kinds.of(config)
    frozen, teacher = kind.frozen(config, info)
    exp = kind.build(config, info, teacher, kind.layout(config, mesh))
    kind.check(exp, info)
    return exp, frozen


def arguments(exp: Any, info: Any, frozen: PyTree = None) -> tuple[steps.State, PyTree]:
    """Shapes of the state and of a batch."""
    state = abstract_state(exp.shapes(), exp.optimizer, exp.averages, frozen)
    rows = exp.config.train.batch_size
    batch = {"image": jax.ShapeDtypeStruct((rows, *info.shape), jnp.uint8)}
    if info.latent:
        latent = jax.ShapeDtypeStruct((rows, *info.shape), jnp.float32)
        batch = dict.fromkeys(info.encoded.latents(mirrored=False), latent)
    if info.num_classes:
        batch["label"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
    for field in info.fields:
        batch[field.name] = jax.ShapeDtypeStruct((rows, *field.shape), field.dtype)
    return state, batch


def abstract_state(
    params: PyTree, optimizer: Any, averages: Any, frozen: PyTree = None
) -> steps.State:
    """Shapes of `training.step.start`."""
    start = lambda params, key, frozen: steps.start(params, key, optimizer, averages, frozen)
    return jax.eval_shape(start, params, jax.random.key(0), frozen)


def step(exp: Any) -> steps.Step:
    """The step that `jdiff train` compiles."""
    return steps.make_step(exp.loss, exp.optimizer, exp.averages, exp.config.train.accumulate)
