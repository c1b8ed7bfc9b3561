"""What jdiff's train step costs over a minimal step of the same network written by hand.

    python benchmarks/train_step.py

The rival is the shortest honest jax: EDM's loss, adam, one average, jitted, donated. Limit 1.03.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from timing import race, table, verdict

from jdiff import experiment, models
from jdiff.data.sources import Info
from jdiff.training import step as steps


def by_hand(apply, params, batch_size, optimizer):
    """(step, state) of a loop someone would write for one paper in an afternoon."""

    def loss(params, key, batch):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        x0 = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        label = jnp.where(jax.random.bernoulli(k1, 0.1, (batch_size,)), 10, batch["label"])
        sigma = jnp.exp(-1.2 + 1.2 * jax.random.normal(k2, (batch_size, 1, 1, 1)))
        x = x0 + sigma * jax.random.normal(k3, x0.shape)
        total = sigma**2 + 0.25
        c_skip, c_out, c_in = 0.25 / total, sigma * 0.5 / jnp.sqrt(total), 1 / jnp.sqrt(total)
        c_noise = jnp.log(sigma[:, 0, 0, 0]) / 4
        f = apply(params, c_in * x, c_noise, {"label": label}, k4)
        return jnp.mean(jnp.square(f - (x0 - c_skip * x) / c_out))

    def step(state, batch):
        params, opt, average, count, key = state
        value, grads = jax.value_and_grad(loss)(params, jax.random.fold_in(key, count), batch)
        updates, opt = optimizer.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: 0.999 * a + 0.001 * p, average, params)
        return (params, opt, average, count + 1, key), value

    copy = jax.tree.map(jnp.copy, params)
    state = (copy, optimizer.init(copy), jax.tree.map(jnp.copy, params), 0, jax.random.key(1))
    return jax.jit(step, donate_argnums=0), state


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--batch", type=int, default=64, help="images a step (default 64)")
    p.add_argument("--steps", type=int, default=5, help="steps a measurement (default 5)")
    p.add_argument("--rounds", type=int, default=9, help="repetitions, the best counts (default 9)")
    a = p.parse_args()

    rows = []
    for name, model in {
        "U-Net, 8 x 8": {"name": "unet", "channels": 24, "multipliers": (1, 2), "blocks": 1},
        "DiT, 8 x 8": {"name": "dit", "width": 128, "depth": 6, "heads": 4},
    }.items():
        c = experiment.defaults()
        c.model.update(model)
        c.train.batch_size = a.batch
        exp = experiment.build(c, Info("digits", "train", (8, 8, 1), 10, (), 1437))
        params = exp.init(jax.random.key(0))
        batch = {"image": jnp.zeros((a.batch, 8, 8, 1), jnp.uint8),
                 "label": jnp.arange(a.batch) % 10}  # fmt: skip
        states = {
            "jdiff": steps.start(params, jax.random.key(1), exp.optimizer, exp.averages),
        }
        run = {"jdiff": steps.compile_step(steps.make_step(exp.loss, exp.optimizer, exp.averages))}
        run["by hand"], states["by hand"] = by_hand(exp.apply, params, a.batch, optax.adam(1e-3))

        def advance(which, run=run, states=states, batch=batch):
            for _ in range(a.steps):
                states[which], value = run[which](states[which], batch)
            return value

        rivals = {which: lambda which=which, go=advance: go(which) for which in run}
        seconds = race(rivals, a.rounds)
        ratio = seconds["jdiff"] / seconds["by hand"]
        ms = 1e3 * seconds["jdiff"] / a.steps
        what = f"{name} ({models.count(params) / 1e6:.2f} M, {ms:.1f} ms): jdiff / by hand"
        rows.append((what, f"{ratio:.3f}", "1.03", verdict(ratio, 1.03)))
    table("train step", rows)


if __name__ == "__main__":
    main()
