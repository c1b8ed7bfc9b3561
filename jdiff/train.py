"""The training loop: moves batches, saves, draws pictures, and says what happens."""

import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections

from jdiff import cache, ending, exits, experiment, kinds, runs
from jdiff.errors import UserError
from jdiff.parallel import hosts
from jdiff.pictures import Drawing
from jdiff.profiling import tracer
from jdiff.profiling.clock import TRAINING, Clock
from jdiff.pytree import Array, PyTree
from jdiff.training import checkpoints, logs, rate, stop
from jdiff.training import step as steps
from jdiff.training.stop import Stopped


class Diverged(UserError):
    """The loss or the gradient is not finite."""

    code = exits.DIVERGED


class Result(NamedTuple):
    """What training ends with."""

    step: int
    loss: float
    images_per_s: float
    seconds: float


def train(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path, console: Any,
    profile: tracer.Profile | None = None,
) -> Result:  # fmt: skip
    """Trains the experiment of `config` in `workdir`, or resumes it where it was cut off.

    A resumed run continues bit for bit: weights, optimiser, averages, randomness and data order.
    Of many processes (`parallel.hosts`) each reads its rows of a batch; the first writes and tells.

    Args:
      config: of any kind (`jdiff.kinds`); most are as `experiment.defaults`.
      workdir: a new directory, or one of the same config.
      console: a rich Console.
      profile: steps to trace with jax's profiler, into WORKDIR/profile.

    Raises:
      UserError: the config, data or directory do not fit.
      Diverged: a loss or gradient is not finite; names the step, the batch and the last checkpoint.
      Unreadable: the data cannot be read, or does not come; the steps until then are saved.
      NotSaved: `workdir` cannot be written any more, a full disk for example.
      Damaged: there are checkpoints, and none of them is whole.
      Stopped: SIGTERM, SIGUSR1 or Ctrl-C; everything is saved.
    """
    with stop.listening() as asked, Clock() as clock:
        return _train(config, workdir, console, profile, asked, clock)


def _train(
    config: Any, workdir: str | pathlib.Path, console: Any, profile: tracer.Profile | None,
    asked: list[int], clock: Clock,
) -> Result:  # fmt: skip
    from jdiff import models
    from jdiff.data import patience
    from jdiff.data.pipeline import batches

    started = time.time()
    workdir, line = pathlib.Path(workdir), hosts.line()
    _check(config.train)
    c = config.data
    source = patience.readable(c.name, c.train_split, c.data_dir, c.conditions, mirrored=c.flip)
    info = experiment.prepared(source.info, config.data)
    kind = kinds.of(config)
    layout = kind.layout(config)
    frozen, teacher = kind.frozen(config, info, layout.mesh.shape)
    exp = kind.build(config, info, teacher, layout)
    kind.check(exp, info)
    kind.check_later(exp)
    feed = batches(
        source, config.train.batch_size, seed=config.seed, train=True, flip=config.data.flip,
        crop=config.data.crop, size=config.data.size, resample=config.data.resample,
        threads=config.data.threads, rows=layout.rows(config.train.batch_size),
    )  # fmt: skip
    key_init, key_train, key_sample = jax.random.split(jax.random.key(config.seed), 3)
    pictured = kind.drawing(exp, config, key_sample, info)
    if line.first:
        runs.claim(workdir, config)
        runs.keep_empty(workdir, exp.empty)
    cache.enable(config.compile_cache, config.cache_dir)

    begin, like = _beginning(exp, key_init, key_train, frozen)
    step_fn = steps.compile_step(
        steps.make_step(exp.loss, exp.optimizer, exp.averages, config.train.accumulate),
        jax.tree.map(lambda leaf: leaf.sharding, like), layout,
    )  # fmt: skip
    known = runs.read_description(workdir) if line.first else {}
    before = known.get("wall_seconds", 0.0)
    described = {
        "name": config.name, "versions": runs.versions(), "argv": sys.argv[1:],
        "parameters": models.count(like.params), "cpu_count": os.cpu_count(),
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "processes": line.count,
        "started": known.get("started", started), "state": "running",
        "data": dataclasses.asdict(info),
    }  # fmt: skip
    if line.first:
        runs.describe(workdir, **described)

    with (
        checkpoints.opened(workdir, config.train.keep, tell=_teller(console)) as saved,
        ending.noted(workdir, saved, before, started, write=line.first),
        patience.patient(feed, source, config.data.timeout) as feed,
    ):
        if saved.latest is not None:
            restored = saved.restore(like)
            state = restored.state
            feed.set_state(restored.data)
            console.print(f"resuming {workdir} after step {restored.step}")
        else:
            state = begin()
        done = int(state.step)
        if asked and line.count == 1:  # before there is anything to save
            raise Stopped(done, asked[0])
        with (
            logs.opened_metrics(workdir, done, before, write=line.first) as metrics,
            logs.progress(console, config.train.steps, done) as tell,
            tracer.recording(
                profile, workdir, range(done + 1, config.train.steps + 1), clock,
                _teller(console), write=line.first,
            ) as numbers,
        ):  # fmt: skip
            watch = _Watch(exp, metrics, saved, clock, done)
            undrawn = line.first and done and _due(config.train, done, None).samples
            if checkpoints.any_process(undrawn and not _picture(workdir, done).exists()):
                images = hosts.fetched(pictured.draw(state))  # it ended between saving and drawing
                if line.first:
                    _write_samples(workdir, metrics, done, pictured, images)
            clock.begin("other")
            for step in numbers:
                try:
                    with clock.part("input"):
                        batch = next(feed)
                except patience.Unreadable as error:
                    if line.count > 1 or step == done + 1:
                        raise
                    watch.look(step - 1)
                    saved.save(state, checkpoints.as_json(feed.get_state()), step - 1)
                    saved.wait()
                    raise error.saved_at(step - 1) from error
                ids = batch.pop("id")
                with clock.part("input"):
                    batch = layout.put(batch, config.train.batch_size)
                if step == done + 1:
                    with clock.part("compile"):
                        watch.speed = _speed(config, step_fn.trace(state, batch))
                        state, values = step_fn(state, batch)
                        jax.block_until_ready(values)
                    if line.first:
                        runs.describe(workdir, speed=watch.speed._asdict())
                else:
                    begun = clock.now()
                    with clock.part("dispatch"):
                        state, values = step_fn(state, batch)
                    clock.dispatched(values["loss"], begun)
                watch.add(step, ids, values)
                signum = line.agreed(step, asked[0] if asked else None)
                due = _due(config.train, step, signum)
                if due.log:
                    watch.look(step)
                    tell(step, f"loss {watch.loss:.4f}  {watch.speed.text(watch.rate)}")
                if due.save:
                    watch.look(step)  # nothing that is not finite is saved
                    with clock.part("checkpoint"):
                        saved.save(state, checkpoints.as_json(feed.get_state()), step)
                if signum:
                    watch.end(step)
                    raise Stopped(step, signum)
                if due.samples:
                    with clock.part("samples"):
                        images = hosts.fetched(pictured.draw(state))
                        if line.first:
                            _write_samples(workdir, metrics, step, pictured, images)
            watch.end(config.train.steps)
    return Result(int(state.step), watch.loss, watch.rate, before + time.time() - started)


def _beginning(
    exp: Any, key_init: Array, key_train: Array, frozen: PyTree
) -> tuple[Callable[[], steps.State], steps.State]:
    """(draws the state before the first step, its shapes and where they live).

    What is split over devices is drawn where it is to live, and never whole anywhere.
    """
    start = lambda params, frozen: steps.start(
        params, key_train, exp.optimizer, exp.averages, frozen
    )
    drawn = lambda key, frozen: start(exp.init(key), frozen)
    shapes = jax.eval_shape(drawn, key_init, frozen)
    placed = exp.placed(shapes)
    theirs = lambda leaf: leaf.sharding if jax.device_count() > 1 else exp.layout.whole
    placed = dataclasses.replace(placed, frozen=jax.tree.map(theirs, frozen))
    split = any(not where.is_fully_replicated for where in jax.tree.leaves(placed))
    split |= jax.process_count() > 1

    def begin() -> steps.State:
        if exp.config.train.start is not None:
            like = jax.eval_shape(exp.init, key_init)
            params = runs.weights(exp.config.train.start, like, exp.layout.mesh.shape)
            return jax.jit(start, out_shardings=placed)(params, frozen)
        if split:
            return jax.jit(drawn, out_shardings=placed)(key_init, frozen)
        return jax.device_put(drawn(key_init, frozen), placed)  # without a large program

    at = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return begin, jax.tree.map(at, shapes, placed)


class _Due(NamedTuple):
    """What is to be done after a step."""

    log: bool
    save: bool
    samples: bool


def _due(t: Any, step: int, signum: int | None) -> _Due:
    """By `config.train`; the last step, and a signal to stop, are occasions too."""
    last = step == t.steps
    return _Due(
        log=last or step % t.log_every == 0,
        save=last or bool(signum) or step % t.checkpoint_every == 0,
        samples=last or step % t.sample_every == 0,
    )


class _Watch:
    """Looks at the metrics in batches, so that the device need not wait for the host.

    Attributes:
      loss: the mean since the look before.
      rate: images a second since then, without compilation, samples and profiling.
      speed: what the rate means for a chip.
    """

    def __init__(
        self, exp: Any, metrics: logs.Metrics, saved: checkpoints.Checkpoints,
        clock: Clock, done: int,
    ):  # fmt: skip
        self._exp, self._metrics, self._saved, self._clock = exp, metrics, saved, clock
        self._pending: list[dict[str, Array]] = []  # what the device may still be computing
        self._ids: dict[int, Any] = {}  # of the batches since the last look
        self._counted = done + 1  # the first compiles, which is not training speed
        self.loss, self.rate = float("nan"), 0.0
        self.speed = rate.Speed(exp.config.train.batch_size, jax.device_count())

    def add(self, step: int, ids: Any, values: dict[str, Array]) -> None:
        """A step was dispatched."""
        self._ids[step] = ids
        self._pending.append(values)

    def look(self, step: int) -> None:
        """Fetches and writes the metrics of the steps since the last look.

        Raises:
          Diverged: one of them is not finite.
        """
        if not self._pending:
            return
        with self._clock.part("wait"):
            values = jax.device_get(self._pending)
        bad = int(values[-1]["bad_step"])
        if bad >= 0:
            raise Diverged(_diverged(bad, self._ids.get(bad), self._saved))
        with self._clock.part("logging"):
            spent = self._clock.settle()
            seconds = sum(spent[part] for part in TRAINING)
            self.rate = (step - self._counted) * self.speed.batch_size / max(seconds, 1e-9)
            mean = lambda name: float(sum(v[name] for v in values) / len(values))
            self.loss = mean("loss")
            figures = values[0].keys() - {"loss", "grad_norm", "bad_step"}  # of the loss's own
            self._metrics.write(
                step,
                {
                    "loss": self.loss,
                    "grad_norm": mean("grad_norm"),
                    "learning_rate": float(self._exp.learning_rate(step - 1)),
                    **self.speed.of(self.rate),
                    **{name: mean(name) for name in sorted(figures)},
                },
            )
            self._write_spent(step, spent)
        self._pending.clear()
        self._ids.clear()
        self._counted = step

    def end(self, step: int) -> None:
        """Waits for what is being saved; the rest of the time is accounted for."""
        with self._clock.part("checkpoint"):
            self._saved.wait()
        self._write_spent(step, self._clock.settle())

    def _write_spent(self, step: int, spent: dict[str, float]) -> None:
        """A line of its own: seconds of wall time since the line before, by what they went into."""
        seconds = {name: round(s, 6) for name, s in spent.items() if s >= 1e-6}
        self._metrics.write(step, seconds, kind="spent")


def _speed(config: ml_collections.ConfigDict, traced: Any) -> rate.Speed:
    """What is known of the run's speed, from its step as jit traced it."""
    devices = jax.devices()
    peak = config.train.peak_flops or rate.peak(devices[0].device_kind)
    counted, _ = rate.flops(traced)
    return rate.Speed(config.train.batch_size, len(devices), counted, peak)


def _picture(workdir: pathlib.Path, step: int) -> pathlib.Path:
    return workdir / "samples" / f"step_{step:08d}.png"


def _write_samples(
    workdir: pathlib.Path, metrics: logs.Metrics, step: int, pictured: Drawing, images: Any
) -> None:
    from jdiff import pictures

    picture = pictures.grid(pictured.arranged(images), columns=pictured.columns)
    _picture(workdir, step).parent.mkdir(exist_ok=True)
    try:
        pictures.save(_picture(workdir, step), picture)
    except UserError as error:  # the disk's own error, which ends a run in a way of its own
        raise error.__cause__ from None
    metrics.picture(step, "samples", picture)


def _teller(console: Any) -> Callable[[str], None]:
    return lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)


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
    if t.peak_flops is not None and not t.peak_flops > 0:
        raise UserError(f"config.train.peak_flops={t.peak_flops} given; it must be above 0.")
