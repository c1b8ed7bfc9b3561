"""Inpainting and super-resolution of digits with an exact denoiser: how right is each guidance?

    python experiments/inverse_digits.py            # the table, and docs/images/inverse.png
    python experiments/inverse_digits.py --quick    # fewer draws and steps, no figure

The prior is the digits' training set, each image blurred by a little normal noise, so both the
denoiser and the posterior given y = A x0 + noise are known in closed form. Test digits are
measured, and each method's draws are compared with that posterior: its mean, its spread, and how
well y is met. Nothing is trained, so every error is the method's or the solver's.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

from jdiff import denoisers, grids, guidance, operators, pictures, sample, schedules, solvers
from jdiff.data import digits

STD, NOISE = 0.1, 0.1  # of the prior's images and of y
SHOWN = 6


def tasks() -> dict:
    """The operators, by name."""
    keep = np.ones((8, 8, 1))
    keep[4:] = 0  # the lower half is not known
    return {
        "inpaint": operators.mask(keep),
        "4 x 4 -> 8 x 8": operators.average_pool(2, (8, 8)),
        "2 x 2 -> 8 x 8": operators.average_pool(4, (8, 8)),
    }


def posterior(operator, images: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[8, 8, 1]` and mean variance an entry of x0 given y, in numpy float64."""
    n, shape = images[0].size, images.shape[1:]
    a = np.asarray(operator(jnp.eye(n).reshape(n, *shape)), np.float64).reshape(n, -1).T
    a = a[np.abs(a).sum(1) > 0]  # a mask's unknown pixels are not measured
    y = y.ravel() if len(a) == y.size else y[:4].ravel()
    m = images.reshape(len(images), n).astype(np.float64)
    gram = STD**2 * a @ a.T + NOISE**2 * np.eye(len(a))
    gap = y - m @ a.T
    log_w = -0.5 * np.sum(gap * np.linalg.solve(gram, gap.T).T, 1)
    w = np.exp(log_w - logsumexp(log_w))
    gain = STD**2 * a.T @ np.linalg.inv(gram)
    means = m + gap @ gain.T
    mean = w @ means
    within = STD**2 * np.trace(np.eye(n) - gain @ a)
    return mean.reshape(shape), (within + w @ np.sum((means - mean) ** 2, 1)) / n


def methods(name: str, operator, denoise, variance: float, steps: int) -> dict:
    """(denoiser, solver, times) by name."""
    schedule = denoise.schedule
    times = grids.uniform_logsnr(schedule, steps)
    ddpm = solvers.ddpm()
    table = {
        "DPS": (guidance.dps(denoise, operator, 30.0), ddpm, times),
        "PiGDM": (
            guidance.pigdm(denoise, operator, NOISE, variance=variance), ddpm, times
        ),
        "DDNM": (guidance.ddnm(denoise, operator), ddpm, times),
        "DDNM+": (denoise, solvers.ddnm(operator, NOISE), times),
    }  # fmt: skip
    if name == "inpaint":
        coarse = grids.uniform_logsnr(schedule, max(steps // 4, 2))
        table["RePaint"] = (denoise, solvers.repaint(operator.keep, resample=5, jump=4), coarse)
    return table


def main() -> None:
    """Prints the table and writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    draws, steps = (8, 10) if quick else (16, 50)

    data = digits.load()
    train, test = (data[split][0] / 127.5 - 1 for split in ("train", "test"))
    denoise = denoisers.mixture(
        jnp.asarray(train, jnp.float32), STD**2, schedules.cosine(), chunk=len(train)
    )
    variance = float(train.var(0).mean()) + STD**2
    truth = jnp.asarray(test[:SHOWN], jnp.float32)
    rows = []
    print("| task | method | mean's error | spread | misfit of y |\n|---|---|---|---|---|")
    for number, (name, operator) in enumerate(tasks().items()):
        y = operator(truth)
        y = y + NOISE * jax.random.normal(jax.random.key(number), y.shape)
        y = operator(y) if name == "inpaint" else y
        exact = [posterior(operator, train, np.asarray(one)) for one in y]
        means, variances = (np.stack(part) for part in zip(*exact))
        plain = float(np.sqrt(np.mean((train.mean(0) - means) ** 2)))
        print(f"| {name} | the prior's mean | {plain:.3f} | | |")
        rows += [truth, operator.pinv(y), means]
        repeated = jnp.repeat(y, draws, 0)
        found = methods(name, operator, denoise, variance, steps)
        for method, (denoiser, solver, times) in found.items():
            x = sample(
                jax.random.key(1), denoiser, shape=(8, 8, 1), cond={"y": repeated},
                solver=solver, times=times, batch=96,
            )  # fmt: skip
            known = np.asarray(operator(jnp.ones_like(x))) != 0
            misfit = np.sqrt(np.mean(np.square(operator(x) - repeated)[known]))
            x = np.asarray(x).reshape(SHOWN, draws, 8, 8, 1)
            error = np.sqrt(np.mean((x.mean(1) - means) ** 2))
            spread = np.sqrt(x.var(1).mean() * draws / (draws - 1) / variances.mean())
            print(f"| {name} | {method} | {error:.3f} | {spread:.2f} | {misfit:.3f} |", flush=True)
            rows.append(x[:, 0])
        chance = np.sqrt(variances.mean() / draws)
        print(f"| {name} | exact draws | {chance:.3f} | 1.00 | {NOISE:.3f} |")
    if quick:
        return
    labels = ["truth", "pinv(y)", "E[x0|y]", "DPS", "PiGDM", "DDNM", "DDNM+", "RePaint"]
    blocks = [labels, labels[:-1], labels[:-1]]
    picture = figure(rows, [label for block in blocks for label in block])
    path = pathlib.Path(__file__).parents[1] / "docs" / "images" / "inverse.png"
    print("written:", pictures.save(path, picture))


def figure(rows: list, labels: list[str]) -> np.ndarray:
    """One column a row of images, three blocks below one another."""
    cells, captions, at = [], [], 0
    for width in (8, 7, 7):
        block = rows[at : at + width]
        for i in range(SHOWN // 2):
            for label, images in zip(labels[at : at + width], block):
                cells.append(np.asarray(images[i]))
                captions.append(label if i == SHOWN // 2 - 1 else "")
            if width == 7:
                cells.append(np.ones((8, 8, 1)))
                captions.append("")
        at += width
    return pictures.grid(np.stack(cells), columns=8, captions=captions)


if __name__ == "__main__":
    main()
