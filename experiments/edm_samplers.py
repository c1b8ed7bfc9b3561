"""Every solver and grid on real images with the exact denoiser: error against evaluations.

    python experiments/edm_samplers.py            # tables and docs/images/edm_samplers.png
    python experiments/edm_samplers.py --quick    # a few solvers, no picture
    python experiments/edm_samplers.py --data=cifar10 --samples=16 --images=500

Karras et al. 2022 measure samplers by FID through a trained network (tables 2 to 4). Here nothing
is trained: the images, each with Gaussian noise of deviation 0.1 so that the ODE's map is smooth,
have an exact denoiser, and a deterministic sampler's error is its distance from the ODE's own
answer from the same noise. Stochastic samplers are measured by the Frechet distance of their pixels
to the data. (CIFAR-10 is made by `jdiff prepare cifar10`.)
"""

import argparse
import math
import pathlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import denoisers, grids, presets, sample, schedules, solvers

NOISE = 0.1  # deviation of the Gaussian around each image
BUDGETS = (9, 18, 36, 72, 144)  # evaluations
EDM = schedules.edm()
#: Deterministic, in the order of the table: one evaluation a step first.
ODE = (
    "euler", "gradient_estimation", "dpmpp_2m", "dpm_solver_2m", "res_multistep", "lms", "ipndm",
    "deis", "dpmpp_3m_published", "dpmpp_3m", "unipc", "heun", "midpoint", "dpm_2", "dpmpp_2s",
    "exp_heun", "res_singlestep", "dpm_solver", "pndm", "rk4",
)  # fmt: skip
SDE = {
    "ddpm": solvers.ddpm,
    "euler_ancestral": solvers.euler_ancestral,
    "euler_maruyama": solvers.euler_maruyama,
    "edm, churn 10": lambda: solvers.edm(10.0),
    "edm, churn 40": lambda: solvers.edm(40.0),
    "dpmpp_2s_ancestral": solvers.dpmpp_2s_ancestral,
    "dpmpp_sde": solvers.dpmpp_sde,
    "dpmpp_2m_sde": solvers.dpmpp_2m_sde,
    "dpmpp_3m_sde": solvers.dpmpp_3m_sde,
    "seeds_2": solvers.seeds_2,
    "er_sde": solvers.er_sde,
    "sa_solver": solvers.sa_solver,
}
GRIDS: dict[str, Callable[[int], jax.Array]] = {
    "karras, rho 7": lambda n: grids.karras(EDM, n),
    "karras, rho 3": lambda n: grids.karras(EDM, n, rho=3.0),
    "uniform in log sigma": lambda n: grids.uniform_logsnr(EDM, n),
    "uniform in sigma": lambda n: grids.uniform(EDM, n, last=0.002),
    "polyexponential, rho 0.7": lambda n: grids.polyexponential(EDM, n, rho=0.7),
    "kl_optimal": lambda n: grids.kl_optimal(EDM, n),
}


class Images:
    """Real images, their exact denoiser on any schedule, and the noise that samples start from."""

    def __init__(self, name: str, most: int, samples: int):
        from jdiff.data import sources

        source = sources.source(name, "train")
        rows = np.stack([source[i]["image"] for i in range(min(len(source), most))])
        self.data = rows.astype(np.float32) / 127.5 - 1.0
        self.z = jax.random.normal(jax.random.key(0), (samples, *self.data.shape[1:]))
        self.size = self.data[0].size

    def denoiser(self, schedule: schedules.Schedule) -> denoisers.Mixture:
        """Of the images with their noise."""
        return denoisers.mixture(jnp.asarray(self.data), NOISE**2, schedule, chunk=256)

    def solve(self, schedule: Any, solver: Any, times: jax.Array) -> np.ndarray:
        """Samples `[B, ...]` from the same noise whatever the sampler."""
        x = schedule.sigma(times[0]) * self.z
        key = jax.random.key(1)
        return np.asarray(
            sample(key, self.denoiser(schedule), x=x, times=times, solver=solver)
        )  # fmt: skip

    def error(self, a: np.ndarray, b: np.ndarray) -> float:
        """The root mean square over pixels, averaged over samples."""
        return float(np.sqrt(np.square(a - b).reshape(len(a), -1).mean(1)).mean())

    def frechet(self, x: np.ndarray) -> float:
        """Between the pixels of samples and of the data with their noise."""
        mean, cov = x.reshape(len(x), -1).mean(0), np.cov(x.reshape(len(x), -1).T)
        flat = self.data.reshape(len(self.data), -1).astype(np.float64)
        true_mean = flat.mean(0)
        true_cov = np.cov(flat.T, bias=True) + NOISE**2 * np.eye(self.size)
        values = np.linalg.eigvals(cov @ true_cov).real
        cross = np.sqrt(np.maximum(values, 0.0)).sum()
        return float(np.square(mean - true_mean).sum() + np.trace(cov + true_cov) - 2 * cross)


def steps_for(solver: Any, budget: int) -> int | None:
    """The most steps that cost at most so many evaluations."""
    fitting = [n for n in range(2, budget + 2) if solver.count(n) <= budget]
    return max(fitting, default=None)


def reference(images: Images, schedule: Any, high: float, low: float) -> np.ndarray:
    """The ODE's answer: third order in log sigma, ten times the steps of the largest budget."""
    sigmas = jnp.geomspace(high, low, 1440)
    times = jnp.append(schedule.time(-2.0 * jnp.log(sigmas)), schedule.t_data)
    return images.solve(schedule, solvers.dpmpp_3m(), times)


def deterministic(images: Images, names: Iterable[str]) -> dict[str, list[float]]:
    """Errors of solvers on EDM's schedule and grid."""
    truth = reference(images, EDM, 80.0, 0.002)
    found = {}
    for name in names:
        solver = solvers.BY_NAME[name]()
        found[name] = [
            math.nan if (n := steps_for(solver, b)) is None
            else images.error(images.solve(EDM, solver, grids.karras(EDM, n)), truth)
            for b in BUDGETS
        ]  # fmt: skip
        say(name, found[name])
    return found


def by_grid(images: Images, names: Iterable[str] = ("heun", "dpmpp_2m")) -> dict[str, list[float]]:
    """Errors of two solvers over grids."""
    truth = reference(images, EDM, 80.0, 0.002)
    found = {}
    for name in names:
        for label, grid in GRIDS.items():
            solver = solvers.BY_NAME[name]()
            row = [
                images.error(images.solve(EDM, solver, grid(steps_for(solver, b))), truth)
                for b in BUDGETS
            ]
            found[f"{name}, {label}"] = row
            say(f"{name}, {label}", row)
    return found


def ladder(images: Images, names: Iterable[str] = ("vp", "ve", "iddpm")) -> dict[str, list[float]]:
    """Table 3's rows: each framework's own sampler, Heun and EDM's levels, EDM's schedule."""
    found = {}
    for name in names:
        p = presets.BY_NAME[name]()
        high, low = (float(p.schedule.sigma_ratio(p.grid(10)[i])) for i in (0, -2))
        truth = reference(images, p.schedule, high, low)
        first, last = (p.schedule.time(-2 * jnp.log(level)) for level in (high, low))
        karras = partial(grids.karras, p.schedule, first=first, last=last)
        straight = schedules.edm(low, high)  # sigma = t, s = 1: the same ODE in x / alpha
        rungs = {
            "as published": (p.schedule, p.solver, p.grid),
            "Heun and EDM's levels": (p.schedule, solvers.heun(), karras),
            "and sigma(t) = t": (straight, solvers.heun(), partial(grids.karras, straight)),
        }
        if name == "iddpm":  # a table has no derivative in t: Heun in sigma, which is the last rung
            del rungs["Heun and EDM's levels"]
        for label, (schedule, solver, grid) in rungs.items():
            answers = (images.solve(schedule, solver, grid(steps_for(solver, b))) for b in BUDGETS)
            found[f"{name}: {label}"] = [images.error(x, truth) for x in answers]
            say(f"{name}: {label}", found[f"{name}: {label}"])
    return found


def stochastic(images: Images, names: Iterable[str]) -> dict[str, list[float]]:
    """Frechet distances, with Heun and the exact distribution for comparison."""
    found = {}
    for name in names:
        solver = solvers.heun() if name == "heun (ODE)" else SDE[name]()
        found[name] = [
            math.nan if (n := steps_for(solver, b)) is None
            else images.frechet(images.solve(EDM, solver, grids.karras(EDM, n)))
            for b in BUDGETS
        ]  # fmt: skip
        say(name, found[name])
    rng = np.random.default_rng(0)
    pick = images.data[rng.integers(len(images.data), size=len(images.z))]
    exact = images.frechet(pick + NOISE * rng.normal(size=pick.shape))
    found["exact samples, as many"] = [exact] * len(BUDGETS)
    return found


def say(name: str, row: list[float]) -> None:
    print(f"  {name:34s}" + "".join(f"{value:10.2g}" for value in row), flush=True)


def markdown(title: str, rows: dict[str, list[float]]) -> str:
    """A table with one column for each budget; the least of a column in bold."""
    table = np.array(list(rows.values()))
    best = np.nanmin(table, axis=0)
    cell = lambda v, b: "" if math.isnan(v) else f"**{v:.2g}**" if v == b else f"{v:.2g}"
    lines = [f"| {title} | " + " | ".join(f"{b}" for b in BUDGETS) + " |"]
    lines += ["|---|" + "---|" * len(BUDGETS)]
    for name, row in rows.items():
        cells = " | ".join(cell(v, b) for v, b in zip(row, best))
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def picture(path: pathlib.Path, panels: dict[str, dict[str, list[float]]]) -> None:
    """One panel a table: error against evaluations, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, math.ceil(len(panels) / 2), figsize=(15, 11), layout="tight")
    colours = plt.get_cmap("tab20").colors
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, rows) in zip(axes.flat, panels.items()):
        for i, (name, row) in enumerate(rows.items()):
            marker = "osv^D"[i % 5]
            axis.plot(BUDGETS, row, marker=marker, ms=4, color=colours[i % 20], label=name)
        axis.set(xscale="log", yscale="log", xlabel="denoiser evaluations", title=title)
        axis.set_xticks(BUDGETS, [str(b) for b in BUDGETS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", default="digits", help="a prepared image set (default digits)")
    p.add_argument("--images", type=int, default=2000, help="of the set, at most (default 2000)")
    p.add_argument("--samples", type=int, default=256, help="for the errors (default 256)")
    p.add_argument(
        "--many", type=int, default=512,
        help="for the distances, with 500 of the images at most (default 512)",
    )  # fmt: skip
    p.add_argument("--out", default="docs/images/edm_samplers.png", help="the picture")
    p.add_argument("--quick", action="store_true", help="a few solvers, no picture")
    a = p.parse_args()

    few = Images(a.data, a.images, 32 if a.quick else a.samples)
    print(f"{a.data}: {len(few.data)} images, {len(few.z)} samples; evaluations {BUDGETS}")
    tables = {"error, EDM's grid": deterministic(few, ("euler", "heun") if a.quick else ODE)}
    if not a.quick:
        tables["error by grid"] = by_grid(few)
    tables["error, table 3's steps"] = ladder(few, ("vp",)) if a.quick else ladder(few)
    if few.size <= 1024:  # the distance needs a covariance
        many = Images(a.data, min(a.images, 500), 128 if a.quick else a.many)
        names = ("edm, churn 40",) if a.quick else ("heun (ODE)", *SDE)
        tables["Frechet distance"] = stochastic(many, names)
    for title, rows in tables.items():
        print("\n" + markdown(title, rows))
    if not a.quick:
        path = pathlib.Path(a.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(path, tables)
        print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
