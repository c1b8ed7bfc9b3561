"""Guidance on three Gaussians: where guided samples go, and that this is not the tilted density.

    python experiments/guidance_mixture.py            # and docs/images/guidance_mixture.png
    python experiments/guidance_mixture.py --quick    # the numbers alone, from fewer samples

Figure 2 of Ho and Salimans 2022 (2207.12598) with nothing trained: the exact denoiser of a mixture
whose components are the classes, guided and sampled. At each noise level guidance gives the score
of p_t(x) p_t(c | x)^w, and it is often said to sample p(x) p(c | x)^w. But those densities are not
noised versions of one another, so it does not (w = 0 and 1 apart): the contours are that density by
quadrature, and its distance from the samples is printed beside what chance alone explains.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import denoisers, grids, guidance, sample, schedules, solvers

ANGLES = np.pi / 2 + np.arange(3) * 2 * np.pi / 3
MEANS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)  # class 0 points up
STD = 0.5
SCALES = (1.0, 2.0, 4.0, 8.0)  # w = 1 + the paper's
LIMIT, CELLS = 4.0, 80  # the square [-4, 4]^2, in cells of 0.1
COLOURS = np.array([[0.12, 0.47, 0.71], [0.84, 0.37, 0.0], [0.17, 0.55, 0.25]])


def draw(w: float, per_class: int, steps: int) -> np.ndarray:
    """Guided samples `[3, per_class, 2]`, of each class."""
    schedule = schedules.edm(sigma_max=500.0)  # the means' share in the first x is 1 / 500
    mixture = denoisers.mixture(
        jnp.asarray(MEANS, jnp.float32), STD**2, schedule, labels=np.arange(3)
    )
    guided = guidance.cfg(mixture, jnp.asarray(w), null={"label": 3})
    labels = jnp.repeat(jnp.arange(3), per_class)
    x = sample(
        jax.random.key(0), guided, shape=(2,), cond={"label": labels}, solver=solvers.heun(),
        times=grids.karras(schedule, steps),
    )  # fmt: skip
    return np.asarray(x).reshape(3, per_class, 2)


def cells(fine: int = 1) -> np.ndarray:
    """The centres of the square's cells `[n, n, 2]`, each cut in fine x fine."""
    n = CELLS * fine
    line = (np.arange(n) + 0.5) / n * 2 * LIMIT - LIMIT
    return np.stack(np.meshgrid(line, line, indexing="ij"), -1)


def tilted(w: float, points: np.ndarray, label: int = 0) -> np.ndarray:
    """p(x) p(c | x)^w ~ p(x | c)^w p(x)^(1 - w), normalised over the points `[..., 2]`."""
    log_each = -0.5 * np.sum((points[..., None, :] - MEANS) ** 2, -1) / STD**2
    log_all = np.logaddexp.reduce(log_each, axis=-1)
    log_p = w * log_each[..., label] + (1 - w) * log_all
    p = np.exp(log_p - log_p.max())
    return p / p.sum()


def moments(points: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """Class 0: its mean along its own direction, and the deviations along and across it."""
    y, x = points[..., 1], points[..., 0]  # class 0 points up
    mean = (weights * y).sum()
    return mean, np.sqrt((weights * (y - mean) ** 2).sum()), np.sqrt((weights * x**2).sum())


def histogram(x: np.ndarray) -> np.ndarray:
    """The share of the samples `[n, 2]` in each cell `[CELLS, CELLS]`."""
    edges = np.linspace(-LIMIT, LIMIT, CELLS + 1)
    return np.histogram2d(x[:, 0], x[:, 1], bins=(edges, edges))[0] / len(x)


def coarse(p: np.ndarray, by: int) -> np.ndarray:
    """Sums blocks of by x by."""
    n = len(p) // by
    return p.reshape(n, by, n, by).sum((1, 3))


def distance(p: np.ndarray, q: np.ndarray) -> float:
    """Total variation between two distributions over cells, in blocks of 0.2."""
    return 0.5 * float(np.abs(coarse(p, 2) - coarse(q, 2)).sum())


def row(w: float, x: np.ndarray) -> list[float]:
    """What is printed of class 0: moments of samples and of the tilted density, and distances."""
    fine = cells(4)
    density = tilted(w, fine)
    exact = coarse(density, 4)
    ideal = np.random.default_rng(0).multinomial(len(x), exact.ravel()).reshape(exact.shape)
    sampled = moments(x, np.full(len(x), 1 / len(x)))
    gap = distance(histogram(x), exact), distance(ideal / len(x), exact)
    return [w, *sampled, *moments(fine, density), *gap]


def table(rows: list[list[float]]) -> str:
    """Markdown."""
    head = (
        "w | samples: mean | along | across | tilted: mean | along | across | distance | by chance"
    )
    lines = [f"| {head} |", "|---" * 9 + "|"]
    for w, *values in rows:
        lines.append(f"| {w:g} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
    return "\n".join(lines)


def picture(samples: dict[float, np.ndarray], out: pathlib.Path) -> None:
    """One panel a scale: the samples' density in colour, half and nine tenths of the tilted one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(samples), figsize=(3.1 * len(samples), 3.5), sharey=True)
    line = cells(2)[:, 0, 0]
    for axis, (w, x) in zip(axes, samples.items()):
        image = np.ones((CELLS, CELLS, 3))
        for label in range(3):
            share = histogram(x[label])
            ink = np.minimum(1.0, (share / share.max()) ** 0.6)[..., None]
            image *= 1 - ink * (1 - COLOURS[label])
            p = tilted(w, cells(2), label)
            mass = np.sort(p.ravel())
            inside = np.cumsum(mass)  # the density below which this much of the mass lies
            levels = [mass[np.searchsorted(inside, tail)] for tail in (0.1, 0.5)]
            axis.contour(line, line, p.T, levels, colors="black", linewidths=0.8)
        box = (-LIMIT, LIMIT, -LIMIT, LIMIT)
        axis.imshow(image.swapaxes(0, 1), origin="lower", extent=box, interpolation="bilinear")
        axis.set(title=f"w = {w:g}", xlim=(-3.2, 3.2), ylim=(-2.7, 3.4), xticks=[], yticks=[])
    figure.suptitle(
        "Guided samples (colour) and p(x) p(c|x)$^w$ (contours of 50% and 90% of its mass)",
        y=0.05, fontsize=10,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main(argv: list[str] | None = None) -> list[list[float]]:
    """Draws, prints the table and, unless quick, writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4,000 samples a class, no figure")
    parser.add_argument("--out", type=pathlib.Path, help="where the figure goes")
    args = parser.parse_args(argv)
    per_class, steps = (4_000, 64) if args.quick else (50_000, 128)
    samples = {w: draw(w, per_class, steps) for w in SCALES}
    rows = [row(w, x[0]) for w, x in samples.items()]
    print(table(rows))
    out = args.out
    if out is None and not args.quick:
        out = pathlib.Path(__file__).parents[1] / "docs" / "images" / "guidance_mixture.png"
    if out is not None:
        picture(samples, out)
        print(f"wrote {out}")
    return rows


if __name__ == "__main__":
    main()
