"""What sample() costs over the network calls it makes.

    python benchmarks/sampling.py

Two figures: a small DiT sampled by Euler's method over the same number of bare jitted calls of the
network (limit 1.05), and the microseconds a step takes with an identity network and a stochastic
solver (limit 5), where all of it is the solver, its noise and the loop.
"""

import argparse

import jax
import jax.numpy as jnp
from timing import race, table, verdict

from jdiff import denoisers, grids, models, predictions, sample, schedules, solvers


def small_dit(batch: int, steps: int, rounds: int) -> float:
    """sample() over `steps` bare calls of the same network: a ratio."""
    build = lambda rngs: models.DiT(
        in_channels=3, patch=2, width=192, depth=6, heads=3, num_classes=10, rngs=rngs
    )
    apply, params = models.init(build, jax.random.key(0))
    row = predictions.parameterization("velocity", "t1000")
    schedule = schedules.rectified_flow()
    denoise = denoisers.network(apply, params, schedule, row)
    times, cond = grids.uniform(schedule, steps), {"label": jnp.arange(batch) % 10}
    bare = jax.jit(apply)
    x, t = jnp.zeros((batch, 32, 32, 3)), jnp.full((batch,), 500.0)

    def calls() -> jax.Array:
        for _ in range(steps):
            out = bare(params, x, t, cond)
        return out

    def sampled() -> jax.Array:
        return sample(
            jax.random.key(1), denoise, shape=(32, 32, 3), num=batch, cond=cond,
            solver=solvers.euler(), times=times,
        )  # fmt: skip

    seconds = race({"calls": calls, "sample": sampled}, rounds)
    return seconds["sample"] / seconds["calls"]


def identity(steps: int, rounds: int) -> float:
    """Microseconds a step with a network that returns its input, and DDPM's stochastic steps."""
    schedule = schedules.vp_linear()
    denoise = denoisers.function(lambda x, t, cond: predictions.Prediction(x, x), schedule)
    key, times = jax.random.key(0), grids.uniform(schedule, steps)
    run = lambda n: sample(
        key, denoise, shape=(8, 8, 1), num=1, solver=solvers.ddpm(), times=times[: n + 1]
    )
    # Two lengths, so that the cost of the call itself drops out.
    seconds = race({"long": lambda: run(steps), "short": lambda: run(steps // 10)}, rounds)
    return 1e6 * (seconds["long"] - seconds["short"]) / (steps - steps // 10)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--batch", type=int, default=16, help="images for the DiT (default 16)")
    p.add_argument("--steps", type=int, default=20, help="solver steps of the DiT (default 20)")
    p.add_argument("--rounds", type=int, default=7, help="repetitions, the best counts (default 7)")
    a = p.parse_args()
    ratio, micro = small_dit(a.batch, a.steps, a.rounds), identity(10_000, a.rounds)
    table(
        "sample()",
        [
            ("small DiT: sample / bare calls", f"{ratio:.3f}", "1.05", verdict(ratio, 1.05)),
            ("identity network: us a step", f"{micro:.2f}", "5", verdict(micro, 5.0)),
        ],
    )


if __name__ == "__main__":
    main()
