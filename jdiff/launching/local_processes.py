"""This machine: several processes that meet on loopback, with simulated or real devices each.

What two hosts do is tried on a laptop this way. The launcher waits for the processes, hands on
SIGTERM and Ctrl-C, and starts them again as a scheduler would.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jdiff import exits
from jdiff.errors import UserError
from jdiff.launching.jobs import Job, Standing, tail_of
from jdiff.launching.task import Plan, Task, again, peers

# After one process has failed, seconds until those that have not noticed are asked, then killed.
_PATIENCE = (150.0, 30.0)


@dataclasses.dataclass(frozen=True)
class Options:
    """How many processes, and what each has.

    Attributes:
      processes: how many.
      devices: simulated CPU devices of each; the machine's real devices if None.
      gpus: real GPUs of each, dealt out in order.
      detach: goes on after the launcher's terminal has closed.
    """

    processes: int = 1
    devices: int | None = None
    gpus: int | None = None
    detach: bool = False


def plan(task: Task, options: Options, folder: pathlib.Path) -> Plan:
    """What is started, and the command that starts it apart from this terminal.

    Raises:
      UserError: fewer than one process or device, or simulated and real devices at once.
    """
    for name in ("processes", "devices", "gpus"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name}={value} given; at least 1 is needed.")
    if options.devices is not None and options.gpus is not None:
        raise UserError("--devices simulates devices on the CPU; --gpus takes real ones.")
    if options.processes > 1 and options.devices is None and options.gpus is None:
        raise UserError(
            f"--processes={options.processes}: say what each has, --devices=4 (simulated, on the "
            "CPU) or --gpus=1."
        )
    if task.setup:
        raise UserError("--setup is for other machines; set up this one before `jdiff launch`.")
    kept = dataclasses.asdict(task) | {"config": ""}
    written = json.dumps({"task": kept, "options": dataclasses.asdict(options)}, indent=2)
    words = task.command(folder / "config.json")
    commands = tuple(
        ("env", *(f"{k}={v}" for k, v in _own(options, i, "PORT").items()), *words)
        for i in range(options.processes)
    )
    files = {folder / "config.json": task.config, folder / "task.json": written + "\n"}
    return Plan(folder, files, commands)


def submit(plan: Plan, name: str, workdir: str) -> Job:
    """Starts it apart from this terminal; `run` does so in it."""
    plan.write()
    words = [sys.executable, "-m", "jdiff.launching.local_processes", str(plan.folder)]
    with (plan.folder / "log.txt").open("ab") as log:
        started = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    return job_of(started.pid, plan, name, workdir)


def job_of(pid: int, plan: Plan, name: str, workdir: str) -> Job:
    """The job whose launcher is the process `pid`."""
    log = str(plan.folder / "log.txt")
    return Job.new("local", name, str(pid), workdir, plan.folder, log=log, born=_born(pid))


def run(folder: pathlib.Path, *, show: bool) -> int:
    """Starts the processes of FOLDER/task.json, again while they ask for it; the last exit code.

    Args:
      folder: also takes process 0's output in log.txt, and that of the others in process-1.txt, ...
      show: copies process 0's output to ours.
    """
    written = json.loads((folder / "task.json").read_text())
    task = Task(**{k: tuple(v) if isinstance(v, list) else v for k, v in written["task"].items()})
    options = Options(**written["options"])
    code, failures = exits.FAILED, 0
    try:
        with _asked() as asked:
            while True:
                code = worst(_once(task, options, folder, asked, show))
                failures = 0 if code == exits.REQUEUE else failures + 1
                if asked or not again(code, failures, task.retries):
                    return code
                with (folder / "log.txt").open("a") as log:
                    print(f"[jdiff] ended with exit code {code}; starting again", file=log)
    finally:
        (folder / "exit.txt").write_text(f"{code}\n")


def worst(codes: Sequence[int]) -> int:
    """One exit code for all: what would happen again, else a failure, else a wish to go on."""
    codes = [128 - code if code < 0 else code for code in codes]  # ended by a signal
    for code in (exits.USER, exits.DIVERGED, exits.INTERRUPTED):
        if code in codes:
            return code
    failed = [code for code in codes if code not in (exits.OK, *exits.AGAIN)]
    for group in (failed, [c for c in codes if c == exits.PEER_LOST], [c for c in codes if c]):
        if group:
            return group[0]
    return exits.OK


def standing(job: Job) -> Standing:
    """By the exit code that the launcher leaves, or whether it lives."""
    path = pathlib.Path(job.folder) / "exit.txt"
    if path.exists():
        code = int(path.read_text())
        state = {exits.OK: "finished", exits.REQUEUE: "stopped", exits.INTERRUPTED: "stopped"}
        return Standing(state.get(code, "failed"), f"exit code {code}")
    if _born(int(job.id)) == job.details["born"] != "":
        return Standing("running", f"process {job.id}")
    return Standing("failed", f"process {job.id} was killed, or the machine restarted")


def tail(job: Job, lines: int) -> str:
    """The end of process 0's output."""
    return tail_of(pathlib.Path(job.log), lines)


def cancel(job: Job) -> str:
    """Asks the processes to save and end."""
    if standing(job).state != "running":
        return f"process {job.id} does not run"
    os.kill(int(job.id), signal.SIGTERM)
    return f"process {job.id} is asked to end; its processes save first"


def _own(options: Options, index: int, port: int | str) -> dict[str, str]:
    """The environment that only process `index` has."""
    own = {}
    if options.processes > 1:
        own |= peers(f"127.0.0.1:{port}", options.processes, index)
    if options.devices is not None:
        own |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices)}
    if (each := options.gpus) is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [*map(str, range(each * options.processes))]
        own["CUDA_VISIBLE_DEVICES"] = ",".join(names[index * each : (index + 1) * each])
    return own


def _once(
    task: Task, options: Options, folder: pathlib.Path, asked: list[int], show: bool
) -> list[int]:
    """Starts the processes and waits for all; their return codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = task.command(folder / "config.json")
    started: list[subprocess.Popen] = []
    with contextlib.ExitStack() as files:
        for i in range(options.processes):
            name = "log.txt" if i == 0 else f"process-{i}.txt"
            log = files.enter_context((folder / name).open("ab", buffering=0))
            process = subprocess.Popen(
                words, cwd=task.cwd, start_new_session=True, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if show and i == 0 else log,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | _own(options, i, port),
            )  # fmt: skip
            started.append(process)
            if process.stdout:
                shown = threading.Thread(target=_show, args=(process.stdout, log))
                shown.start()
                files.callback(shown.join)
        _wait(started, asked)
    return [process.returncode for process in started]


def _wait(started: Sequence[subprocess.Popen], asked: list[int]) -> None:
    """Until all have ended; hands on signals, and ends those that outlive a failed one for long."""
    told, failed, kill = 0, None, False
    while any(process.poll() is None for process in started):
        now = time.monotonic()
        if len(asked) > told:
            told = len(asked)
            _tell(started, asked[-1])
        if failed is None and any(process.returncode for process in started):
            failed = now
        if failed is not None and now - failed > _PATIENCE[0]:
            _tell(started, signal.SIGKILL if kill else signal.SIGTERM)
            failed, kill = now - _PATIENCE[0] + _PATIENCE[1], True
        time.sleep(0.1)


def _tell(started: Sequence[subprocess.Popen], signum: int) -> None:
    for process in started:
        if process.poll() is None:
            process.send_signal(signum)


def _show(output: Any, log: Any) -> None:
    """Copies a process's output to ours and into its log."""
    for chunk in iter(lambda: output.read1(65536), b""):
        log.write(chunk)
        with contextlib.suppress(OSError, ValueError):  # our reader has gone; the log goes on
            sys.stdout.write(chunk.decode(errors="replace"))
            sys.stdout.flush()


@contextlib.contextmanager
def _asked() -> Iterator[list[int]]:
    """Collects SIGTERM and Ctrl-C; a terminal that closes asks as SIGTERM does."""
    asked: list[int] = []
    means = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGINT,
             signal.SIGHUP: signal.SIGTERM}  # fmt: skip
    note = lambda signum, frame: asked.append(means[signum])
    heard = [s for s in means if signal.getsignal(s) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {signum: signal.signal(signum, note) for signum in heard}
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _born(pid: int) -> str:
    """When a living process started, in the kernel's clock, for numbers are given out again.

    Empty if there is none; "alive" where the system does not tell more.
    """
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except OSError:
        with contextlib.suppress(OSError):
            if not pathlib.Path("/proc/self/stat").exists():
                os.kill(pid, 0)
                return "alive"
    return ""


if __name__ == "__main__":
    sys.exit(run(pathlib.Path(sys.argv[1]), show=False))
