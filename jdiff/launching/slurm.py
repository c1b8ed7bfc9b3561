"""SLURM: a batch script that starts one task a node, and requeues itself when told to."""

import dataclasses
import pathlib
import re
import shlex

from jdiff import exits
from jdiff.errors import UserError
from jdiff.launching import programs
from jdiff.launching.jobs import Job, Standing, tail_of
from jdiff.launching.task import Plan, Task, shell_again, visible

# After the first task has ended, seconds until the others are killed: a peer that is lost is
# noticed within a minute, and the code with which that ends should be heard.
_WAIT = 150

# SLURM's states in our words; those that are not here are shown as they are.
_STATES = {
    "PENDING": "waiting", "CONFIGURING": "waiting", "REQUEUED": "waiting", "SUSPENDED": "waiting",
    "REQUEUE_HOLD": "waiting", "RUNNING": "running", "COMPLETING": "running",
    "COMPLETED": "finished", "CANCELLED": "cancelled", "FAILED": "failed", "TIMEOUT": "failed",
    "NODE_FAIL": "failed", "OUT_OF_MEMORY": "failed", "PREEMPTED": "failed",
    "BOOT_FAIL": "failed", "DEADLINE": "failed",
}  # fmt: skip

# Exit codes of a run that could go on.
_STOPPED = (str(exits.REQUEUE), str(exits.INTERRUPTED))

# Options that the script needs as it writes them.
_OURS = ("job-name", "nodes", "ntasks", "ntasks-per-node", "output", "open-mode", "signal", "array")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked of SLURM; None leaves it to the cluster's defaults.

    Attributes:
      nodes: machines.
      tasks_per_node: processes on each; each takes all the node's devices, or one GPU each.
      gpus_per_node, cpus_per_task, memory, time, partition, account, qos, constraint: as sbatch.
      notice: seconds before the time limit at which SIGTERM asks the processes to save.
      sbatch: further options of sbatch, as they are written there.
    """

    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    memory: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    notice: int = 300
    sbatch: tuple[str, ...] = ()


def plan(task: Task, options: Options, folder: pathlib.Path) -> Plan:
    """The batch script, and the command that submits it.

    Raises:
      UserError: tasks that do not share the node's GPUs evenly, a time limit that cannot be read or
        is shorter than the notice, or an option of sbatch that the script sets itself.
    """
    _check(options)
    if task.workdir.startswith("gs://"):
        raise UserError(f"--workdir={task.workdir}: nodes of SLURM need a path that they share.")
    path = folder / "sbatch.sh"
    return Plan(
        folder=folder,
        files={path: script(task, options, folder), folder / "config.json": task.config},
        commands=(("sbatch", "--parsable", str(path)),),
        warnings=visible(task.workdir, options.nodes),
    )


def script(task: Task, options: Options, folder: pathlib.Path) -> str:
    """The text of the batch script."""
    asked: dict[str, object] = {
        "job-name": task.name,
        "nodes": options.nodes,
        "ntasks-per-node": options.tasks_per_node,
        "gpus-per-node": options.gpus_per_node,
        "cpus-per-task": options.cpus_per_task,
        "mem": options.memory,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "output": folder / "%j.log",
        "open-mode": "append",
        "signal": f"TERM@{options.notice}",
    }
    head = [
        f"#SBATCH --{name}={_word(value)}" for name, value in asked.items() if value is not None
    ]
    head += ["#SBATCH --requeue", *(f"#SBATCH {extra}" for extra in options.sbatch)]
    srun = ["srun", f"--wait={_WAIT}", "--kill-on-bad-exit=0"]
    if options.cpus_per_task is not None:  # srun has not taken it from sbatch since 22.05
        srun.append(f"--cpus-per-task={options.cpus_per_task}")
    lines = "\n".join(head)
    setup = "".join(f"{line}\n" for line in task.setup)
    return f"""\
#!/usr/bin/env bash
{lines}
#
# Written by `jdiff launch`. SLURM sends SIGTERM to the tasks {options.notice} s before the time
# limit and on preemption; they save and end with code {exits.REQUEUE}, and this script puts the
# job back into the queue.

set -uo pipefail
export PYTHONUNBUFFERED=1
cd {shlex.quote(task.cwd)}
{setup}
{shell_again(task, str(folder / "failures"))}

# This shell itself gets SIGTERM when the job is cancelled or killed: then it is not requeued here.
ended=
trap 'ended=yes' TERM

say() {{ echo "[jdiff] $(date -u +%FT%TZ) $*"; }}
say "job $SLURM_JOB_ID, start ${{SLURM_RESTART_COUNT:-0}}, on $SLURM_JOB_NODELIST"
{" ".join(srun)} {shlex.join(task.command(folder / "config.json"))}
code=$?
say "ended with exit code $code"
if [ -z "$ended" ] && [ ! -e {shlex.quote(str(folder / "cancelled"))} ] && again "$code"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def submit(plan: Plan, name: str, workdir: str) -> Job:
    """Writes the script and submits it.

    Raises:
      UserError: sbatch is not there, or refuses.
    """
    plan.write()
    said = programs.call(plan.commands[0]).strip()
    job = said.partition(";")[0]  # ID;CLUSTER where there are several
    return Job.new("slurm", name, job, workdir, plan.folder, log=str(plan.folder / f"{job}.log"))


def standing(job: Job) -> Standing:
    """As the controller knows it, else as accounting does.

    Raises:
      UserError: SLURM's programs are not there.
    """
    try:
        said = programs.call(["scontrol", "--oneliner", "show", "job", job.id])
        return read_job(said)
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
    try:
        columns = "State,Elapsed,ExitCode,NodeList"
        said = programs.call(["sacct", "-j", job.id, "-X", "-n", "-P", "-o", columns])
    except UserError:
        said = ""
    return read_account(said)


def read_job(said: str) -> Standing:
    """Reads a line of `scontrol --oneliner show job`."""
    found = dict(re.findall(r"(\S+?)=(\S*)", said))
    state = found.get("JobState", "UNKNOWN")
    parts = []
    if state == "RUNNING":
        parts = [f"for {found['RunTime']}", f"on {found['NodeList']}"]
    elif state == "PENDING":
        parts = [f"({found['Reason']})"]
    elif code := int(found.get("ExitCode", "0:0").partition(":")[0]):
        parts = [f"exit code {code}"]
    if int(found.get("Restarts", 0)):
        parts.append(f"restarted {found['Restarts']}x")
    return Standing(_state(state, found.get("ExitCode")), " ".join([f"SLURM: {state}", *parts]))


def read_account(said: str) -> Standing:
    """Reads what `sacct -X -n -P -o State,Elapsed,ExitCode,NodeList` says of one job."""
    if not said.strip():
        return Standing("unknown", "SLURM no longer knows this job, and keeps no accounts")
    state, elapsed, code, nodes = said.strip().splitlines()[-1].split("|")[:4]
    state = state.split()[0]  # CANCELLED by 1000
    detail = f"SLURM: {state} after {elapsed} on {nodes}, exit code {code.partition(':')[0]}"
    return Standing(_state(state, code), detail)


def _state(state: str, code: str | None) -> str:
    """Ours for SLURM's; a job that has saved and was not to go on is stopped, not failed."""
    if state == "FAILED" and (code or "").partition(":")[0] in _STOPPED:
        return "stopped"
    return _STATES.get(state, state.lower())


def tail(job: Job, lines: int) -> str:
    """The end of the log."""
    return tail_of(pathlib.Path(job.log), lines)


def cancel(job: Job) -> str:
    """Ends the job: a running one saves, however long that takes, and is not requeued.

    Asked a second time, it is SLURM's own cancellation, which kills after half a minute.
    """
    asked = pathlib.Path(job.folder) / "cancelled"
    if standing(job).state == "running" and not asked.exists():
        asked.touch()
        programs.call(["scancel", "--signal=TERM", job.id])
        return f"job {job.id} is asked to end; its processes save first"
    programs.call(["scancel", job.id])
    return f"job {job.id} is cancelled"


def _check(options: Options) -> None:
    for name in ("nodes", "tasks_per_node"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)} given; at least 1 is needed.")
    gpus, tasks = options.gpus_per_node, options.tasks_per_node
    if gpus is not None and tasks not in (1, gpus):
        raise UserError(
            f"--tasks_per_node={tasks} with --gpus={gpus}: a process takes all GPUs of its "
            f"node (1) or one each ({gpus})."
        )
    if options.time is not None and (limit := seconds(options.time)) <= options.notice:
        raise UserError(
            f"--time={options.time} is {limit} s, and --notice={options.notice} s before its end "
            "the processes are asked to save: give more time, or a shorter notice."
        )
    for extra in options.sbatch:
        name = extra.lstrip("-").partition("=")[0].split()[0] if extra.strip("- ") else ""
        if not extra.startswith("--") or name in _OURS:
            raise UserError(
                f"--sbatch={extra!r}: write one of sbatch's long options, as "
                f"--sbatch=--exclusive; {', '.join(_OURS)} are set by the launcher."
            )


def seconds(text: str) -> int:
    """Reads a time limit as sbatch does: MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.

    Raises:
      UserError: it is none of these.
    """
    days, dash, clock = text.rpartition("-")
    if not re.fullmatch(r"\d*", days) or not re.fullmatch(r"\d+(:\d+){0,2}", clock):
        raise UserError(f"--time={text}: write minutes, HH:MM:SS or DAYS-HH:MM:SS.")
    parts = [int(part) for part in clock.split(":")]
    if dash:  # from the left: hours, minutes, seconds
        weights = (3600, 60, 1)
    else:
        weights = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(parts)]
    return int(days or 0) * 86400 + sum(w * part for w, part in zip(weights, parts))


def _word(value: object) -> str:
    """As a value behind #SBATCH, which splits at blanks unless they are quoted."""
    text = str(value)
    return f'"{text}"' if re.search(r"\s", text) else text
