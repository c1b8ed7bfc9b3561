"""TPU VMs: the same script on all workers of a slice, through gcloud's ssh.

No scheduler watches a TPU VM, so the script itself starts the command again. A VM that Google takes
away (spot, maintenance) is gone: create it again and launch again, and the run goes on.
"""

import dataclasses
import pathlib
import shlex

from jdiff import exits
from jdiff.errors import UserError
from jdiff.launching import programs, tpu_slices
from jdiff.launching.jobs import Job, Standing
from jdiff.launching.task import Plan, Task, shell_again

_HOME = "jdiff-launch"  # on the workers, in the home directory


@dataclasses.dataclass(frozen=True)
class Options:
    """Which TPU VM, and how it is made.

    Attributes:
      tpu: its name.
      zone, project: where it is; None leaves the project to gcloud's configuration.
      accelerator, topology: its size, as `tpu_slices.parse` reads it.
      create: make it first.
      spot: cheaper, and may be taken away.
      runtime: its software, if not the generation's usual one.
      mounts: (gs://BUCKET, path) pairs, mounted by gcsfuse on every worker.
      copy: a folder of this machine that is copied to every worker, where the command starts.
    """

    tpu: str | None = None
    zone: str | None = None
    project: str | None = None
    accelerator: str | None = None
    topology: str | None = None
    create: bool = False
    spot: bool = False
    runtime: str | None = None
    mounts: tuple[tuple[str, str], ...] = ()
    copy: str | None = None


def plan(task: Task, options: Options, folder: pathlib.Path) -> Plan:
    """The script of the workers, and gcloud's commands: create, copy, start.

    Raises:
      UserError: no name or zone, a slice that does not exist, nothing to create, or a mount that is
        no bucket.
    """
    for name in ("tpu", "zone"):
        if not getattr(options, name):
            raise UserError(f"--{name} is missing: `gcloud compute tpus tpu-vm list` shows yours.")
    if options.copy is not None and not pathlib.Path(options.copy).is_dir():
        raise UserError(f"--copy={options.copy} is not a folder.")
    slice_ = None
    if options.accelerator is not None:
        slice_ = tpu_slices.parse(options.accelerator, options.topology)
    elif options.create or options.topology is not None:
        raise UserError("--accelerator is missing: which slice is meant, such as v5p-8.")
    for unused in ("spot", "runtime"):
        if getattr(options, unused) and not options.create:
            raise UserError(f"--{unused} says how a TPU VM is made; it needs --create.")
    remote = f"{_HOME}/{folder.name}"
    path = folder / "worker.sh"
    commands = [_create(options, slice_)] if options.create and slice_ else []
    # Nothing of it may hold ssh's own output open, or ssh would wait for it.
    log = f">>{remote}/log.txt 2>&1 </dev/null"
    start = f"{{ setsid nohup bash {remote}/worker.sh {log} & }}; echo started"
    commands += [
        _ssh(options, "all", f"mkdir -p {remote}"),
        _gcloud(options, "scp", str(path), f"{options.tpu}:{remote}/", "--worker=all"),
    ]
    if options.copy is not None:
        target = f"{options.tpu}:{remote}/code"
        commands.append(_gcloud(options, "scp", "--recurse", options.copy, target, "--worker=all"))
    commands.append(_ssh(options, "all", start))
    warnings = []
    mounted = [where for _, where in options.mounts]
    hosts = slice_.hosts if slice_ else 2
    if hosts > 1 and not any(
        pathlib.PurePosixPath(task.workdir).is_relative_to(where) for where in mounted
    ):
        warnings.append(
            f"--workdir={task.workdir} is a path on each worker; they must share it (a mounted "
            "disk), or say --workdir=gs://BUCKET/PATH."
        )
    return Plan(folder, {path: script(task, options, remote)}, tuple(commands), tuple(warnings))


def script(task: Task, options: Options, remote: str) -> str:
    """What every worker runs; `remote` is its folder in the home directory there."""
    mounts = "".join(_mount(source, where) for source, where in options.mounts)
    setup = "".join(f"{line}\n" for line in task.setup)
    # The file lies in the worker's home directory, whose name is known there only.
    command = programs.line(task.command("@")).replace("--config=@", '"--config=$here/config.json"')
    start = "code" if options.copy is not None else task.cwd
    return f"""\
#!/usr/bin/env bash
# Written by `jdiff launch`: starts the command, and again when it ends with code {exits.REQUEUE}.
# SIGTERM to this shell (its number is in the file pid) asks the command to save, and ends both.
set -uo pipefail
cd "$HOME/{remote}"
echo $$ >pid
rm -f exit
here=$PWD
{task.here_document("config.json")}
export PYTHONUNBUFFERED=1
{shell_again(task, "failures").replace("failures=failures", 'failures="$here/failures"')}

{mounts}{f"cd {shlex.quote(start)}{chr(10)}" if start else ""}{setup}
child= ended=
trap 'ended=yes; [ -z "$child" ] || kill -TERM "$child"' TERM
while [ -z "$ended" ]; do
  echo "[jdiff] start on $(hostname), $(date -u +%FT%TZ)"
  {command} &
  child=$!
  wait "$child"; code=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done  # a signal ends a wait
  echo "[jdiff] ended with exit code $code, $(date -u +%FT%TZ)"
  again "$code" || break
done
echo "$code" >"$here/exit"
"""


def _mount(source: str, where: str) -> str:
    if not source.startswith("gs://"):
        raise UserError(f"--mount={source}:{where}: on TPU VMs, write gs://BUCKET:/PATH.")
    bucket, path = shlex.quote(source.removeprefix("gs://")), shlex.quote(where)
    return (
        f"mountpoint -q {path} || {{\n"
        f'  sudo mkdir -p {path} && sudo chown "$(id -u)" {path} &&\n'
        f"  gcsfuse --implicit-dirs --rename-dir-limit=100000 {bucket} {path}\n"
        f'}} || {{ echo {exits.IO} >"$here/exit"; exit {exits.IO}; }}\n'
    )


def _create(options: Options, found: tpu_slices.Slice) -> tuple[str, ...]:
    made = tpu_slices.GENERATIONS[found.generation]
    runtime = options.runtime or made.runtime
    if runtime is None:
        raise UserError(
            f"--runtime is missing: `gcloud compute tpus tpu-vm versions list "
            f"--zone={options.zone}` lists the software for TPU {found.generation}."
        )
    size = [f"--accelerator-type={found.type}"]
    if options.topology is not None:
        size = [f"--type={made.type}", f"--topology={found.topology}"]
    words = [*size, f"--version={runtime}", *(["--spot"] if options.spot else [])]
    return _gcloud(options, "create", str(options.tpu), *words)


def _gcloud(options: Options, verb: str, *words: str) -> tuple[str, ...]:
    where = [f"--zone={options.zone}"]
    if options.project:
        where.append(f"--project={options.project}")
    return ("gcloud", "compute", "tpus", "tpu-vm", verb, *words, *where)


def _ssh(options: Options, worker: str, command: str) -> tuple[str, ...]:
    words = (str(options.tpu), f"--worker={worker}", f"--command={command}")
    return _gcloud(options, "ssh", *words)


def submit(plan: Plan, name: str, workdir: str) -> Job:
    """Writes the script and runs gcloud's commands, one after the other.

    Raises:
      UserError: gcloud is not there, or one of them fails.
    """
    plan.write()
    for command in plan.commands:
        programs.call(command, timeout=1800.0)
    last = plan.commands[-1]
    given = {w[2:].partition("=")[0]: w.partition("=")[2] for w in last if w.startswith("--")}
    options = Options(tpu=last[5], zone=given["zone"], project=given.get("project"))
    log = programs.line(_ssh(options, "0", f"tail -n 100 {_HOME}/{plan.folder.name}/log.txt"))
    return Job.new(
        "tpu-vm", name, plan.folder.name, workdir, plan.folder, log=log,
        tpu=options.tpu, zone=options.zone, project=options.project,
    )  # fmt: skip


def standing(job: Job) -> Standing:
    """By the state of the VM, and by what the script of each worker left.

    Raises:
      UserError: gcloud is not there, or it fails.
    """
    options = _options(job)
    try:
        words = _gcloud(options, "describe", str(options.tpu), "--format=value(state)")
        state = programs.call(words).strip()
    except UserError as error:
        if "NOT_FOUND" in str(error):
            return Standing("failed", f"TPU VM {options.tpu} does not exist any more")
        raise
    if state != "READY":
        return Standing("waiting" if state == "CREATING" else "failed", f"TPU VM: {state}")
    ask = (
        f"cd {_HOME}/{job.id} && if [ -s exit ]; then echo jdiff-exit $(cat exit); "
        "elif kill -0 $(cat pid); then echo jdiff-runs; else echo jdiff-gone; fi"
    )
    return read_workers(programs.call(_ssh(options, "all", ask), timeout=600.0))


def read_workers(said: str) -> Standing:
    """Reads what the workers answered, a line each, in any order and among ssh's own lines."""
    answers = [line.split() for line in said.splitlines() if line.startswith("jdiff-")]
    codes = [int(words[1]) for words in answers if words[0] == "jdiff-exit"]
    runs = sum(words[0] == "jdiff-runs" for words in answers)
    detail = f"{runs} of {len(answers)} workers run"
    if codes:
        detail += f"; exit codes {', '.join(str(code) for code in sorted(set(codes)))}"
    if runs:
        return Standing("running", detail)
    if not answers or len(codes) < len(answers):
        return Standing("failed", f"{detail}; the script of {len(answers) - len(codes)} was killed")
    if any(codes) and set(codes) <= {exits.OK, exits.REQUEUE, exits.INTERRUPTED}:
        return Standing("stopped", detail)
    return Standing("failed" if any(codes) else "finished", detail)


def tail(job: Job, lines: int) -> str:
    """The end of worker 0's output."""
    options = _options(job)
    said = programs.call(_ssh(options, "0", f"tail -n {lines} {_HOME}/{job.id}/log.txt"))
    return said.rstrip()


def cancel(job: Job) -> str:
    """Asks all workers to save and end; the VM stays, and costs, until it is deleted."""
    options = _options(job)
    programs.call(_ssh(options, "all", f"kill -TERM $(cat {_HOME}/{job.id}/pid)"), timeout=600.0)
    delete = programs.line(_gcloud(options, "delete", str(options.tpu), "--quiet"))
    return f"the workers of {options.tpu} save and end; the VM goes on to cost: {delete}"


def _options(job: Job) -> Options:
    return Options(**{key: job.details[key] for key in ("tpu", "zone", "project")})
