"""A sweep of 32 points (guidance scale x churn) in one program, against 32 calls.

    python benchmarks/sweep.py

Against calls that each compile, as where the scale is a constant of the program: at least 5 times
faster, compilation of the sweep included. Against the same calls once compiled: not slower.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from timing import race, table, verdict

import jdiff
from jdiff import denoisers, grids, guidance, models, sample, schedules, solvers
from jdiff.predictions import parameterization

SCALES, CHURNS = np.linspace(0.0, 4.0, 8), [0.0, 2.0, 5.0, 10.0]


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--images", type=int, default=8, help="images a point (default 8)")
    p.add_argument("--chunk", type=int, default=8, help="points at a time (default 8)")
    p.add_argument("--rounds", type=int, default=5, help="repetitions, the best counts (default 5)")
    p.add_argument(
        "--calls", type=int, default=32, help="calls that compile; their time is scaled up to 32"
    )
    a = p.parse_args()
    schedule = schedules.edm()
    build = lambda rngs: models.DiT(
        in_channels=1, patch=2, width=96, depth=4, heads=3, num_classes=10, rngs=rngs
    )
    apply, params = models.init(build, jax.random.key(0))
    denoise = denoisers.network(apply, params, schedule, parameterization("edm"))
    times, cond = grids.karras(schedule, 10), {"label": jnp.arange(a.images) % 10}
    rest = dict(
        key=jax.random.key(1), times=times, shape=(8, 8, 1), num=a.images, cond=cond
    )  # fmt: skip
    points = [(w, c) for w in SCALES for c in CHURNS]

    def swept():
        guided = [guidance.cfg(denoise, float(w), {"label": 10}) for w in SCALES]
        churned = [solvers.edm(churn) for churn in CHURNS]
        return jdiff.sweep(
            sample, {"denoiser": guided, "solver": churned}, fixed=rest, chunk=a.chunk
        ).result

    def called(w: float, churn: float):
        guided = guidance.cfg(denoise, float(w), {"label": 10})
        return sample(denoiser=guided, solver=solvers.edm(churn), **rest)

    def compiled_anew(w: float, churn: float):
        return jax.jit(lambda: called(w, churn))()  # the numbers are constants: a program each

    start = time.perf_counter()
    result = jax.block_until_ready(swept())
    first = time.perf_counter() - start
    start = time.perf_counter()
    for w, churn in points[: a.calls]:
        jax.block_until_ready(compiled_anew(w, churn))
    each = (time.perf_counter() - start) * len(points) / a.calls
    alone = np.stack([called(w, churn) for w, churn in points])
    np.testing.assert_allclose(result.reshape(alone.shape), alone, rtol=1e-2, atol=1e-3)

    seconds = race({"sweep": swept, "calls": lambda: [called(*p) for p in points]}, a.rounds)
    gain, ratio = each / first, seconds["sweep"] / seconds["calls"]
    table(
        "32 points: guidance scale x churn",
        [
            (f"calls that compile / sweep and its compilation ({each:.1f} / {first:.1f} s)",
             f"{gain:.1f}", "at least 5", verdict(gain, 5.0, at_least=True)),
            (f"sweep / compiled calls ({1e3 * seconds['sweep']:.0f} / "
             f"{1e3 * seconds['calls']:.0f} ms)", f"{ratio:.2f}", "1", verdict(ratio, 1.0)),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
