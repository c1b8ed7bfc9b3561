"""Checkpoints: Orbax, asynchronous and atomic; what is read is checked against what is asked."""

import contextlib
import dataclasses
import json
import logging
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from jdiff.errors import UserError
from jdiff.pytree import PyTree


class Restored(NamedTuple):
    """A checkpoint's contents."""

    step: int
    state: PyTree
    data: dict[str, Any]  # the data iterator's state


class Checkpoints:
    """The checkpoints of one run directory: a handle on Orbax's manager, opened by `opened`."""

    def __init__(self, manager: Any, folder: pathlib.Path):
        self._manager, self._folder = manager, folder

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: PyTree, data: dict[str, Any], step: int) -> None:
        """Starts saving in the background; returns once the state may be donated."""
        import orbax.checkpoint as ocp

        if step in self.steps:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_given(state)), data=ocp.args.JsonSave(data)
            ),
            force=True,
        )

    def wait(self) -> None:
        """Until everything is on disk."""
        self._manager.wait_until_finished()

    def restore(self, like: PyTree, step: int | None = None) -> Restored:
        """Reads a checkpoint into the structure, dtypes and shardings of `like`.

        Args:
          like: arrays or `jax.ShapeDtypeStruct`s.
          step: the newest unless given.

        Raises:
          UserError: there is none, it is damaged, or it holds other shapes than `like`.
        """
        import orbax.checkpoint as ocp

        step = self._find(step)
        target = jax.tree.map(_abstract, _given(like))
        try:
            with _quiet():
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore()
                    ),
                )
        except Exception as error:  # Orbax raises many kinds for a truncated or foreign checkpoint
            raise UserError(self._damaged(step, error)) from error
        state = restored.state
        if dataclasses.is_dataclass(like):
            state = dataclasses.replace(like, **state)
        return Restored(step, state, restored.data)

    def restore_average(self, like: PyTree, name: str, step: int | None = None) -> Restored:
        """Reads the weights alone: an average by name, or "params".

        Raises:
          UserError: as `restore`, and for an average that the checkpoint does not hold.
        """
        import orbax.checkpoint as ocp

        step = self._find(step)
        target = jax.tree.map(_abstract, like)
        wanted = {"params": target} if name == "params" else {"averages": {name: target}}
        arguments = jax.tree.map(lambda a: ocp.ArrayRestoreArgs(sharding=a.sharding), wanted)
        try:
            with _quiet():
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.PyTreeRestore(
                            item=wanted, restore_args=arguments, partial_restore=True
                        )
                    ),
                )
        except Exception as error:
            raise UserError(self._damaged(step, error)) from error
        found = restored.state
        return Restored(step, found["params"] if name == "params" else found["averages"][name], {})

    def _find(self, step: int | None) -> int:
        steps = self.steps
        if not steps:
            raise UserError(
                f"no complete checkpoint in {self._folder}: train first, or name another workdir."
            )
        if step is None:
            return steps[-1]
        if step not in steps:
            near = min(steps, key=lambda s: abs(s - step))
            raise UserError(f"no checkpoint of step {step} in {self._folder}; nearest is {near}.")
        return step

    def _damaged(self, step: int, error: Exception) -> str:
        reason = " ".join(str(error).split())[:200]
        older = [s for s in self.steps if s < step]
        advice = f"the one before is step {older[-1]}" if older else "there is no older one"
        return (
            f"checkpoint {self._folder / str(step)} cannot be read: it is damaged or belongs to "
            f"another model ({type(error).__name__}: {reason}). Move it away; {advice}."
        )


@contextlib.contextmanager
def opened(workdir: pathlib.Path, keep: int = 2, *, write: bool = True) -> Iterator[Checkpoints]:
    """The checkpoints below `workdir`; on leaving, waits for what is being saved."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every step it takes
    folder = pathlib.Path(workdir).absolute() / "checkpoints"
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=write, create=write, read_only=not write
    )
    manager = ocp.CheckpointManager(folder, options=options)
    try:
        yield Checkpoints(manager, folder)
    finally:
        manager.close()


def _given(state: PyTree) -> PyTree:
    """The fields of a struct that are not None, by name.

    Orbax would write down the others too, and then refuse what was saved before they existed.
    """
    if not dataclasses.is_dataclass(state):
        return state
    values = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: value for name, value in values.items() if value is not None}


def _abstract(a: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(a, "sharding", None)
    if sharding is None:  # else Orbax would look for the devices that saved it
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the event loop's own traceback: the error is raised anyway, with its reason."""
    logger = logging.getLogger("asyncio")
    level, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = level


def as_json(data: Any) -> dict[str, Any]:
    """A data iterator's state as plain JSON types.

    Raises:
      TypeError: it holds something that JSON cannot.
    """
    return json.loads(json.dumps(data))
