"""What a cascade costs over its stages: time and memory.

    python benchmarks/cascade.py                  # --quick: two tiny stages, one round

Three U-Nets, 16 -> 32 -> 64 pixels, with Gaussian conditioning augmentation, draw a few batches.
Time: the cascade over the sum of its stages' own `sample()`, each given its input (limit 1.03).
Memory: the cascade's peak over that of its largest stage alone and one batch of every stage's
images (limit 1.03), beyond what is there before: weights, programs. On CPU it is resident memory
(Linux), on an accelerator what jax allocates there.
"""

import argparse
import gc
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from timing import race, table, verdict

from jdiff import denoisers, grids, models, predictions, sample, schedules, solvers
from jdiff.cascades import Cascade, augmentations, cascade, low_res, stage

KEY = jax.random.key(0)


def made(sizes: list[int], channels: int, multipliers: tuple[int, ...], steps: int) -> Cascade:
    """U-Nets with random weights; each stage doubles (or more) the size of the one before."""
    schedule, row = schedules.cosine(), predictions.parameterization("v", "logsnr")
    stages = []
    for before, size in zip([None, *sizes], sizes):
        low = before and low_res(size // before, augmentations.gaussian(schedule))
        told = {"low_res_channels": 3, "scalars": ("aug_level",)} if before else {}
        build = lambda rngs, size=size, told=told: models.UNet(
            image_size=size, channels=channels, multipliers=multipliers, blocks=1,
            attention_sizes=(size // 4,), **told, rngs=rngs,
        )  # fmt: skip
        apply, params = models.init(build, jax.random.fold_in(KEY, size))
        stages.append(
            stage(
                denoisers.network(apply, params, schedule, row), shape=(size, size, 3),
                times=grids.uniform(schedule, steps), solver=solvers.ddim(), low_res=low,
                level=0.3 if before else None,
            )
        )  # fmt: skip
    return cascade(*stages)


def alone(c: Cascade, images: list, k: int, num: int, batch: int) -> jax.Array:
    """Stage k by itself, by `sample()`, its input given."""
    s, cond = c.stages[k], None
    if k:
        cond = {"low_res": images[k - 1][:num], "aug_level": jnp.full(num, s.level)}
    return sample(
        jax.random.fold_in(KEY, k), s.denoiser, times=s.times, shape=s.shape, num=num,
        cond=cond, solver=s.solver, batch=batch,
    )  # fmt: skip


def streamed(c: Cascade, num: int, batch: int) -> None:
    """Every batch is drawn, copied to the host and forgotten."""
    for images in c.stream(KEY, num=num, batch=batch):
        np.asarray(images)


def resident(name: str) -> int:
    """Bytes: now ("VmRSS") or at the peak ("VmHWM")."""
    text = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", text)[1])


def peaks(rivals: dict) -> dict[str, int]:
    """Bytes that each rival takes at its peak, beyond those that are there before; in order."""
    found = {}
    for name, run in rivals.items():
        jax.block_until_ready(run())  # compiles
        gc.collect()
        if jax.devices()[0].platform == "cpu":
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = resident("VmRSS")
            jax.block_until_ready(run())
            found[name] = resident("VmHWM") - before
        else:  # a peak never falls: the first rival's bounds the second's
            memory = jax.devices()[0].memory_stats()
            found[name] = memory["peak_bytes_in_use"] - memory["bytes_in_use"]
    return found


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true")
    p.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64])
    p.add_argument("--channels", type=int, default=32)
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--batches", type=int, default=3)
    p.add_argument("--rounds", type=int, default=5, help="repetitions, the best counts (default 5)")
    a = p.parse_args()
    multipliers = (1, 2, 2)
    if a.quick:
        a.sizes, a.channels, a.steps, a.batch, a.batches, a.rounds = [8, 16], 8, 2, 2, 2, 1
        multipliers = (1,)
    c, num = made(a.sizes, a.channels, multipliers, a.steps), a.batch * a.batches
    images = c.sample(KEY, num=num, batch=a.batch, intermediate=True)

    last = len(a.sizes) - 1  # the largest
    memory = peaks({
        "stage": lambda: alone(c, images, last, a.batch, a.batch),
        "cascade": lambda: streamed(c, num, a.batch),
    })  # fmt: skip
    batch = sum(i[: a.batch].nbytes for i in images)
    allowed = memory["stage"] + batch

    def apart() -> None:  # as long as the cascade, so that both meet the same load
        for k in range(len(a.sizes)):
            jax.block_until_ready(alone(c, images, k, num, a.batch))

    whole = lambda: c.sample(KEY, num=num, batch=a.batch)
    seconds = race({"stages": apart, "cascade": whole}, a.rounds)
    time, space = seconds["cascade"] / seconds["stages"], memory["cascade"] / allowed
    told = memory["stage"] > 2**24  # the resident memory of a process is known to a few pages
    mib = lambda n: f"{n / 2**20:,.1f}"
    table(
        f"cascade {' -> '.join(map(str, a.sizes))}, {num} images in batches of {a.batch}",
        [
            (f"time over the stages' own ({seconds['cascade']:.2f} / {seconds['stages']:.2f} s)",
             f"{time:.3f}", "1.03", verdict(time, 1.03)),
            (f"peak over the largest stage and a batch ({mib(memory['cascade'])} / "
             f"{mib(memory['stage'])} + {mib(batch)} MiB)",
             f"{space:.3f}", "1.03", verdict(space, 1.03) if told else "too small to tell"),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
