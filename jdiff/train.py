"""The training loop: moves batches, saves, draws pictures, and says what happens."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_collections

from jdiff import experiment, runs
from jdiff.errors import UserError
from jdiff.pytree import Array, PyTree
from jdiff.sampling import sample
from jdiff.training import checkpoints, logs
from jdiff.training import step as steps


class Stopped(Exception):
    """Training was asked to stop and has saved; `signal` is what asked."""

    def __init__(self, step: int, signum: int):
        self.step, self.signal = step, signum
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} at step {step}, saved; the same command resumes.")


class Diverged(UserError):
    """The loss or the gradient is not finite."""


class Result(NamedTuple):
    """What training ends with."""

    step: int
    loss: float
    images_per_s: float
    seconds: float


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path, console: Any) -> Result:
    """Trains the experiment of `config` in `workdir`, or resumes it where it was cut off.

    A resumed run continues bit for bit: weights, optimiser, averages, randomness and data order.

    Args:
      config: see `experiment.defaults`.
      workdir: a new directory, or one of the same config.
      console: a rich Console.

    Raises:
      UserError: the config, data or directory do not fit.
      Diverged: a loss or gradient is not finite; names the step, the batch and the last checkpoint.
      Stopped: SIGTERM or Ctrl-C; everything is saved.
    """
    from jdiff import models
    from jdiff.data import sources
    from jdiff.data.pipeline import batches

    started = time.time()
    workdir = pathlib.Path(workdir)
    _check(config.train)
    source = sources.source(config.data.name, config.data.train_split, config.data.data_dir)
    info = experiment.prepared(source.info, config.data)
    exp = experiment.build(config, info)
    experiment.check(exp, info)
    experiment.sampler(config, exp.denoiser(None), exp.null)  # its errors now, not in an hour
    feed = batches(
        source, config.train.batch_size, seed=config.seed, train=True, flip=config.data.flip,
        crop=config.data.crop, size=config.data.size, threads=config.data.threads,
    )  # fmt: skip
    runs.claim(workdir, config)
    enable_cache(config.compile_cache)

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = steps.shardings(mesh)
    key_init, key_train, key_sample = jax.random.split(jax.random.key(config.seed), 3)
    state = steps.start(exp.init(key_init), key_train, exp.optimizer, exp.averages)
    state = jax.device_put(state, whole)
    step_fn = steps.compile_step(
        steps.make_step(exp.loss, exp.optimizer, exp.averages, config.train.accumulate), mesh
    )
    known = runs.read_description(workdir)
    before = known.get("wall_seconds", 0.0)
    described = {
        "name": config.name, "versions": runs.versions(), "argv": sys.argv[1:],
        "parameters": models.count(state.params), "cpu_count": os.cpu_count(),
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "started": known.get("started", started), "state": "running",
        "data": dataclasses.asdict(info),
    }  # fmt: skip
    runs.describe(workdir, **described)

    with checkpoints.opened(workdir, config.train.keep) as saved, _signals() as asked:
        if saved.latest is not None:
            restored = saved.restore(state)
            state = restored.state
            feed.set_state(restored.data)
            console.print(f"resuming {workdir} after step {restored.step}")
        done = int(state.step)
        draw = _drawer(exp, config, key_sample, info)
        with logs.opened_metrics(workdir, done, before) as metrics:
            outcome = "failed"
            try:
                state, loss, rate = _loop(
                    config, workdir, console, state, feed, step_fn, split, exp, saved, metrics,
                    draw, asked,
                )  # fmt: skip
                outcome = "finished"
            except Stopped:
                outcome = "stopped"
                raise
            finally:
                seconds = before + time.time() - started
                runs.describe(workdir, state=outcome, wall_seconds=round(seconds, 2))
    return Result(int(state.step), loss, rate, seconds)


def _loop(
    config: Any, workdir: pathlib.Path, console: Any, state: steps.State, feed: Any, step_fn: Any,
    split: Any, exp: experiment.Experiment, saved: checkpoints.Checkpoints, metrics: logs.Metrics,
    draw: Any, asked: list[int],
) -> tuple[steps.State, float, float]:  # fmt: skip
    t = config.train
    done = int(state.step)
    pending: list[dict[str, Array]] = []  # metrics that the device may still be computing
    ids: dict[int, Any] = {}  # of the batches since the last look
    loss, rate = float("nan"), 0.0
    clock, counted = time.time(), done

    def look(step: int) -> None:
        """Fetches the pending metrics; stops if one of them is not finite."""
        nonlocal loss, rate, clock, counted
        if not pending:
            return
        values = jax.device_get(pending)
        bad = int(values[-1]["bad_step"])
        if bad >= 0:
            raise Diverged(_diverged(bad, ids.get(bad), saved))
        now = time.time()
        rate = (step - counted) * t.batch_size / max(now - clock, 1e-9)
        loss = float(sum(v["loss"] for v in values) / len(values))
        norm = float(sum(v["grad_norm"] for v in values) / len(values))
        learning_rate = float(exp.learning_rate(step - 1))
        metrics.write(
            step,
            {"loss": loss, "grad_norm": norm, "learning_rate": learning_rate, "images_per_s": rate},
        )
        pending.clear()
        ids.clear()
        clock, counted = now, step

    def save(step: int) -> None:
        look(step)
        saved.save(state, checkpoints.as_json(feed.get_state()), step)

    if done >= t.steps:
        return state, loss, rate
    with logs.progress(console, t.steps, done) as tell:
        for step in range(done + 1, t.steps + 1):
            batch = next(feed)
            ids[step] = batch.pop("id")
            state, values = step_fn(state, jax.device_put(batch, split))
            pending.append(values)
            if step == done + 1:  # compilation is not training speed
                jax.block_until_ready(values)
                clock, counted = time.time(), step
            last = step == t.steps
            if step % t.log_every == 0 or last:
                look(step)
                tell(step, f"loss {loss:.4f}  {rate:,.0f} images/s")
            if step % t.checkpoint_every == 0 or last or asked:
                save(step)
            if asked:
                saved.wait()
                raise Stopped(step, asked[0])
            if step % t.sample_every == 0 or last:
                pause = time.time()
                _write_samples(workdir, metrics, step, draw(state))
                clock += time.time() - pause
        saved.wait()
    return state, loss, rate


def _drawer(exp: experiment.Experiment, config: Any, key: Array, info: Any) -> Any:
    """state -> a grid of samples: the same noise and labels each time, a row a class."""
    classes = exp.null.get("label", 0)
    rows = min(classes, 10) or 8
    labels = jax.numpy.repeat(jax.numpy.arange(rows), 8) % max(classes, 1)
    cond = {"label": labels} if classes else None

    def draw(state: steps.State) -> PyTree:
        name = config.sampling.ema
        params = state.params if name == "params" else state.averages[name]
        denoise, solver, times = experiment.sampler(config, exp.denoiser(params), exp.null)
        return sample(
            key, denoise, times=times, shape=info.shape, num=rows * 8, cond=cond, solver=solver,
            batch=config.sampling.batch,
        )  # fmt: skip

    return draw


def _write_samples(workdir: pathlib.Path, metrics: logs.Metrics, step: int, images: Array) -> None:
    from jdiff import pictures

    folder = workdir / "samples"
    folder.mkdir(exist_ok=True)
    picture = pictures.grid(jax.device_get(images), columns=8)
    pictures.save(folder / f"step_{step:08d}.png", picture)
    metrics.picture(step, "samples", picture)


def enable_cache(wanted: bool) -> None:
    """Keeps compiled programs in the cache folder, so that the next start is quick."""
    if not wanted or jax.config.jax_compilation_cache_dir:
        return
    root = os.environ.get("JDIFF_CACHE", pathlib.Path.home() / ".cache" / "jdiff")
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(root) / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and the first Ctrl-C, for the loop to act on; a second Ctrl-C interrupts."""
    asked: list[int] = []

    def note(signum: int, frame: Any) -> None:
        if asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signum)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: whoever runs us handles signals
        before = {}
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _diverged(step: int, ids: Any, saved: checkpoints.Checkpoints) -> str:
    batch = "" if ids is None else f" (images {', '.join(map(str, ids[:8]))}, ... of the set)"
    good = "there is no checkpoint" if saved.latest is None else f"step {saved.latest} is saved"
    return (
        f"the loss or gradient is not finite at step {step}{batch}; the last good checkpoint: "
        f"{good}. Try a lower config.optimizer.learning_rate, or config.optimizer.clip=1.0."
    )


def _check(t: Any) -> None:
    for field in ("batch_size", "accumulate", "steps", "log_every", "sample_every",
                  "checkpoint_every", "keep"):  # fmt: skip
        if t[field] < 1:
            raise UserError(f"config.train.{field}={t[field]} given; it must be at least 1.")
