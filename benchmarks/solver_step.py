"""The arithmetic of a solver: one step of DPM-Solver++(2M) with an identity network.

    python benchmarks/solver_step.py

Against diffusers' scheduler on the same batch, machine and threads (at least 2.5 times faster), and
against the same update by hand, a scan over ready coefficients (at most 1.1 times slower). A step's
time is the difference of two runs, one with four times the steps, so that what a call costs once
is a row of its own. Without diffusers and torch (the extra `parity`) their row is left out.
"""

import argparse
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from timing import race, table, verdict

from jdiff import denoisers, grids, sample, schedules, solvers
from jdiff.predictions import parameterization

SCHEDULE = schedules.ddpm_linear()


def ours(x: jax.Array, times: jax.Array):
    """sample() with a network that returns its input as eps."""
    identity = denoisers.network(_same, {}, SCHEDULE, parameterization("eps", "step"))
    key, solver = jax.random.key(0), solvers.dpmpp_2m()
    return lambda: sample(key, identity, x=x, times=times, solver=solver)


def _same(params, x, t, cond, key):
    return x


def by_hand(x: jax.Array, times: jax.Array):
    """The same numbers from a scan whose body is the update and nothing else."""
    alpha, sigma = (np.asarray(f(times), np.float64) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    rows, h_last = [], None
    for i in range(len(times) - 1):
        a, s, a_next, s_next = alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]
        last = s_next == 0
        h = math.inf if last else math.log(a_next / s_next) - math.log(a / s)
        slope = 0.0 if last or h_last is None else 0.5 * h / h_last
        rows.append((1 / a, s / a, s_next / s, -a_next * math.expm1(-h), slope))
        h_last = h
    table_ = jnp.asarray(np.array(rows), jnp.float32)

    @jax.jit
    def run(x):
        def body(carry, row):
            x, x0_last = carry
            a_inv, ratio, keep, gain, slope = row
            x0 = a_inv * x - ratio * x  # eps = x
            return (keep * x + gain * (x0 + slope * (x0 - x0_last)), x0), None

        return jax.lax.scan(body, (x, jnp.zeros_like(x)), table_)[0][0]

    return lambda: run(x)


def theirs(x: np.ndarray, steps: int):
    """diffusers' DPMSolverMultistepScheduler and its grid, in our times; or None."""
    try:
        import torch
        from diffusers import DPMSolverMultistepScheduler
    except ImportError:
        return None, grids.linspace(SCHEDULE, steps)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="linear", solver_order=2, final_sigmas_type="zero", lower_order_final=True
    )
    start = torch.from_numpy(x)

    def run():
        scheduler.set_timesteps(steps)
        y = start
        with torch.no_grad():
            for t in scheduler.timesteps:
                y = scheduler.step(y, t, y).prev_sample
        return y.numpy()

    scheduler.set_timesteps(steps)
    return run, jnp.asarray([*(scheduler.timesteps.numpy() + 1), 0], jnp.float32)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--batch", type=int, default=64, help="images of 64 x 64 x 3 (default 64)")
    p.add_argument(
        "--steps", type=int, default=20, help="steps, and four times as many (default 20)"
    )
    p.add_argument("--rounds", type=int, default=7, help="repetitions, the best counts (default 7)")
    a = p.parse_args()
    x = np.random.default_rng(0).normal(size=(a.batch, 64, 64, 3)).astype(np.float32)
    rivals = {}
    for steps in (a.steps, 4 * a.steps):
        peer, times = theirs(x, steps)
        run, hand = ours(jnp.asarray(x), times), by_hand(jnp.asarray(x), times)
        np.testing.assert_allclose(run(), hand(), rtol=2e-3, atol=2e-4)
        if peer is not None:  # the same grid, so the same numbers: the race is fair
            np.testing.assert_allclose(run(), peer(), rtol=2e-2, atol=2e-3)
            rivals["diffusers", steps] = peer
        rivals |= {("jdiff", steps): run, ("by hand", steps): hand}
    seconds = race(rivals, a.rounds)
    few, many = a.steps, 4 * a.steps
    step = {who: (seconds[who, many] - seconds[who, few]) / (many - few) for who, _ in rivals}
    ms = {who: 1e3 * s for who, s in step.items()}
    call = 1e3 * seconds["jdiff", few] - few * ms["jdiff"]
    ratio = step["jdiff"] / step["by hand"]
    rows = [(f"sample / by hand ({ms['jdiff']:.3f} / {ms['by hand']:.3f} ms a step)",
             f"{ratio:.3f}", "1.1", verdict(ratio, 1.1)),
            ("a call of sample() beside its steps, ms", f"{call:.2f}", "", "")]  # fmt: skip
    if peer is not None:
        gain = step["diffusers"] / step["jdiff"]
        rows.append((f"diffusers / sample ({ms['diffusers']:.2f} ms a step)",
                     f"{gain:.2f}", "at least 2.5", verdict(gain, 2.5, at_least=True)))  # fmt: skip
    table(f"one step of dpmpp_2m, {a.batch} x 64 x 64 x 3, identity network", rows)


if __name__ == "__main__":
    main()
