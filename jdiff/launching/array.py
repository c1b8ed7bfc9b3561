"""A sweep as one SLURM array, submitted through submitit (the optional extra `slurm`).

Each task trains one point in a process of its own. Before the time limit SLURM warns the task; it
then has the process save, and goes back into the queue.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jdiff import exits
from jdiff.errors import UserError
from jdiff.launching import attempts
from jdiff.launching.slurm import Options, seconds

# How often a point goes back into the queue at the time limit; each time it has come further.
_REQUEUES = 1000


@dataclasses.dataclass
class Task:
    """Trains one point, on a node; what submitit pickles and calls.

    Attributes:
      folder: of the sweep, as nodes see it.
      name: of the point.
      words: the command that trains it.
      retries: how often it is started again after a failure.
    """

    folder: pathlib.Path
    name: str
    words: tuple[str, ...]
    retries: int = 0

    def __call__(self) -> int:
        """Trains until the point is finished, failed for good, or asked to stop.

        Raises:
          RuntimeError: it failed; with its last error line.
        """
        job = _job()
        lead = os.environ.get("SLURM_PROCID", "0") == "0"
        told: list[int] = []
        signal.signal(signal.SIGTERM, lambda signum, frame: self._pass_on(told))
        for number in range(1, self.retries + 2):
            if told:
                break
            if lead:
                self._attempt = attempts.start(
                    self.folder, self.name, self.words, number=number, job=job
                )
            else:  # of the processes of one point, the first writes the note and the log
                self._attempt = _Peer(self.folder, self.name, self.words)
            _wait(self._attempt.process)
            code = self._attempt.poll()
            if code in (exits.OK, exits.USER, exits.DIVERGED, exits.INTERRUPTED, exits.REQUEUE):
                break
        if code == exits.REQUEUE or (told and code != exits.OK):
            sys.exit(exits.REQUEUE)  # SLURM asked for it, and knows whether the job runs again
        if code != exits.OK:
            note = attempts.read(self.folder, self.name)
            raise RuntimeError(attempts.last_words(self.folder, self.name, note))
        return code

    def _pass_on(self, told: list[int]) -> None:
        """The end of the job, or a preemption: the process may hear of it from SLURM itself too."""
        told.append(signal.SIGTERM)
        if attempt := self.__dict__.get("_attempt"):
            attempt.stop(signal.SIGTERM)

    def checkpoint(self) -> Any:
        """Called by submitit shortly before the time limit: saves, and asks to be queued again."""
        from submitit.helpers import DelayedSubmission

        attempt = self.__dict__.pop("_attempt", None)
        if attempt is not None:
            attempt.stop(signal.SIGTERM)
            _wait(attempt.process)
            attempt.poll()
            if isinstance(attempt, attempts.Attempt):
                queued = attempts.Note(started=time.time(), job=_job())
                attempts.write(self.folder, self.name, queued)
        return DelayedSubmission(Task(self.folder, self.name, self.words, self.retries))


class _Peer:
    """A further process of a point that runs as several."""

    def __init__(self, folder: pathlib.Path, name: str, words: Sequence[str]):
        log = attempts.log_of(folder, f"{name}.{os.environ['SLURM_PROCID']}")
        with log.open("a") as file:
            self.process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self, signum: int) -> None:
        self.process.send_signal(signum)


def submit(
    folder: pathlib.Path, tasks: Mapping[str, Sequence[str]], options: Options, *, title: str,
    parallel: int | None = None, retries: int = 0,
) -> list[str]:  # fmt: skip
    """Submits the tasks as one array; the job of each, such as 123_4.

    Args:
      tasks: {point: the words that train it}.
      title: of the array, as the queue shows it.
      parallel: how many run at a time.
      retries: see `Task`.

    Raises:
      UserError: submitit or SLURM is not there, or sbatch refuses.
    """
    submitit = _submitit()
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise UserError(f"--executor=slurm: there is no {program} here; use a login node.")
    executor = submitit.SlurmExecutor(**_settings(folder))
    executor.update_parameters(**_parameters(options, title, parallel))
    calls = [Task(folder.absolute(), name, tuple(words), retries) for name, words in tasks.items()]
    try:
        with executor.batch():
            jobs = [executor.submit(call) for call in calls]
    except Exception as error:  # submitit has a class of its own for what sbatch says
        raise UserError(f"sbatch refuses: {' '.join(str(error).split())}") from error
    for call, job in zip(calls, jobs):
        before = attempts.read(folder, call.name)
        if before is None or before.job != job.job_id:  # else the task was quicker than we
            note = attempts.Note(started=time.time(), job=job.job_id)
            attempts.write(folder, call.name, note)
    return [job.job_id for job in jobs]


def script(
    folder: pathlib.Path, count: int, options: Options, *, title: str, parallel: int | None = None
) -> str:
    """The batch file that `submit` hands to sbatch for so many tasks; needs no SLURM.

    Raises:
      UserError: submitit is not installed, or an option cannot be read.
    """
    from_here = type("_Executor", (_submitit().SlurmExecutor,), {"affinity": lambda *_: 2})
    executor = from_here(**_settings(folder))
    executor.update_parameters(**_parameters(options, title, parallel))
    if count > 1:
        executor.parameters["map_count"] = count
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def queue() -> dict[str, str] | None:
    """{job: state} of what this user has in SLURM's queue; None where there is no SLURM."""
    if shutil.which("squeue") is None:
        return None
    user = os.environ.get("USER") or str(os.getuid())
    words = ["squeue", "--noheader", "--array", f"--user={user}", "--format=%i %T"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if said.returncode:
        return None
    return dict(line.split()[:2] for line in said.stdout.splitlines() if line.strip())


def _settings(folder: pathlib.Path) -> dict[str, Any]:
    return {"folder": folder.absolute() / "slurm", "max_num_timeout": _REQUEUES}


def _parameters(options: Options, title: str, parallel: int | None) -> dict[str, Any]:
    """The options as submitit names them; what is None is left to the cluster."""
    more = {}
    for extra in options.sbatch:
        name, equals, value = extra.removeprefix("--").partition("=")
        if not extra.startswith("--") or not name:
            raise UserError(f"--sbatch={extra!r}: write a long option of sbatch, as --exclusive.")
        more[name] = value if equals else True
    if options.time is None:
        raise UserError(
            "--time is needed with --executor=slurm: the limit of one point, as 4:00:00."
        )
    limit = seconds(options.time)
    if limit <= options.notice:
        raise UserError(
            f"--time={options.time} is {limit} s, and --notice={options.notice} s before its end a "
            "point is asked to save: give more time, or a shorter notice."
        )
    # submitit tells by the limit whether a warning came for it: it has to know a number.
    given = {
        "job_name": title,
        "nodes": options.nodes,
        "ntasks_per_node": options.tasks_per_node,
        "gpus_per_node": options.gpus_per_node,
        "cpus_per_task": options.cpus_per_task,
        "mem": options.memory,
        "time": max(1, limit // 60),
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "signal_delay_s": options.notice,
        "array_parallelism": parallel or 256,
        "additional_parameters": more | {"requeue": True},
    }
    return {name: value for name, value in given.items() if value is not None}


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise UserError("--executor=slurm needs submitit: pip install 'jdiff[slurm]'") from None
    return submitit


def _job() -> str | None:
    """The job that this process is part of, as squeue names it."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def _wait(process: Any) -> None:
    """Until a child has ended; unlike Popen.wait, also in a signal handler that interrupts it."""
    with contextlib.suppress(ChildProcessError):  # its code has been fetched already
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
