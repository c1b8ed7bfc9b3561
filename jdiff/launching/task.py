"""What is launched, whatever the platform: a training, where it runs, and when it runs again."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Mapping

from jdiff import exits
from jdiff.errors import UserError

#: Codes after which the same command would only end the same way, or a person wanted the end.
ENDS = frozenset({exits.OK, exits.USER, exits.DIVERGED, exits.INTERRUPTED})

# File systems that other machines see too, by the names that /proc/mounts gives them.
_SHARED = re.compile(r"nfs|lustre|gpfs|beegfs|ceph|gluster|weka|fuse\.|9p|afs|cifs|pvfs|panfs|daos")


@dataclasses.dataclass(frozen=True)
class Task:
    """One run of `jdiff train`, to be started on every host.

    Attributes:
      name: of the job, as the scheduler and WORKDIR/launch show it.
      workdir: as the hosts see it.
      config: the whole of it, as config.json has it: what is edited later changes nothing.
      words: further words of `jdiff train`.
      cwd: where it starts, so that relative paths mean what they do here.
      python: the interpreter.
      setup: lines of shell before it: modules, environments, mounts.
      retries: times in a row that it starts again after a code which is not `exits.REQUEUE`.
    """

    name: str
    workdir: str
    config: str
    words: tuple[str, ...] = ()
    cwd: str = dataclasses.field(default_factory=os.getcwd)
    python: str = sys.executable
    setup: tuple[str, ...] = ()
    retries: int = 3

    def command(self, config: str | pathlib.Path) -> tuple[str, ...]:
        """The program and its words, with the config in the file `config`."""
        where = (f"--config={config}", f"--workdir={self.workdir}")
        return (self.python, "-m", "jdiff.cli", "train", *where, *self.words)

    def here_document(self, path: str) -> str:
        """Lines of shell that write the config to `path`, which may have shell variables in it."""
        text = json.dumps(json.loads(self.config))
        return f"cat >{path} <<'JDIFF_CONFIG'\n{text}\nJDIFF_CONFIG"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Exactly what will be done: files, then commands. `--dry_run` prints it.

    Attributes:
      folder: where the files are written.
      files: {path: text}.
      commands: run here, in this order.
      warnings: what may go wrong, for a person.
    """

    folder: pathlib.Path
    files: Mapping[pathlib.Path, str]
    commands: tuple[tuple[str, ...], ...]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"# {path}\n{text.rstrip()}\n" for path, text in self.files.items()]
        parts += [shlex.join(command) for command in self.commands]
        return "\n".join(parts)

    def write(self) -> None:
        """Writes the files.

        Raises:
          UserError: one cannot be written.
        """
        for path, text in self.files.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def named(name: str | None, workdir: str) -> str:
    """The name of a job: as given, or the last part of the work directory made into one.

    Raises:
      UserError: one that a scheduler would not take.
    """
    if name is None:
        last = re.sub(r"[^a-z0-9]+", "-", workdir.rstrip("/").rpartition("/")[2].lower()).strip("-")
        name = re.sub(r"^[0-9]", r"run-\g<0>", last)[:40].rstrip("-") or "jdiff"
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise UserError(
            f"--name={name}: a letter, then small letters, digits and dashes, 40 at most."
        )
    return name


def peers(coordinator: str, processes: int, index: int | str) -> dict[str, str]:
    """The environment by which processes find each other where no scheduler tells them.

    Args:
      coordinator: HOST:PORT on which process 0 listens.
    """
    return {
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
    }


def again(code: int, failures: int, retries: int) -> bool:
    """Whether a command that ended with `code` is started once more.

    Args:
      failures: how often in a row it has now ended by a code that is not `exits.REQUEUE`.
    """
    return code == exits.REQUEUE or (code not in ENDS and failures <= retries)


def shell_again(task: Task, counter: str) -> str:
    """`again` as a function of bash, which keeps the number of failures in the file `counter`."""
    ends = " | ".join(str(code) for code in sorted(ENDS))
    return f"""\
# Whether to start once more after exit code $1: {exits.REQUEUE} means "saved, start me again";
# {ends} would end the same way; after any other, {task.retries} times in a row.
failures={shlex.quote(counter)}
again() {{
  case $1 in
    {exits.REQUEUE}) rm -f "$failures"; return 0 ;;
    {ends}) rm -f "$failures"; return 1 ;;
  esac
  local n=$(($(cat "$failures" 2>/dev/null || echo 0) + 1))
  echo "$n" >"$failures"
  [ "$n" -le {task.retries} ]
}}"""


def visible(workdir: str, hosts: int, mounts: str | None = None) -> tuple[str, ...]:
    """Warnings about a path that several hosts must share.

    Args:
      mounts: the text of /proc/mounts; this machine's unless given.
    """
    if hosts < 2:
        return ()
    path = pathlib.Path(workdir).absolute()
    if mounts is None:
        try:
            mounts = pathlib.Path("/proc/mounts").read_text()
        except OSError:
            return ()
    best, kind = pathlib.Path("/"), ""
    for entry in mounts.splitlines():
        _, point, found, *_ = entry.split()
        point = pathlib.Path(point.replace("\\040", " "))
        if path.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, found
    if _SHARED.search(kind):
        return ()
    return (
        f"--workdir={workdir} lies on {kind or 'a file system'} (mounted at {best}), which other "
        f"machines may not see; {hosts} hosts must all reach it, at the same path.",
    )
