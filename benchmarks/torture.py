"""Kills a training run again and again, and compares what comes out with a run never killed.

    python benchmarks/torture.py                       # 30 kills -9 of a digits run
    python benchmarks/torture.py --terms=5             # and 5 SIGTERM, as before a preemption
    python benchmarks/torture.py --config=configs/digits.py     # of a larger network
    python benchmarks/torture.py --processes=2 --kills=6        # one of two processes is hit
    python benchmarks/torture.py --quick               # one of each

Each time the run is started again by the same command. Three kinds of moments are drawn from
--seed: while it starts (imports, restoring, compiling), after some steps, and as Orbax's temporary
folder appears, which is in the middle of a save. At the end every array of the last checkpoint
(weights, optimiser, averages), the position in the data and the loss of every step have to be the
same bits as those of the run that was left alone.
"""

import argparse
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jdiff import exits

ROOT = pathlib.Path(__file__).parent.parent
TEMPORARY = "*.orbax-checkpoint-tmp*"
DIGITS = """
from jdiff.experiment import defaults

def get_config():
    c = defaults()
    c.name = "digits: a small DiT"
    c.model.update({"name": "dit", "width": 16, "depth": 1, "heads": 2})
    c.ema = {"ema": {"kind": "constant", "decay": 0.9}, "wide": {"kind": "power", "sigma_rel": 0.1}}
    c.sampling.grid.steps = 2
    c.train.batch_size = 16
    return c
"""


class Blow(NamedTuple):
    """One kill.

    Attributes:
      moment: "start", "step" or "save".
      wait: seconds after that moment.
      steps: how many steps, or saves, are let through before.
      process: which one is hit, modulo their number.
    """

    signum: int
    moment: str
    wait: float
    steps: int
    process: int


class Felt(NamedTuple):
    """What a blow did."""

    blow: Blow
    code: int | None
    others: tuple[int | None, ...]  # exit codes of the processes that were not hit
    waited: float  # seconds until the last of them had ended
    step: int  # the last one in metrics.jsonl
    saved: int | None  # the newest checkpoint
    half: bool  # whether an unfinished save was left behind
    seconds: float


def blows(kills: int, terms: int, every: int, seed: int) -> list[Blow]:
    """Moments of all kinds in turn, drawn from `seed`; on average fewer steps than `every` each."""
    draw = random.Random(seed)
    signums = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
    draw.shuffle(signums)
    found = []
    for i, signum in enumerate(signums):
        moment = ("save", "step", "save", "step", "start")[i % 5]
        wait = {"save": 0.06, "step": 0.2, "start": 6.0}[moment]
        steps = draw.randint(0, 1) if moment == "save" else draw.randint(1, every)
        found.append(Blow(signum, moment, draw.uniform(0, wait), steps, i))
    return found


def started(command: list[str], processes: int, log: pathlib.Path) -> list[subprocess.Popen]:
    """The processes of one run, on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = lambda i: [
        f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process={i}",
        "--connect_timeout=50",
    ] if processes > 1 else []  # fmt: skip
    with log.open("ab") as out:
        return [
            subprocess.Popen([*command, *together(i)], stdout=out, stderr=subprocess.STDOUT)
            for i in range(processes)
        ]


def ended(run: list[subprocess.Popen], timeout: float) -> tuple[int | None, ...]:
    """Exit codes; a process that does not end in time is killed and has None."""
    codes, until = [], time.monotonic() + timeout
    for process in run:
        try:
            codes.append(process.wait(max(until - time.monotonic(), 0.1)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            codes.append(None)
    return tuple(codes)


def strike(
    command: list[str], processes: int, workdir: pathlib.Path, blow: Blow, log: pathlib.Path
) -> Felt:
    """Starts the command, waits for the moment, hits a process, and looks at what is left."""
    began, first = time.monotonic(), last_step(workdir)
    before = seen = set(unfinished(workdir))
    run = started(command, processes, log)
    saves = 0
    while all(process.poll() is None for process in run):
        if blow.moment == "start":
            break
        if blow.moment == "step" and last_step(workdir) >= first + blow.steps:
            break
        new = set(unfinished(workdir)) - seen
        saves, seen = saves + bool(new), seen | new
        if blow.moment == "save" and saves > blow.steps:
            break
        time.sleep(0.001)
    time.sleep(blow.wait)
    hit = run.pop(blow.process % processes)
    hit.send_signal(blow.signum)
    at = time.monotonic()
    (code,) = ended([hit], 300)
    others = ended(run, 60 if blow.signum == signal.SIGKILL else 300)
    half = bool(set(unfinished(workdir)) - before)
    return Felt(
        blow, code, others, time.monotonic() - at, last_step(workdir), newest(workdir), half,
        time.monotonic() - began,
    )  # fmt: skip


def unexpected(felt: Felt) -> list[str]:
    """What is wrong with the exit codes after a blow."""
    name = signal.Signals(felt.blow.signum).name
    killed = felt.blow.signum == signal.SIGKILL
    # Before Python has come to our handler, SIGTERM ends a process as it ends any other.
    early = felt.blow.moment == "start" and felt.code == -signal.SIGTERM
    fine = felt.code if early else -signal.SIGKILL if killed else exits.REQUEUE
    theirs = exits.PEER_LOST if killed or early else exits.REQUEUE
    wrong = [] if felt.code == fine else [f"a process hit by {name} ended with {felt.code}"]
    return wrong + [
        f"a process beside one hit by {name} ended with {code}"
        for code in felt.others if code != theirs
    ]  # fmt: skip


def unfinished(workdir: pathlib.Path) -> Iterator[str]:
    """Orbax's temporary folders: of a save that is going on, or was killed."""
    return (p.name for p in (workdir / "checkpoints").glob(TEMPORARY))


def newest(workdir: pathlib.Path) -> int | None:
    """The step of the newest checkpoint."""
    there = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    return max(there, default=None)


def last_step(workdir: pathlib.Path) -> int:
    """The last step that the run has told of."""
    return max(losses(workdir), default=0)


def losses(workdir: pathlib.Path) -> dict[int, tuple[float, float]]:
    """step -> (loss, gradient's norm) of metrics.jsonl; a line that is cut off is left out."""
    path, found = workdir / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["kind"] == "train":
            found[entry["step"]] = entry["loss"], entry["grad_norm"]
    return found


def contents(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint by name, and the position in the data."""
    import jax
    import orbax.checkpoint as ocp

    step = workdir / "checkpoints" / str(newest(workdir))
    logging.getLogger("absl").setLevel(logging.ERROR)
    folder, reader = (step / "state").absolute(), ocp.PyTreeCheckpointer()
    here = ocp.ArrayRestoreArgs(sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    wanted = jax.tree.map(lambda _: here, reader.metadata(folder).item_metadata.tree)
    state = reader.restore(folder, restore_args=wanted)
    bits = lambda a: jax.random.key_data(a) if jax.dtypes.issubdtype(
        getattr(a, "dtype", np.float32), jax.dtypes.prng_key) else a  # fmt: skip
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    arrays = {jax.tree_util.keystr(path): np.asarray(bits(leaf)) for path, leaf in leaves}
    return arrays | {"data": np.asarray((step / "data" / "metadata").read_text())}


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """What is not the same bits in two runs."""
    a, b = contents(one), contents(other)
    unlike = [
        name for name in sorted(a.keys() | b.keys())
        if name not in a or name not in b or a[name].tobytes() != b[name].tobytes()
    ]  # fmt: skip
    told, again = losses(one), losses(other)
    steps = [s for s in sorted(told.keys() | again.keys()) if told.get(s) != again.get(s)]
    return unlike + [f"metrics of step {s}" for s in steps]


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--kills", type=int, default=30, help="kills -9 (default 30)")
    p.add_argument("--terms", type=int, default=0, help="SIGTERMs among them (default 0)")
    p.add_argument("--every", type=int, default=10, help="steps between checkpoints (default 10)")
    p.add_argument("--processes", type=int, default=1, help="of the run; one is hit (default 1)")
    p.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    p.add_argument("--folder", type=pathlib.Path, help="keeps the two runs and their output here")
    p.add_argument("--config", type=pathlib.Path, help="by default a small DiT on the digits")
    p.add_argument("--quick", action="store_true", help="one kill, one SIGTERM")
    a = p.parse_args()
    kills, terms = (1, 1) if a.quick else (a.kills, a.terms)
    folder = a.folder or pathlib.Path(tempfile.mkdtemp(prefix="torture-"))
    folder.mkdir(parents=True, exist_ok=True)
    config = a.config or folder / "digits.py"
    if a.config is None:
        config.write_text(DIGITS)
    steps = (kills + terms + 2) * (a.every + 1)  # never done before the last blow
    overrides = {
        "steps": steps, "checkpoint_every": a.every, "log_every": 1, "sample_every": 10 * steps
    }  # fmt: skip
    command = lambda workdir: [
        sys.executable, "-m", "jdiff.cli", "train", f"--config={config}", f"--workdir={workdir}",
        "--no-evaluate", *(f"--config.train.{k}={v}" for k, v in overrides.items()),
    ]  # fmt: skip
    os.environ.setdefault("JDIFF_CACHE", str(folder / "cache"))
    alone, struck = folder / "alone", folder / "struck"

    began = time.monotonic()
    print(f"{steps} steps, a checkpoint every {a.every}; first a run left alone ...", flush=True)
    if any(codes := ended(started(command(alone), a.processes, folder / "alone.log"), 3600)):
        print(f"FAILED: it ended with {codes}; see {folder / 'alone.log'}")
        return 1
    print(f"  {time.monotonic() - began:.0f} s\n", flush=True)
    print("  #  signal   moment              exit  told  saved  half a save  seconds", flush=True)
    felt, wrong, log = [], [], folder / "struck.log"
    for i, blow in enumerate(blows(kills, terms, a.every, a.seed), 1):
        felt.append(f := strike(command(struck), a.processes, struck, blow, log))
        moment = f"{blow.moment} {blow.steps if blow.moment != 'start' else ''} +{blow.wait:.3f} s"
        others = f"  the others: {f.others} after {f.waited:.1f} s" if f.others else ""
        print(
            f"{i:3}  {signal.Signals(blow.signum).name:7}  {moment:18}  {f.code!s:>4}  "
            f"{f.step:4}  {f.saved if f.saved is not None else '-':>5}  "
            f"{'yes' if f.half else '-':>11}  {f.seconds:7.1f}{others}", flush=True,
        )  # fmt: skip
        wrong += unexpected(f)
    if any(codes := ended(started(command(struck), a.processes, log), 3600)):
        wrong.append(f"the last start ended with {codes}")
    wrong += differences(alone, struck) if not wrong else []
    arrays = len(contents(alone)) - 1
    print(
        f"\n{kills} kills -9 and {terms} SIGTERM, {sum(f.half for f in felt)} left half a save "
        f"behind; {time.monotonic() - began:.0f} s."
    )
    if wrong:
        print(f"FAILED: {', '.join(wrong[:8])}\nsee {folder}")
        return 1
    print(f"{arrays} arrays, the data's position and {steps} losses are the same bits: ok")
    if a.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
