"""Flows in the plane: how far from the target samples end, and how far from the shortest path.

    python experiments/toy_flows.py            # the tables, and docs/images/toy_flows.png
    python experiments/toy_flows.py --quick    # a task, two methods and seeds, few steps, no figure

The two-dimensional experiment of the OT-CFM paper (Tong et al. 2024, 2302.00482, table 2) for five
ways to train a flow between two distributions: Lipman's flow matching (FM), independent couplings
(I-CFM), optimal ones (OT-CFM), Schroedinger bridges (SB-CFM) and a second rectified flow (reflow of
I-CFM). All seeds of a method train in one program, by vmap. Beside them torchcfm's own objects, if
it is installed: the same networks and batches, trained by torch and measured by the same sampler
and metrics. A network is measured by

    W2     the 2-Wasserstein distance of its samples to fresh ones of the target, exact for samples
    NPE    |E integral ||v||^2 dt - W2(source, target)^2| / W2(source, target)^2: 0 for the paths of
           optimal transport, which no flow between the two can undercut
"""

import argparse
import functools
import importlib.util
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdiff import couplings, denoisers, interpolants, losses, sample, schedules, solvers
from jdiff.losses.reflow import ends
from jdiff.predictions import endpoint_velocity, parameterization
from jdiff.pytree import Array, PyTree

FLOW = schedules.rectified_flow()  # t = 1 is the source, t = 0 the target
WIDTH, BLUR, BRIDGE = 64, 0.1, 0.5


class Sizes(NamedTuple):
    """How much is trained and measured."""

    seeds: int = 5
    steps: int = 2000
    batch: int = 128
    samples: int = 1024
    grid: int = 100  # Euler steps


# Distributions: (key, n) -> [n, 2].


def normal(key: Array, n: int) -> Array:
    """The standard normal."""
    return jax.random.normal(key, (n, 2))


def gaussians(key: Array, n: int) -> Array:
    """Eight normal modes of variance sqrt(0.1) on a circle of radius 5, as in torchcfm."""
    key_mode, key_noise = jax.random.split(key)
    angle = jax.random.randint(key_mode, (n,), 0, 8) * (jnp.pi / 4)
    centre = 5.0 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)
    return centre + 0.1**0.25 * jax.random.normal(key_noise, (n, 2))


def moons(key: Array, n: int) -> Array:
    """Two half circles with noise 0.2, times 3, minus 1, as in torchcfm."""
    key_angle, key_which, key_noise = jax.random.split(key, 3)
    angle = jnp.pi * jax.random.uniform(key_angle, (n,))
    upper = jax.random.bernoulli(key_which, 0.5, (n,))
    circle = jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)
    points = jnp.where(upper[:, None], circle, jnp.asarray([1.0, 0.5]) - circle)
    return 3.0 * (points + 0.2 * jax.random.normal(key_noise, (n, 2))) - 1.0


def scurve(key: Array, n: int) -> Array:
    """The two informative dimensions of scikit-learn's S curve with noise 0.1, times 2."""
    key_u, key_noise = jax.random.split(key)
    u = 3.0 * jnp.pi * (jax.random.uniform(key_u, (n,)) - 0.5)
    points = jnp.stack([jnp.sin(u), jnp.sign(u) * (jnp.cos(u) - 1.0)], 1)
    return 2.0 * (points + 0.1 * jax.random.normal(key_noise, (n, 2)))


#: source, target
TASKS = {
    "N → 8gaussians": (normal, gaussians),
    "N → moons": (normal, moons),
    "N → scurve": (normal, scurve),
    "8gaussians → moons": (gaussians, moons),
}

#: path and coupling; torchcfm, too, matches its bridges by exact transport unless told otherwise.
METHODS = {
    "FM": (interpolants.target(BLUR), couplings.independent()),
    "I-CFM": (interpolants.straight(BLUR), couplings.independent()),
    "OT-CFM": (interpolants.straight(BLUR), couplings.ot()),
    "SB-CFM": (interpolants.bridge(BRIDGE), couplings.ot()),
}
REFLOW = "reflow"


def init(key: Array) -> list:
    """A perceptron (x, t) -> velocity with three hidden layers, initialised as torch's."""
    sizes = [(3, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, 2)]

    def layer(key: Array, fan_in: int, fan_out: int) -> tuple[Array, Array]:
        draw = lambda key, shape: jax.random.uniform(key, shape, minval=-1, maxval=1)
        key_w, key_b = jax.random.split(key)
        scale = fan_in**-0.5
        return scale * draw(key_w, (fan_in, fan_out)), scale * draw(key_b, (fan_out,))

    return [layer(k, *s) for k, s in zip(jax.random.split(key, len(sizes)), sizes)]


def apply(params: list, x: Array, t: Array, cond: PyTree, key: Array | None) -> Array:
    """The perceptron, SELU between its layers."""
    h = jnp.concatenate([x, t[:, None]], 1)
    for w, b in params[:-1]:
        h = jax.nn.selu(h @ w + b)
    w, b = params[-1]
    return h @ w + b


def network(params: list) -> denoisers.Network:
    """The perceptron as a denoiser."""
    return denoisers.network(apply, params, FLOW, parameterization("velocity"))


Loss = Callable[[list, Array, PyTree], Array]


def fit(key: Array, loss: Loss, batches: PyTree) -> list:
    """Weights after a step of Adam on loss(params, key, batch) for each batch `[steps, ...]`."""
    key_init, key_steps = jax.random.split(key)
    optimizer = optax.adam(1e-3)
    params = init(key_init)

    def step(carry: tuple, inputs: tuple) -> tuple:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, *inputs), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key_steps, len(jax.tree.leaves(batches)[0]))
    return jax.lax.scan(step, (params, optimizer.init(params)), (keys, batches))[0][0]


@jax.jit
def train(keys: Array, path: PyTree, coupling: PyTree, x0: Array, x1: Array) -> list:
    """The weights of all seeds, from batches x0 and x1 `[seeds, steps, batch, 2]`."""

    def loss(params: list, key: Array, batch: tuple[Array, Array]) -> Array:
        key_pair, key_loss = jax.random.split(key)
        x0, x1, _ = coupling(key_pair, *batch)
        return losses.conditional_flow(key_loss, network(params), x0, path=path, eps=x1).mean()

    return jax.vmap(lambda key, *batches: fit(key, loss, batches))(keys, x0, x1)


@functools.partial(jax.jit, static_argnames="sizes")
def train_reflow(keys: Array, teachers: list, x1: Array, sizes: Sizes) -> list:
    """Weights trained on the pairs that each seed's teacher makes of x1's first 64 batches."""

    def one(key: Array, teacher: list, x1: Array) -> list:
        x1 = x1[:64].reshape(-1, 2)
        x0 = ends(key, (network(teacher), solvers.euler(), grid(sizes)), x1)
        rows = jax.random.randint(key, (sizes.steps, sizes.batch), 0, len(x1))

        def loss(params: list, key: Array, rows: Array) -> Array:
            return losses.flow_matching(key, network(params), x0[rows], eps=x1[rows]).mean()

        return fit(key, loss, rows)

    return jax.vmap(one)(keys, teachers, x1)


def train_torchcfm(name: str, x0: Array, x1: Array) -> list:
    """torchcfm's weights for all seeds from the same batches, in our layout.

    Seeds train in one loop: their layers are batched products, their draws torchcfm's, one by one.
    """
    import torch
    from torchcfm import conditional_flow_matching as cfm

    matcher = {
        "FM": lambda: cfm.TargetConditionalFlowMatcher(BLUR),
        "I-CFM": lambda: cfm.ConditionalFlowMatcher(BLUR),
        "OT-CFM": lambda: cfm.ExactOptimalTransportConditionalFlowMatcher(BLUR),
        "SB-CFM": lambda: cfm.SchrodingerBridgeConditionalFlowMatcher(BRIDGE),
    }[name]()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002, its plans are drawn by numpy
    start = jax.vmap(init)(jax.random.split(jax.random.key(1), len(x0)))
    params = [[torch.tensor(np.asarray(a), requires_grad=True) for a in layer] for layer in start]
    optimizer = torch.optim.Adam([a for layer in params for a in layer], lr=1e-3)
    data, other = (torch.tensor(np.asarray(a)) for a in (x0, x1))
    for step in range(x0.shape[1]):
        pairs = zip(other[:, step], data[:, step])
        parts = [matcher.sample_location_and_conditional_flow(*pair) for pair in pairs]
        t, x, u = (torch.stack(p) for p in zip(*parts))
        h = torch.cat([x, t[..., None]], -1)
        for w, b in params[:-1]:
            h = torch.selu(torch.baddbmm(b[:, None], h, w))
        v = torch.baddbmm(params[-1][1][:, None], h, params[-1][0])
        optimizer.zero_grad()
        (v - u).square().mean((1, 2)).sum().backward()
        optimizer.step()
    return _backwards([[jnp.asarray(a.detach().numpy()) for a in layer] for layer in params])


def _backwards(params: list) -> list:
    """v(x, s) of the other time as -v(x, 1 - t): the first layer's time flips, the last's sign."""
    (w, b), *middle, (last_w, last_b) = params
    time_row = w[..., -1, :]
    first = (w.at[..., -1, :].set(-time_row), b + time_row)
    return [first, *[tuple(layer) for layer in middle], (-last_w, -last_b)]


def grid(sizes: Sizes) -> Array:
    """The times of Euler's steps."""
    return jnp.linspace(1.0, 0.0, sizes.grid + 1)


@functools.partial(jax.jit, static_argnames=("sizes",))
def flow(params: list, x1: Array, sizes: Sizes) -> tuple[Array, Array, Array]:
    """For all seeds, from x1 `[seeds, n, 2]`: the samples, the path energy, and 64 trajectories."""

    def one(params: list, x1: Array) -> tuple[Array, Array, Array]:
        def observe(x: Array, t: Array, prediction) -> tuple[Array, Array]:
            velocity = endpoint_velocity(FLOW, prediction, t)
            return jnp.square(velocity).sum(1), x

        x, (energy, points) = sample(
            jax.random.key(0), network(params), x=x1, times=grid(sizes), solver=solvers.euler(),
            observe=observe,
        )  # fmt: skip
        return x, energy.mean(), jnp.concatenate([points[:, :64], x[None, :64]])

    return jax.vmap(one)(params, x1)


def wasserstein2(x: np.ndarray, y: np.ndarray) -> float:
    """W2 of two samples of one size `[n, 2]`: the root of the cheapest matching's mean cost."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    cost = cdist(x, y, "sqeuclidean")
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


class Measured(NamedTuple):
    """What a method came to, by seed."""

    w2: list[float]
    npe: list[float]
    paths: np.ndarray  # [grid + 1, 64, 2], of the first seed
    seconds: float


def run(
    task: str, methods: Sequence[str], sizes: Sizes, peer: bool, say: Callable[[str], None]
) -> dict:
    """Everything of one task: {(method, "jdiff" | "torchcfm" | "floor"): Measured}."""
    source, target = TASKS[task]
    keys = jax.random.split(jax.random.key(0), sizes.seeds)
    draw = lambda law, key, *shape: law(jax.random.key(key), int(np.prod(shape))).reshape(*shape, 2)
    test, batches = (sizes.seeds, sizes.samples), (sizes.seeds, sizes.steps, sizes.batch)
    x1, truth, again = draw(source, 1, *test), draw(target, 2, *test), draw(target, 3, *test)
    train_x0, train_x1 = draw(target, 4, *batches), draw(source, 5, *batches)
    shortest = [wasserstein2(a, b) ** 2 for a, b in zip(x1, truth)]

    def measure(params: list, began: float) -> Measured:
        seconds = time.perf_counter() - began
        x, energy, paths = jax.device_get(flow(params, x1, sizes))
        w2 = [wasserstein2(a, b) for a, b in zip(x, truth)]
        npe = [abs(e - s) / s for e, s in zip(energy.tolist(), shortest)]
        return Measured(w2, npe, paths[0], seconds)

    out, weights = {}, {}
    for name in methods:
        path, coupling = METHODS[name]
        if name == "FM" and source is not normal:
            continue  # its other endpoint is noise
        began = time.perf_counter()
        weights[name] = jax.block_until_ready(train(keys, path, coupling, train_x0, train_x1))
        out[name, "jdiff"] = measure(weights[name], began)
        if peer:
            began = time.perf_counter()
            out[name, "torchcfm"] = measure(train_torchcfm(name, train_x0, train_x1), began)
        say(f"{task}, {name}: " + ", ".join(
            f"{who} {out[name, who].seconds:.0f} s" for who in ("jdiff", "torchcfm")
            if (name, who) in out
        ))  # fmt: skip
    began = time.perf_counter()
    reflowed = jax.block_until_ready(train_reflow(keys, weights["I-CFM"], train_x1, sizes))
    out[REFLOW, "jdiff"] = measure(reflowed, began)
    floor = [wasserstein2(a, b) for a, b in zip(again, truth)]
    out["two samples of the target", "floor"] = Measured(floor, [], np.zeros(0), 0.0)
    return out


def table(results: dict[str, dict], metric: str) -> str:
    """Mean ± deviation over seeds as markdown: a row a method and library, a column a task."""
    rows: dict = {}
    for task, out in results.items():
        for who, measured in out.items():
            values = getattr(measured, metric)
            if values:
                spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
                rows.setdefault(who, {})[task] = f"{np.mean(values):.3f} ± {spread:.3f}"
    order = [*METHODS, REFLOW, "two samples of the target"]
    lines = [f"| {metric.upper()} | | " + " | ".join(results) + " |"]
    lines.append("|---" * (2 + len(results)) + "|")
    for name, who in sorted(rows, key=lambda r: (order.index(r[0]), r[1])):
        cells = " | ".join(rows[name, who].get(task, "") for task in results)
        lines.append(f"| {name} | {'' if who == 'floor' else who} | {cells} |")
    return "\n".join(lines)


def picture(results: dict[str, dict], out: pathlib.Path) -> None:
    """Trajectories of the first seed: a row a task, a column a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [n for n in (*METHODS, REFLOW) if any((n, "jdiff") in r for r in results.values())]
    tasks = [t for t in ("N → 8gaussians", "8gaussians → moons") if t in results] or list(results)
    figure, axes = plt.subplots(len(tasks), len(names), squeeze=False)
    figure.set_size_inches(2.5 * len(names), 2.6 * len(tasks))
    for row, task in zip(axes, tasks):
        for axis, name in zip(row, names):
            axis.set(xticks=[], yticks=[], xlim=(-6.6, 6.6), ylim=(-6.6, 6.6), aspect="equal")
            if task == tasks[0]:
                axis.set_title(name)
            found = results[task].get((name, "jdiff"))
            if found is None:
                axis.text(0, 0, "—", ha="center", color="grey")
                continue
            axis.plot(*found.paths.transpose(2, 0, 1), color="0.6", linewidth=0.7)
            axis.scatter(*found.paths[0].T, s=7, color="black", zorder=2)
            axis.scatter(*found.paths[-1].T, s=7, color="#1f77b4", zorder=3)
        row[0].set_ylabel(task)
    figure.suptitle(
        "Trajectories from the source (black) to the samples (blue)", y=0.03, fontsize=10
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Trains, prints both tables and, unless quick, writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="I-CFM and OT-CFM, N → moons alone")
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--out", type=pathlib.Path, help="where the figure goes")
    args = parser.parse_args(argv)
    sizes = Sizes(seeds=2, steps=300, samples=256, grid=20) if args.quick else Sizes()
    sizes = sizes._replace(steps=args.steps or sizes.steps)
    peer = not args.quick and importlib.util.find_spec("torchcfm") is not None
    if not (peer or args.quick):
        print("torchcfm is not installed (the extra `parity`): its rows are left out")
    tasks = ["N → moons"] if args.quick else list(TASKS)
    methods = ["I-CFM", "OT-CFM"] if args.quick else list(METHODS)
    say = functools.partial(print, flush=True)
    results = {task: run(task, methods, sizes, peer, say) for task in tasks}
    print()
    print(table(results, "w2"), table(results, "npe"), sep="\n\n")
    out = args.out
    if out is None and not args.quick:
        out = pathlib.Path(__file__).parents[1] / "docs" / "images" / "toy_flows.png"
    if out is not None:
        picture(results, out)
        print(f"\nwrote {out}")
    return results


if __name__ == "__main__":
    main()
