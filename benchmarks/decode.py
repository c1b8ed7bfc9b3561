"""Memory and time of decoding: whole, some images at a time, in tiles.

    python benchmarks/decode.py            # --quick: a narrow network, one round

Decodes 16 images of 128 x 128 from latents [16, 16, 16, 4], float32, with Stable Diffusion's
decoder of random weights. Memory is XLA's temporary memory of the compiled program: what it needs
beside weights, latents and images. One tile's share is the temporary memory of decoding one tile
and the tile's image, which is part of no result.
"""

import argparse

import jax
import jax.numpy as jnp
from timing import race, table, verdict

from jdiff import models
from jdiff.autoencoders import KL, autoencoder, kl_sd

IMAGES, SIDE, TILE = 16, 128, 64
NARROW = {"widths": (32, 64, 64, 64), "blocks": 1}


def latents(coder, count, side):
    return jnp.zeros((count, *coder.shape(side, side)), jnp.float32)


def compiled(coder, z):
    """(program, MiB of its temporary memory)."""
    program = jax.jit(lambda coder, z: coder.decode(z)).lower(coder, z).compile()
    return program, program.memory_analysis().temp_size_in_bytes / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3, help="0: compile and measure memory alone")
    args = parser.parse_args()
    fields = kl_sd(**(NARROW if args.quick else {}))
    coder = autoencoder(*models.init(lambda rngs: KL(**fields, rngs=rngs), jax.random.key(0)))

    z, one = latents(coder, IMAGES, SIDE), latents(coder, 1, TILE)
    ways = {
        f"{IMAGES} images at {SIDE} px, whole": coder,
        "one image at a time": coder.sliced(1),
        f"in tiles of {TILE} px": coder.tiled(TILE),
    }
    _, tile = compiled(coder, one)
    share = tile + TILE**2 * 3 * 4 / 2**20
    rows, programs = [(f"one tile's share, {TILE} px", f"{share:.2f} MiB", "", "")], {}
    for name, way in ways.items():
        programs[name], memory = compiled(way, z)
        told = ("", "")
        if way.tile:  # a hundredth is for the loops' own counters and addresses
            told = (f"{1.01 * share:.2f} MiB", verdict(memory, 1.01 * share))
        rows.append((name, f"{memory:.2f} MiB", *told))
    rounds = min(1, args.rounds) if args.quick else args.rounds
    runs = {name: lambda name=name: programs[name](ways[name], z) for name in ways if rounds}
    for name, seconds in race(runs, rounds).items():
        rows.append((name, f"{seconds:.2f} s", "", ""))
    table(f"decoding, {models.count(coder.params) / 1e6:.1f} M parameters", rows)


if __name__ == "__main__":
    main()
