"""What checkpoints cost: the training loop's time for saving, and restoring over reading the disk.

    python benchmarks/checkpointing.py                 # about five minutes on two idle cores
    python benchmarks/checkpointing.py --quick

Saving: the steps of a training loop, in stretches of --every steps that save once and stretches
that do not, in turn; a stretch ends when nothing is being saved any more. Restoring: a checkpoint
of --megabytes whose files were thrown out of the page cache, against plainly reading the same
files, thrown out alike; the comparison of checksums is in it. All is measured in one process.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import timing

from jdiff import experiment
from jdiff.data.sources import Info
from jdiff.training import checkpoints
from jdiff.training import step as steps


def training(width: int, depth: int, batch: int):
    """(state, compiled step, batch) of a DiT with Adam and two averages."""
    c = experiment.defaults()
    c.model.update({"name": "dit", "width": width, "depth": depth, "heads": 4})
    c.ema = {"ema": {"kind": "constant", "decay": 0.999},
             "wide": {"kind": "power", "sigma_rel": 0.1}}  # fmt: skip
    exp = experiment.build(c, Info("digits", "train", (8, 8, 1), 10, (), 1437))
    state = steps.start(exp.init(jax.random.key(0)), jax.random.key(1), exp.optimizer, exp.averages)
    step = steps.compile_step(steps.make_step(exp.loss, exp.optimizer, exp.averages))
    images = jax.random.randint(jax.random.key(2), (batch, 8, 8, 1), 0, 255, jnp.uint8)
    return state, step, {"image": images, "label": jnp.arange(batch) % 10}


def saving(folder: pathlib.Path, every: int, rounds: int, *size: int) -> dict[str, float]:
    """Medians over stretches: seconds without and with a save, of it blocked, and of the CPU."""
    state, step, batch = training(*size)
    found: dict[str, list[float]] = {}
    with checkpoints.opened(folder) as saved:
        for stretch in range(-2, 2 * rounds):
            save = stretch % 2
            wall, cpu = time.perf_counter(), time.process_time()
            for i in range(every):
                state, values = step(state, batch)
                if i == 0 and save:  # it has the other steps to finish in
                    jax.block_until_ready(values)
                    at = time.perf_counter()
                    saved.save(state, {"batches": 0}, stretch + 3)
                    blocked = time.perf_counter() - at
            jax.block_until_ready(values)
            saved.wait()
            if stretch < 0:  # compiles, and imports what saving needs
                continue
            kind = "with" if save else "without"
            found.setdefault(kind, []).append(time.perf_counter() - wall)
            found.setdefault(f"cpu {kind}", []).append(time.process_time() - cpu)
            if save:
                found.setdefault("blocked", []).append(blocked)
    megabytes = sum(a.nbytes for a in jax.tree.leaves(state)) / 1e6
    return {k: statistics.median(v) for k, v in found.items()} | {"megabytes": megabytes}


def restoring(folder: pathlib.Path, megabytes: int, rounds: int) -> tuple[float, float, float, int]:
    """The best of `rounds`: GB/s of reading the files and of restoring, CPU seconds a GB; bytes."""
    leaves = 32
    draw = lambda i: jax.random.normal(jax.random.key(i), (megabytes * 2**18 // leaves // 64, 64))
    state = {"params": {f"w{i}": draw(i) for i in range(leaves)}}
    with checkpoints.opened(folder) as saved:
        saved.save(state, {}, 1)
    files = [f for f in folder.rglob("*") if f.is_file()]
    size = sum(f.stat().st_size for f in files)

    def read() -> None:
        buffer = bytearray(2**22)
        for file in files:
            with file.open("rb", buffering=0) as f:
                while f.readinto(buffer):
                    pass

    def restore() -> None:
        with checkpoints.opened(folder, write=False) as saved:
            jax.block_until_ready(saved.restore(state).state)

    best, busy = {read: float("inf"), restore: float("inf")}, float("inf")
    for _ in range(rounds + 1):  # the first one imports, and is not the best
        for run in best:
            for file in files:
                forget(file)
            began, cpu = time.perf_counter(), time.process_time()
            run()
            best[run] = min(best[run], time.perf_counter() - began)
        busy = min(busy, time.process_time() - cpu)
    return size / best[read] / 1e9, size / best[restore] / 1e9, busy / size * 1e9, size


def forget(file: pathlib.Path) -> None:
    """Throws a file out of the page cache."""
    fd = os.open(file, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--every", type=int, default=100, help="steps between saves (default 100)")
    p.add_argument("--rounds", type=int, default=5, help="repetitions (default 5)")
    p.add_argument("--megabytes", type=int, default=1024, help="of what is restored (default 1024)")
    p.add_argument("--folder", type=pathlib.Path, help="on the disk to measure (default: $TMPDIR)")
    p.add_argument(
        "--quick",
        action="store_true",
        help="a small network and state: it runs, figures mean nothing",
    )
    a = p.parse_args()
    every, rounds, megabytes = (10, 1, 32) if a.quick else (a.every, a.rounds, a.megabytes)
    size = (32, 1, 16) if a.quick else (192, 6, 64)
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        s = saving(pathlib.Path(folder) / "saving", every, rounds, *size)
        disk, restored, busy, total = restoring(
            pathlib.Path(folder) / "restoring", megabytes, rounds
        )
    cost, cpu = s["with"] / s["without"] - 1, s["cpu with"] / s["cpu without"] - 1
    told = f"{s['megabytes']:.0f} MB every {every} steps ({s['without']:.2f} s)"
    timing.table(
        "Checkpoints",
        [
            (f"saving {told}: the loop's time", f"{cost:+.1%}", "+2%", timing.verdict(cost, 0.02)),
            ("  blocked in save()", f"{s['blocked'] / s['without']:.2%}, "
             f"{1000 * s['blocked']:.0f} ms", "", ""),
            ("  the processor's time", f"{cpu:+.1%}", "", ""),
            (f"reading {total / 1e6:,.0f} MB from the disk", f"{disk:.2f} GB/s", "", ""),
            ("restoring it, checksums compared", f"{restored:.2f} GB/s, {restored / disk:.0%}",
             "50%", timing.verdict(restored / disk, 0.5, at_least=True)),
            ("  the processor's time", f"{busy:.2f} s a GB", "", ""),
            ("others on this machine (load)", f"{os.getloadavg()[0]:.1f}", "", ""),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
