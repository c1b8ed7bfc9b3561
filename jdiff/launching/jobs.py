"""What was launched for a work directory: one file of jobs, and where each of them stands.

WORKDIR/launch/jobs.json lists the jobs, newest last; WORKDIR/launch/NAME-NUMBER/ keeps the script
or manifest that was submitted, the config, and logs where they are files. The jobs of a work
directory that this machine does not have (a bucket, a volume of pods) are in
~/.local/state/jdiff/launch/ instead.
"""

import dataclasses
import json
import os
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from jdiff.errors import UserError

#: States of jobs that have not come to their end.
GOES_ON = ("waiting", "running")


class Standing(NamedTuple):
    """Where a job stands.

    Attributes:
      state: waiting, running, finished, failed, cancelled, stopped or unknown.
      detail: what the platform itself says.
    """

    state: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Job:
    """One job that was submitted.

    Attributes:
      platform: slurm, gke, tpu-vm or local.
      name: as the platform shows it.
      id: as the platform knows it.
      workdir: as it was given.
      folder: where its script or manifest lies.
      log: a path, or how to read it.
      submitted: seconds since 1970.
      details: what the platform needs to find it again: namespace, zone, project.
    """

    platform: str
    name: str
    id: str
    workdir: str
    folder: str
    log: str
    submitted: float
    details: dict[str, Any]

    @classmethod
    def new(
        cls, platform: str, name: str, id: str, workdir: str, folder: pathlib.Path, *, log: str,
        **details: Any,
    ) -> "Job":  # fmt: skip
        """A job submitted now."""
        return cls(platform, name, id, workdir, str(folder), log, time.time(), details)


def home(workdir: str, *, here: bool) -> pathlib.Path:
    """The folder of a work directory's jobs.

    Args:
      here: the work directory is a folder of this machine.
    """
    if here:
        return pathlib.Path(workdir).absolute() / "launch"
    state = os.environ.get("XDG_STATE_HOME") or pathlib.Path.home() / ".local/state"
    return pathlib.Path(state) / "jdiff/launch" / re.sub(r"[^A-Za-z0-9.]+", "_", workdir).strip("_")


def find(workdir: str) -> list[Job]:
    """The jobs of a work directory, oldest first.

    Raises:
      UserError: nothing was launched for it, or jobs.json cannot be read.
    """
    for here in (True, False):
        if (path := home(workdir, here=here) / "jobs.json").is_file():
            return read(path.parent)
    raise UserError(
        f"nothing was launched for {workdir} (no launch/jobs.json); `jdiff launch` does."
    )


def read(folder: pathlib.Path) -> list[Job]:
    """The jobs of a folder of jobs; none if there is no file.

    Raises:
      UserError: jobs.json cannot be read.
    """
    path = folder / "jobs.json"
    try:
        return [Job(**entry) for entry in json.loads(path.read_text())] if path.exists() else []
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def add(folder: pathlib.Path, job: Job) -> None:
    """Appends a job to jobs.json, which is replaced as a whole."""
    entries = [dataclasses.asdict(known) for known in [*read(folder), job]]
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "jobs.json.part"
    part.write_text(json.dumps(entries, indent=2) + "\n")
    part.replace(folder / "jobs.json")


def next_folder(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Where the next job of this name keeps its script: NAME-1, NAME-2, ..."""
    number = 1
    while (folder / f"{name}-{number}").exists():
        number += 1
    return folder / f"{name}-{number}"


def tail_of(path: pathlib.Path, lines: int) -> str:
    """The last lines of a file; of one redrawn with carriage returns, what would be seen."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 400 * lines - 4096))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    seen = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join([line for line in seen if line.strip()][-lines:])


def refuse_second(folder: pathlib.Path, module_of: Callable[[str], Any]) -> None:
    """Raises a UserError if a job of this folder still waits or runs: two would fight over files.

    Args:
      module_of: the module of a platform, for its `standing`.
    """
    for job in read(folder):
        stand = module_of(job.platform).standing(job)
        if stand.state in GOES_ON:
            raise UserError(
                f"{job.platform} job {job.id} of {job.workdir} is {stand.state} ({stand.detail}); "
                f"`jdiff jobs --workdir={job.workdir} --cancel` ends it."
            )
