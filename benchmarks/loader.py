"""How fast the data loader is, beside what the trainer consumes.

    python benchmarks/loader.py [--sets digits cifar10]

The loader runs alone, then the train step of the set's config alone, both in images a second; the
loader has to deliver at least 3 times what the step consumes. A set that is not prepared is left
out, and says so.
"""

import argparse
import pathlib
import time

import jax
from timing import table, verdict

from jdiff import config as configs
from jdiff import experiment
from jdiff.data import pipeline, sources
from jdiff.errors import UserError
from jdiff.training import step as steps

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
OF = {"digits": "digits.py", "cifar10": "cifar10_edm.py"}


def delivered(feed, batch_size: int, seconds: float = 3.0) -> float:
    """Images a second out of an iterator."""
    for _ in range(3):
        next(feed)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(feed)
        count += batch_size
    return count / (time.perf_counter() - start)


def consumed(config, info, batch, repeats: int) -> float:
    """Images a second that the train step takes from device memory."""
    exp = experiment.build(config, info)
    params = exp.init(jax.random.key(0))
    state = steps.start(params, jax.random.key(1), exp.optimizer, exp.averages)
    step = steps.compile_step(steps.make_step(exp.loss, exp.optimizer, exp.averages))
    batch = jax.device_put({k: v for k, v in batch.items() if k != "id"})
    state, values = step(state, batch)
    jax.block_until_ready(values)
    start = time.perf_counter()
    for _ in range(repeats):
        state, values = step(state, batch)
    jax.block_until_ready(values)
    return repeats * len(batch["label"]) / (time.perf_counter() - start)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--sets", nargs="+", default=list(OF), choices=list(OF))
    p.add_argument("--data_dir", default=None, help="where TFDS keeps prepared sets")
    p.add_argument("--batch", type=int, default=None, help="images a step (default: the config's; "
                   "16 for cifar10 on CPU)")  # fmt: skip
    a = p.parse_args()
    rows = []
    for name in a.sets:
        config = configs.load(str(FOLDER / OF[name]))
        try:
            source = sources.source(name, "train", a.data_dir)
        except UserError as error:
            print(f"left out: {error}")
            continue
        small = name == "cifar10" and jax.devices()[0].platform == "cpu"
        size = a.batch or (16 if small else config.train.batch_size)
        with config.unlocked():
            config.train.batch_size = size
        feed = pipeline.batches(source, size, seed=0, flip=config.data.flip, threads=2)
        loader = delivered(feed, size)
        step = consumed(config, source.info, next(feed), 2 if small else 10)
        ratio = loader / step
        what = f"{name}: loader {loader:,.0f} / step {step:,.0f} images/s"
        rows.append((what, f"{ratio:,.0f}", "at least 3", verdict(ratio, 3.0, at_least=True)))
    table("data loader", rows)


if __name__ == "__main__":
    main()
