"""How training ends: what is noted of it, and what a failing disk is called."""

import contextlib
import pathlib
import time
from collections.abc import Iterator

from jdiff import runs
from jdiff.errors import told
from jdiff.training.checkpoints import Checkpoints
from jdiff.training.stop import Stopped


@contextlib.contextmanager
def noted(
    workdir: pathlib.Path, saved: Checkpoints, before: float, started: float, *, write: bool
) -> Iterator[None]:
    """Notes in run.json how training ended (`state`, `reason`) and how long it has taken so far.

    Args:
      before: seconds of earlier sessions of the run.
      started: `time.time()` of this one.
      write: False for a process that is not to write.

    Raises:
      NotSaved: instead of the operating system's error; within, only `workdir` is written to, and
        what fails to be read has errors of its own.
    """
    outcome = {"state": "finished", "reason": None}
    try:
        yield
    except Stopped as stop:
        outcome = {"state": "stopped", "reason": str(stop)}
        raise
    except OSError as error:
        failed = saved.not_saved(error, workdir)
        outcome = {"state": "failed", "reason": told(failed)[0]}
        raise failed from error
    except BaseException as error:
        outcome = {"state": "failed", "reason": told(error)[0]}
        raise
    finally:
        seconds = round(before + time.time() - started, 2)
        if write:
            with contextlib.suppress(OSError):  # of a full disk: the error itself is told
                runs.describe(workdir, **outcome, wall_seconds=seconds)
