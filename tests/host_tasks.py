"""What one process of tests/parallel/test_hosts.py does: a list of tasks, each telling a line.

python host_tasks.py '{"address": null or "HOST:PORT", "count": 2, "index": 0, "tasks": [...]}'
"""

import json
import pathlib
import sys
import time

import jax
import numpy as np
from rich.console import Console

from jdiff import assess, experiment, generate, parallel, runs
from jdiff.parallel import hosts
from jdiff.parallel.clusters import Given
from jdiff.train import Stopped, train
from jdiff.training import checkpoints


def config(steps, mesh):
    """A transformer whose weights are large enough to be split."""
    c = experiment.defaults()
    c.name = "hosts"
    c.model.update({"name": "dit", "width": 32, "depth": 1, "heads": 2})
    c.mesh.update(mesh)
    c.train.update(
        {"batch_size": 16, "steps": steps, "log_every": 1, "checkpoint_every": 1000,
         "sample_every": 1000_000}
    )  # fmt: skip
    c.sampling.solver = {"name": "euler"}
    c.sampling.grid.steps = 5  # fewer, and an untrained network draws nothing but grey
    return c


def training(workdir, steps, mesh):
    """The last step, and whether a signal stopped it there."""
    try:
        return {"step": train(config(steps, mesh), workdir, Console(quiet=True)).step, "by": None}
    except Stopped as stop:
        return {"step": stop.step, "by": int(stop.signal)}


def onward(workdir, steps, mesh):
    """As many steps more."""
    return training(workdir, newest(workdir) + steps, mesh)


def as_far(workdir, other, mesh):
    """As many steps as another run has."""
    return training(workdir, newest(other), mesh)


def newest(workdir):
    """The step of the newest checkpoint."""
    with checkpoints.opened(pathlib.Path(workdir), write=False) as saved:
        return saved.latest


def waiting(path):
    """Until this file is there."""
    deadline = time.monotonic() + 900
    while not pathlib.Path(path).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return {}


def sampling(workdir, to):
    """Images of a run, of which the last batch is not full; the first process writes them."""
    images = list(generate.images(runs.load_run(workdir), num=20, batch=16,
                                  labels=np.arange(20) % 10))  # fmt: skip
    if hosts.line().first:
        np.save(to, np.concatenate(images))
    return {"batches": [len(part) for part in images]}


def evaluating(workdir):
    """A figure of the same images."""
    figures = assess.assess(
        runs.load_run(workdir), num=20, batch=16, features="pixels", metrics=["frechet"]
    )
    return {"frechet": figures["metrics"][0]["value"]}


def share(mesh):
    """Of the weights' numbers, how many of a hundred this process's devices hold."""
    from jdiff.data import sources

    c = config(1, mesh)
    info = sources.source("digits", "train").info
    exp = experiment.build(c, info, layout=experiment.layout(c))
    shapes = jax.eval_shape(exp.init, jax.random.key(0))
    placed = jax.tree.leaves(exp.placed(shapes))
    held, whole = 0, 0
    for shape, where in zip(jax.tree.leaves(shapes), placed):
        parts = where.addressable_devices_indices_map(shape.shape).values()
        held += len({str(p) for p in parts}) * np.prod(where.shard_shape(shape.shape))
        whole += np.prod(shape.shape)
    return {"percent": float(100 * held / whole)}


def rows(sizes, order):
    """Whether a batch of which each process reads its rows is the batch: on a mesh of these sizes.

    order: of the devices, so that processes lie in the mesh in every way.
    """
    devices = [jax.devices()[i] for i in order]
    grid = np.array(devices).reshape([sizes.get(axis, 1) for axis in parallel.AXES])
    layout = parallel.layout.layout(jax.sharding.Mesh(grid, parallel.AXES))
    batch = {"image": np.arange(48.0, dtype=np.float32).reshape(16, 3), "label": np.arange(16)}
    mine = layout.rows(16)
    placed = layout.put(jax.tree.map(lambda a: a[mine], batch), 16)
    found = hosts.fetched(placed)
    same = all(np.array_equal(found[k], batch[k]) for k in batch)
    return {"same": same and placed["image"].sharding == layout.batch, "rows": mine.tolist()}


def divide(path):
    """Whether work on seven rows comes back whole; and whether the first goes before the others."""
    seen = []
    rows = np.arange(14.0).reshape(7, 2)
    found = hosts.divided(lambda part: seen.append(len(part)) or part**2)(rows)
    with hosts.first_before_others("file"):
        if hosts.line().first:
            time.sleep(0.3)
            pathlib.Path(path).touch()
        waited = pathlib.Path(path).exists()
    return {"whole": bool(np.array_equal(found, rows**2)), "own": seen[0], "waited": waited}


def encoding(root, coder, name):
    """Examples that this process encoded of the set of encoded_sets.py, eight a file."""
    from jdiff import encoding as encode

    encode.SHARD, told = 8, []
    wanted = encode.Wanted("pics", name, autoencoder=coder, batch=4, data_dir=root)
    encode.encode(wanted, lambda text, *numbers: told.append(numbers))
    return {"numbers": [numbers for numbers in told if numbers][-1]}


TASKS = {
    "train": training, "onward": onward, "as_far": as_far, "wait": waiting, "sample": sampling,
    "share": share, "rows": rows, "divide": divide, "evaluate": evaluating,
    "encode": encoding,
}  # fmt: skip


def main(given):
    """Joins, does all tasks, and ends together with the others."""
    if given["address"]:
        hosts.join(Given(given["address"], given["count"], given["index"]), 600)
    for name, *arguments in given["tasks"]:
        told = TASKS[name](*arguments)
        print(json.dumps({"task": name, **told}), flush=True)
    hosts.line().finish()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
