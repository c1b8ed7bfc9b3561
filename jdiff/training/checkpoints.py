"""Checkpoints: Orbax, asynchronous and atomic; a damaged one is found, and the one before is used.

All processes of a run save and restore together. What is saved does not depend on how it was split
over devices or processes, the position in the data neither: a run resumes on any mesh.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jdiff import exits
from jdiff.errors import UserError
from jdiff.pytree import PyTree
from jdiff.training import allocator, integrity

# Orbax completes these after our checksums are written; nothing of the state is in them.
_AFTERWARDS = ("_CHECKPOINT_METADATA", "commit_success.txt")


class Restored(NamedTuple):
    """A checkpoint's contents."""

    step: int
    state: PyTree
    data: dict[str, Any]  # the data iterator's state


class Damaged(UserError):
    """A checkpoint whose files are not what was written, or that cannot be read."""

    code = exits.IO


class NotSaved(UserError):
    """A checkpoint could not be written: the disk is full, read-only or gone."""

    code = exits.IO


class Checkpoints:
    """The checkpoints of one run directory: a handle on Orbax's manager, opened by `opened`."""

    def __init__(
        self, manager: Any, folder: pathlib.Path, write: bool, tell: Callable[[str], None]
    ):
        self._manager, self._folder, self._write, self._tell = manager, folder, write, tell

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: PyTree, data: dict[str, Any], step: int) -> None:
        """Starts saving in the background; returns once the state may be donated.

        Raises:
          NotSaved: this or the save before could not be written.
        """
        import orbax.checkpoint as ocp

        if step in self.steps:
            return
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_given(state)), data=ocp.args.JsonSave(data)
        )
        with self._saving():
            self._manager.save(step, args=arguments, force=True)

    def wait(self) -> None:
        """Until everything is on disk.

        Raises:
          NotSaved: it could not be written.
        """
        with self._saving():
            self._manager.wait_until_finished()

    def restore(self, like: PyTree, step: int | None = None) -> Restored:
        """Reads a checkpoint into the structure, dtypes and shardings of `like`.

        The newest that is whole, unless a step is asked for: one whose files are damaged is passed
        over with a warning and, by who may write, moved to WORKDIR/damaged.

        Args:
          like: arrays or `jax.ShapeDtypeStruct`s.
          step: the newest unless given.

        Raises:
          UserError: there is none, or it holds other shapes than `like`.
          Damaged: the one asked for, or every one.
        """
        import orbax.checkpoint as ocp

        target = jax.tree.map(_abstract, _given(like))
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                item=target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            ),
            data=ocp.args.JsonRestore(),
        )
        step, restored = self._read(step, arguments)
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

        target = jax.tree.map(_abstract, like)
        wanted = {"params": target} if name == "params" else {"averages": {name: target}}
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            )
        )
        step, restored = self._read(step, arguments)
        found = restored.state
        return Restored(step, found["params"] if name == "params" else found["averages"][name], {})

    def _read(self, step: int | None, arguments: Any) -> tuple[int, Any]:
        """(step, contents) of the step, or of the newest that is whole."""
        newest = self._find(step)
        if step is not None:
            return step, self._read_one(step, arguments)
        damaged: dict[int, Damaged] = {}
        for candidate in (s for s in reversed(self.steps) if s <= newest):
            try:
                contents = self._read_one(candidate, arguments)
            except Damaged as error:
                damaged[candidate] = error
                continue
            for bad, error in damaged.items():
                self._pass_over(bad, error, candidate)
            return candidate, contents
        raise next(iter(damaged.values()))

    def _read_one(self, step: int, arguments: Any) -> Any:
        folder = self._folder / str(step)
        with concurrent.futures.ThreadPoolExecutor(1) as beside:
            part = jax.process_index(), jax.process_count()
            checking = beside.submit(integrity.damage, folder, *part)
            if jax.process_count() > 1:  # else one that fails would leave the others waiting
                self._check(step, checking.result())
            try:
                with _quiet(), allocator.reusing():
                    return self._manager.restore(step, args=arguments)
            except Exception as error:  # Orbax raises many kinds for a truncated or foreign one
                failed = error
            finally:
                self._check(step, wrong := checking.result())
        reason = f"({type(failed).__name__}: {' '.join(str(failed).split())[:200]})"
        if wrong is None:  # not known to be whole
            why = f"it is damaged or belongs to another model {reason}"
            raise Damaged(self._unreadable(step, why)) from failed
        raise UserError(
            f"checkpoint {folder} is whole but belongs to another model {reason}. Go on with the "
            "config that wrote it, or name another workdir."
        ) from failed

    def _check(self, step: int, wrong: list[str] | None) -> None:
        if found := _of_any_process(wrong[0] if wrong else ""):
            raise Damaged(self._unreadable(step, f"it is damaged: {found}"))

    def _pass_over(self, step: int, error: Damaged, used: int) -> None:
        """Warns of a damaged checkpoint and moves it away, so that the step can be saved anew."""
        folder = self._folder / str(step)
        where = ""
        if self._write:
            aside = _free(self._folder.parent / "damaged", str(step))
            if jax.process_index() == 0:
                aside.parent.mkdir(exist_ok=True)
                folder.rename(aside)
            any_process(False)  # all wait
            self._manager.reload()
            where = f" and was moved to {aside}"
        reason = str(error).partition(": ")[2].partition(". ")[0]
        self._tell(
            f"warning: checkpoint {folder} cannot be used{where}: {reason}. "
            f"Step {used}, the one before, is used instead."
        )

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

    def _unreadable(self, step: int, why: str) -> str:
        older = [s for s in self.steps if s < step]
        advice = f"the one before is step {older[-1]}" if older else "there is no older one"
        return (
            f"checkpoint {self._folder / str(step)} cannot be read: {why}. Move it away; {advice}."
        )

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # tensorstore's, Orbax's and the operating system's
            raise self.not_saved(error, self._folder) from error

    def not_saved(self, error: BaseException, where: pathlib.Path) -> NotSaved:
        """What to raise when writing to `where` failed."""
        return NotSaved(
            f"{where} could not be written: {_reason(error)}. {self._on_disk()} Make room, or "
            "repair the disk; the same command then resumes."
        )

    def _on_disk(self) -> str:
        """Read anew: a manager whose save failed may still count it."""
        with contextlib.suppress(OSError):
            there = [int(p.name) for p in self._folder.iterdir() if p.name.isdigit()]
            if there:
                return f"Step {max(there)} is saved."
        return "No step is saved."


@contextlib.contextmanager
def opened(
    workdir: pathlib.Path, keep: int = 2, *, write: bool = True,
    tell: Callable[[str], None] | None = None,
) -> Iterator[Checkpoints]:  # fmt: skip
    """The checkpoints below `workdir`; on leaving, waits for what is being saved.

    Args:
      keep: how many of the newest; older ones are deleted.
      write: False only reads, and leaves the folder as it is.
      tell: what gets warnings; by default they go to stderr.
    """
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every step it takes
    folder = pathlib.Path(workdir).absolute() / "checkpoints"
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=write, create=write, read_only=not write,
        cleanup_tmp_directories=write,  # of saves that were killed
        async_options=ocp.AsyncOptions(
            post_finalization_callback=functools.partial(_add_checksums, folder)
        ) if write else None,
    )  # fmt: skip
    manager = ocp.CheckpointManager(folder, options=options, handler_registry=_handlers())
    saved = Checkpoints(manager, folder, write, tell or _to_stderr)
    try:
        yield saved
    except BaseException:
        with contextlib.suppress(Exception):  # what went wrong first is what is to be told
            manager.close()
        raise
    with saved._saving():
        manager.close()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _handlers() -> Any:
    """Orbax's own, but weights are not compressed: they shrink by 7 % and take 10 times as long.

    They are in Zarr 3, which is read a little faster; what is in Zarr 2 is read all the same.
    """
    import orbax.checkpoint as ocp

    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    arrays = ocp.PyTreeCheckpointHandler(use_compression=False, use_zarr3=True)
    standard = ocp.StandardCheckpointHandler()
    for kind in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        registry.add("state", kind, arrays)
    for kind in (ocp.args.StandardSave, ocp.args.StandardRestore):
        registry.add("state", kind, standard)
    for kind in (ocp.args.JsonSave, ocp.args.JsonRestore):
        registry.add("data", kind, ocp.JsonCheckpointHandler())
    return registry


def _add_checksums(folder: pathlib.Path) -> None:
    """Called by Orbax when all is written, before the folder gets the name of a checkpoint."""
    for unfinished in folder.glob("*.orbax-checkpoint-tmp*"):
        integrity.write(unfinished, without=_AFTERWARDS)


def any_process(flag: bool) -> bool:
    """Whether `flag` holds in any process of the run; all must ask."""
    return bool(_of_any_process("yes" if flag else ""))


def _of_any_process(text: str) -> str:
    """The text of the first process whose own is not empty; all must ask."""
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    row = np.frombuffer(text.encode()[:256].ljust(256), np.uint8)
    rows = multihost_utils.process_allgather(row)
    texts = (bytes(row).decode(errors="replace").strip() for row in rows)
    return next(filter(None, texts), "")


def _free(folder: pathlib.Path, name: str) -> pathlib.Path:
    """A path in `folder` that is not taken: name, name.1, name.2, ..."""
    there = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    names = (name if i == 0 else f"{name}.{i}" for i in range(len(there) + 1))
    return folder / next(n for n in names if n not in there)


def _reason(error: BaseException) -> str:
    """The operating system's words if there are any in the chain, else the error's own."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for link in chain:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
    known = map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO))
    for words in known:  # tensorstore's errors are texts
        if any(words in str(link) for link in chain):
            return words
    return f"{type(chain[0]).__name__}: {' '.join(str(chain[0]).split())[:300]}"


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
