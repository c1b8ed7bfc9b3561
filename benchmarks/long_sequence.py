"""Attention over split tokens: a ring and an exchange of heads, against the compiler's own.

    python benchmarks/long_sequence.py            # --quick: 256 tokens, one round

Self-attention and its gradient by queries, keys and values `[1, tokens, 8, 64]`, float32, over 8
devices (simulated ones on CPU, which share its cores: memory and bytes are those of 8 machines,
times are not). "plain" is `attention.dot_product` on arrays that are split the same way, left to
XLA; "one device" holds all. Memory is XLA's temporary memory of a device, bytes are what each
device sends for one forward and backward pass.
"""

import argparse
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax  # noqa: E402, the flags are read at import
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from timing import race  # noqa: E402

from jdiff import parallel  # noqa: E402
from jdiff.models.attention import dot_product  # noqa: E402
from jdiff.parallel.all_to_all import all_to_all  # noqa: E402
from jdiff.parallel.collectives import collectives  # noqa: E402
from jdiff.parallel.layout import layout  # noqa: E402
from jdiff.parallel.ring import ring  # noqa: E402

HEADS, CHANNELS = 8, 64


def compiled(kernel, over, tokens):
    """The gradient of sum(kernel(q, k, v)^2), with everything split along the tokens."""
    step = jax.value_and_grad(lambda qkv: jnp.square(kernel(*qkv)).sum())
    place = jax.NamedSharding(over.mesh, jax.P(None, "sequence"))
    shapes = [jax.ShapeDtypeStruct((1, tokens, HEADS, CHANNELS), jnp.float32)] * 3
    jitted = jax.jit(step, in_shardings=(place,), out_shardings=(None, place))
    return jitted.lower(shapes).compile(), place


def measured(tokens, rounds):
    """Rows of (name, MiB a device, MiB sent, seconds) for sequences of `tokens`."""
    over = layout(parallel.make({"sequence": 8}, jax.devices()[:8]))
    alone = layout(parallel.make({"data": 1}, jax.devices()[:1]))
    rivals = {
        "one device": (dot_product, alone),
        "plain": (dot_product, over),
        "ring": (ring(over), over),
        "all-to-all": (all_to_all(over), over),
    }
    random = np.random.default_rng(0)
    qkv = list(random.standard_normal((3, 1, tokens, HEADS, CHANNELS), np.float32))
    rows, runs, values = {}, {}, {}
    for name, (kernel, laid) in rivals.items():
        program, place = compiled(kernel, laid, tokens)
        memory = program.memory_analysis().temp_size_in_bytes
        sent = sum(c.sent * (c.trips or 1) for c in collectives(program.as_text()))
        rows[name] = [memory / 2**20, sent / 2**20]
        if rounds:
            given = jax.device_put(qkv, place)
            runs[name] = lambda program=program, given=given: program(given)
            values[name] = float(runs[name]()[0])
    if rounds:
        assert np.ptp(list(values.values())) < 1e-3 * values["one device"], values
        for name, seconds in race(runs, rounds).items():
            rows[name].append(seconds)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 4096])
    parser.add_argument("--compiled", type=int, nargs="*", default=[8192, 32768],
                        help="lengths that are compiled and not run")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    sizes = dict.fromkeys(args.tokens, args.rounds) | dict.fromkeys(args.compiled, 0)
    if args.quick:
        sizes = {256: 1, 1024: 0}
    device = jax.devices()[0]
    out = Table("tokens", "attention", "memory, MiB", "sent, MiB", "s",
                title=f"forward and backward, {device.platform} {device.device_kind} x 8, "
                      f"{os.cpu_count()} cores, jax {jax.__version__}")  # fmt: skip
    for tokens, rounds in sizes.items():
        for name, (memory, sent, *seconds) in measured(tokens, rounds).items():
            time = f"{seconds[0]:.3f}" if seconds else ""
            out.add_row(f"{tokens:,}", name, f"{memory:,.1f}", f"{sent:,.1f}", time)
        out.add_section()
    Console(width=100).print(out)


if __name__ == "__main__":
    main()
