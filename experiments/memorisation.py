"""Memorising or generalising: the exact denoiser against a trained one as the training set grows.

    python experiments/memorisation.py            # the table and docs/images/memorisation.png
    python experiments/memorisation.py --quick    # two sizes, few steps, no picture

The minimiser of the denoising loss on N images is their exact denoiser, whose samples are those
images and nothing else. That trained networks draw new ones is what they do not learn of it. Small
digits, EDM's loss, a residual MLP, equal steps for every N (Kadkhodaie et al. 2024 and Yoon et al.
2023 tell of it at scale). Measured on the samples: the distance to the nearest training image; how
many are copies, by Yoon et al.'s rule (nearest training image within a third of the distance of the
second nearest); and the denoising error on images that neither has seen.
"""

import argparse
import math
import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdiff import denoisers, distributions, grids, losses, sample, schedules, solvers
from jdiff.predictions import corrupt, parameterization

SCHEDULE, ROW = schedules.edm(), parameterization("edm", sigma_data=0.75)
SIZES, WIDTH, DEPTH = (16, 64, 256, 1024), 384, 3
SIGMAS = (0.3, 1.0, 3.0)


def init(key: jax.Array, dim: int) -> dict[str, Any]:
    """A residual MLP on the flat image and sinusoids of c_noise."""
    keys = iter(jax.random.split(key, 2 * DEPTH + 2))
    dense = lambda i, o, gain=1.0: {
        "w": gain * jax.random.normal(next(keys), (i, o)) / math.sqrt(i), "b": jnp.zeros(o)
    }  # fmt: skip
    blocks = [{"in": dense(WIDTH, WIDTH), "out": dense(WIDTH, WIDTH, 0.1)} for _ in range(DEPTH)]
    return {"first": dense(dim + 32, WIDTH), "blocks": blocks, "last": dense(WIDTH, dim, 0.0)}


def apply(params: Any, x: jax.Array, t: jax.Array, cond: Any, key: Any = None) -> jax.Array:
    """F `[B, dim]` from c_in x and c_noise."""
    linear = lambda p, h: h @ p["w"] + p["b"]
    angles = t[:, None] * 2.0 ** jnp.arange(16.0) / 4.0
    h = linear(params["first"], jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)], 1))
    for block in params["blocks"]:
        h = h + linear(block["out"], jax.nn.silu(linear(block["in"], jax.nn.silu(h))))
    return linear(params["last"], jax.nn.silu(h))


@partial(jax.jit, static_argnames=("steps", "batch"))
def train(key: jax.Array, images: jax.Array, size: jax.Array, steps: int, batch: int) -> Any:
    """The weights after `steps` steps on the first `size` images."""
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    params = init(key, images.shape[1])
    distribution = distributions.lognormal(-0.8, 1.4, stratified=True)

    def loss(params: Any, key: jax.Array, x0: jax.Array) -> jax.Array:
        net = denoisers.network(apply, params, SCHEDULE, ROW)
        return losses.denoising(key, net, x0, distribution=distribution).mean()

    def step(carry: tuple, i: jax.Array) -> tuple:
        params, state = carry
        key_pick, key_loss = jax.random.split(jax.random.fold_in(key, i))
        x0 = images[jax.random.randint(key_pick, (batch,), 0, size)]
        updates, state = optimizer.update(jax.grad(loss)(params, key_loss, x0), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))[0][0]


def nearest(x: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The root mean square distances to the nearest and second nearest member, `[B]` each."""
    square = np.square(x[:, None] - members[None]).mean(-1)
    first, second = np.sqrt(np.partition(square, 1, axis=1)[:, :2]).T
    return first, second


def measure(denoise: Any, train_set: np.ndarray, held_out: np.ndarray, num: int) -> dict[str, Any]:
    """What the docstring names, and the samples."""
    x = sample(
        jax.random.key(7), denoise, shape=(train_set.shape[1],), num=num, solver=solvers.heun(),
        times=grids.karras(SCHEDULE, 24),
    )  # fmt: skip
    x = np.asarray(x)
    first, second = nearest(x, train_set)
    errors = []
    for i, sigma in enumerate(SIGMAS):
        t = jnp.full(len(held_out), sigma)
        eps = jax.random.normal(jax.random.key(i), held_out.shape)
        x0 = denoise(corrupt(SCHEDULE, jnp.asarray(held_out), eps, t), t, {}).x0
        errors.append(float(jnp.sqrt(jnp.mean(jnp.square(x0 - held_out)))))
    return {
        "samples": x,
        "to training": first.mean(),
        "copies": (first < second / 3).mean(),
        "to held-out": nearest(x, held_out)[0].mean(),
        "errors": errors,
    }


def picture(path: pathlib.Path, rows: dict[tuple[int, str], dict], train_set: np.ndarray) -> None:
    """For each size: trained samples above the training images nearest to them."""
    from jdiff import pictures

    strips = []
    for size in SIZES:
        x = rows[size, "trained"]["samples"][:16]
        square = np.square(x[:, None] - train_set[:size][None]).mean(-1)
        strips += [x, train_set[:size][square.argmin(1)]]
    images = np.concatenate(strips).reshape(-1, 8, 8, 1)
    grid = pictures.grid(np.clip(images, -1, 1), columns=16)
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.save(path, grid)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--steps", type=int, default=6000, help="training steps (default 6000)")
    p.add_argument("--num", type=int, default=512, help="samples (default 512)")
    p.add_argument("--out", default="docs/images/memorisation.png", help="the picture")
    p.add_argument("--quick", action="store_true", help="two sizes, few steps, no picture")
    a = p.parse_args()
    sizes, steps, num = ((16, 1024), 50, 32) if a.quick else (SIZES, a.steps, a.num)

    from sklearn.datasets import load_digits

    images = load_digits().images.reshape(-1, 64).astype(np.float32) / 8 - 1
    images = images[np.random.default_rng(0).permutation(len(images))]
    train_set, held_out = images[:1024], images[1024:]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    many = jax.vmap(lambda key, size: train(key, jnp.asarray(train_set), size, steps, 128))
    trained = many(keys, jnp.asarray(sizes))  # all sizes at once

    print(f"{steps} steps; distances are per pixel, images in [-1, 1]\n")
    between = nearest(held_out, train_set)[0].mean()
    head = " | ".join(f"error at {sigma:g}" for sigma in SIGMAS)
    print(f"| N | denoiser | to training | copies | to held-out | {head} |")
    print("|---|---|---|---|---|" + "---|" * len(SIGMAS))
    rows = {}
    for i, size in enumerate(sizes):
        params = jax.tree.map(lambda w, i=i: w[i], trained)
        for name, denoise in {
            "exact": denoisers.exact(jnp.asarray(train_set[:size]), SCHEDULE),
            "trained": denoisers.network(apply, params, SCHEDULE, ROW),
        }.items():
            m = rows[size, name] = measure(denoise, train_set[:size], held_out, num)
            errors = " | ".join(f"{e:.3f}" for e in m["errors"])
            print(
                f"| {size} | {name} | {m['to training']:.3f} | {100 * m['copies']:.0f} % "
                f"| {m['to held-out']:.3f} | {errors} |", flush=True,
            )  # fmt: skip
    print(f"\nA held-out image is {between:.3f} from its nearest of all 1,024 training images.")
    if not a.quick:
        picture(pathlib.Path(a.out), rows, train_set)
        print(f"wrote {a.out}")


if __name__ == "__main__":
    main()
