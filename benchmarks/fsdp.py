"""Memory of a device and time of a step: FSDP over data parallel, on 8 simulated CPU devices.

    python benchmarks/fsdp.py
    python benchmarks/fsdp.py --quick

The training state is that of a DiT-B/2 on 32 x 32 x 4 latents with Adam and two averages, one image
a device, stacked blocks recomputed in the backward pass. Bytes are those of XLA's memory analysis
of the compiled step: the state that goes in and comes out, and everything that it holds meanwhile.
Data parallel must hold at least 6 times as much. The program is compiled, not run: eight copies of
that state are 21 GB. Times are of a smaller DiT; eight devices share the cores of one CPU, so they
show that FSDP's fetches cost something, and not what they cost between real devices.
"""

import argparse
import time

import jax
from timing import table, verdict

from jdiff import losses, models, parallel, schedules
from jdiff.denoisers import network
from jdiff.parallel.collectives import collectives
from jdiff.parallel.layout import TRANSFORMER, layout, within
from jdiff.parallel.shardings import of_state
from jdiff.predictions import parameterization
from jdiff.training import ema, optimizers
from jdiff.training import step as steps

DEVICES, LIMIT = 8, 6.0
MESHES = {"data parallel": {"data": DEVICES}, "FSDP": {"fsdp": DEVICES}}


def prepared(fields, sizes, batch):
    """(start: key -> state, step, shapes of the state, shapes of the batch), all laid out."""
    build = lambda rngs: models.DiT(**fields, scan=True, remat=True, rngs=rngs)
    laid = layout(parallel.make(sizes), TRANSFORMER)
    apply = models.abstract(build)[0].with_layout(laid)
    schedule, row = schedules.rectified_flow(), parameterization("velocity", time="t1000")
    tx = optimizers.BY_NAME["adam"](1e-4)
    averages = {"short": ema.power(0.05), "long": ema.power(0.10)}

    def loss(params, key, batch, state):
        return losses.denoising(key, network(apply, params, schedule, row), batch["x0"], batch)

    def start(key):
        with within(laid):
            return steps.start(models.init(build, key)[1], key, tx, averages)

    shapes = jax.eval_shape(start, jax.random.key(0))
    placed = of_state(shapes, models.axes(build), laid)
    struct = lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
    images = jax.ShapeDtypeStruct((batch, 32, 32, 4), "float32", sharding=laid.batch)
    labels = jax.ShapeDtypeStruct((batch,), "int32", sharding=laid.batch)
    step = steps.compile_step(steps.make_step(loss, tx, averages), placed, laid)
    return (
        jax.jit(start, out_shardings=placed), step, jax.tree.map(struct, shapes, placed),
        {"x0": images, "label": labels},
    )  # fmt: skip


def memory(compiled):
    """(bytes of the state and the batch, bytes of what a step holds besides), of one device."""
    m = compiled.memory_analysis()
    results = m.output_size_in_bytes - m.alias_size_in_bytes
    return m.argument_size_in_bytes, results + m.temp_size_in_bytes


def seconds(start, compiled, batch, rounds):
    """The best of some steps."""
    state = start(jax.random.key(0))
    draw = lambda a: jax.device_put(jax.numpy.ones(a.shape, a.dtype), a.sharding)
    batch, best = jax.tree.map(draw, batch), float("inf")
    for _ in range(rounds + 1):  # the first warms up
        begun = time.perf_counter()
        state, values = compiled(state, batch)
        jax.block_until_ready((state, values))
        best = min(best, time.perf_counter() - begun)
    return best


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--batch", type=int, default=DEVICES, help="images a step (default 8)")
    p.add_argument("--rounds", type=int, default=5, help="steps, the best counts (default 5)")
    p.add_argument("--quick", action="store_true", help="one step of a tiny network")
    a = p.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)

    compile_ = lambda step, state, batch: step.lower(state, batch).compile()
    held, rows = {}, []
    for name, sizes in MESHES.items():
        _, step, state, batch = prepared(
            models.dit_imagenet("B/2", learn_sigma=False), sizes, a.batch
        )
        compiled = compile_(step, state, batch)
        kept, more = memory(compiled)
        held[name] = kept + more
        sent = sum(c.sent * c.trips for c in collectives(compiled.as_text()))
        what = f"DiT-B/2, {name}: state + rest"
        rows.append((what, f"{kept / 2**20:,.0f} + {more / 2**20:,.0f} MiB a device", "", ""))
        rows.append(
            (f"DiT-B/2, {name}: sent", f"{sent / 2**20:,.0f} MiB a device and step", "", "")
        )
    ratio = held["data parallel"] / held["FSDP"]
    good = verdict(ratio, LIMIT, at_least=True)
    rows.append(("memory, data parallel / FSDP", f"{ratio:.2f}", f">= {LIMIT:g}", good))

    timed = {"in_channels": 4, "width": 64 if a.quick else 384, "depth": 2 if a.quick else 6,
             "heads": 4, "patch": 4, "num_classes": 1000}  # fmt: skip
    for name, sizes in MESHES.items():
        start, step, state, batch = prepared(timed, sizes, a.batch)
        compiled = compile_(step, state, batch)
        took = seconds(start, compiled, batch, 1 if a.quick else a.rounds)
        what = f"width {timed['width']}, depth {timed['depth']}, {name}: step"
        rows.append((what, f"{1000 * took:,.0f} ms", "", ""))
    table("FSDP over data parallel, 8 simulated devices", rows)
    if good != "ok":
        raise SystemExit(1)


if __name__ == "__main__":
    main()
