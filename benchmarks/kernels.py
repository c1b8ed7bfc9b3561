"""How group norm, adaLN and attention are best written for this machine's compiler.

    python benchmarks/kernels.py            # --quick: one tiny size of each

Ways to write the same numbers, side by side, forward and with the gradient by all inputs. "jdiff"
is how `models.layers` and `models.attention` have it, and everything is timed relative to it: above
1, jdiff's is the faster. Ways that are less accurate are listed to show what accuracy costs.
"""

import argparse
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from timing import race, table

from jdiff.models import attention, layers

EPS, GROUPS = 1e-5, 32


# GroupNorm and SiLU: x [B, H, W, C], scale and bias [C]


def norm_jdiff(x, scale, bias):
    return jax.nn.silu(layers.group_norm(x, scale, bias, groups=GROUPS, eps=EPS))


def norm_view(x, scale, bias):
    """As usually written: statistics of a [B, H, W, G, C / G] view."""
    y = x.reshape(*x.shape[:3], GROUPS, -1)
    y = (y - y.mean((1, 2, 4), keepdims=True)) / jnp.sqrt(y.var((1, 2, 4), keepdims=True) + EPS)
    return jax.nn.silu(y.reshape(x.shape) * scale + bias)


def norm_affine(x, scale, bias):
    """One multiply-add a number: a x + b."""
    mean = _over_groups(x.mean((1, 2)))
    a = jax.lax.rsqrt(_over_groups(jnp.square(x - mean).mean((1, 2))) + EPS) * scale
    return jax.nn.silu(x * a + (bias - mean * a))


def norm_one_pass(x, scale, bias):
    """E[x^2] - E[x]^2, which cancels where the mean is large: not accurate."""
    mean = _over_groups(x.mean((1, 2)))
    variance = _over_groups(jnp.square(x).mean((1, 2))) - jnp.square(mean)
    return jax.nn.silu((x - mean) * (jax.lax.rsqrt(variance + EPS) * scale) + bias)


def norm_products(x, scale, bias):
    """Sums over space as products with a vector of ones."""
    pixels = x.shape[1] * x.shape[2]
    mean = lambda y: _over_groups(
        jnp.einsum("bnc,n->bc", y.reshape(y.shape[0], pixels, -1), jnp.full(pixels, 1 / pixels))
    )
    centred = x - mean(x)
    factor = jax.lax.rsqrt(mean(jnp.square(centred)) + EPS) * scale
    return jax.nn.silu(centred * factor + bias)


def _over_groups(means):
    grouped = means.reshape(means.shape[0], GROUPS, -1).mean(-1)
    return jnp.repeat(grouped, means.shape[1] // GROUPS, axis=1)[:, None, None, :]


def norm_torch(x, scale, bias):
    import torch.nn.functional as F

    return F.silu(F.group_norm(x, GROUPS, scale, bias, EPS))


# adaLN: tokens h [B, N, C], scale and shift [B, 1, C]


def adaln_jdiff(h, scale, shift):
    return layers.layer_norm(h) * (1 + scale) + shift


def adaln_affine(h, scale, shift):
    """The norm's factor and the modulation's multiplied first."""
    h = h - h.mean(-1, keepdims=True)
    return h * (jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6) * (1 + scale)) + shift


def adaln_one_pass(h, scale, shift):
    """E[x^2] - E[x]^2: not accurate."""
    mean = h.mean(-1, keepdims=True)
    variance = jnp.square(h).mean(-1, keepdims=True) - jnp.square(mean)
    return (h - mean) * jax.lax.rsqrt(variance + 1e-6) * (1 + scale) + shift


def adaln_products(h, scale, shift):
    """Means as products with a vector of ones."""
    ones = jnp.full((h.shape[-1], 1), 1 / h.shape[-1])
    h = h - h @ ones
    return h * jax.lax.rsqrt(jnp.square(h) @ ones + 1e-6) * (1 + scale) + shift


def adaln_torch(h, scale, shift):
    import torch.nn.functional as F

    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


# Attention: q, k, v [B, N, heads, D]


def attention_usual(q, k, v):
    """Heads in the third axis, the map normalised ahead of its product with v."""
    maps = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(maps), v)


def attention_torch(q, k, v):
    import torch.nn.functional as F

    heads_first = (a.transpose(1, 2) for a in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


WAYS = {
    "GroupNorm + SiLU": {
        "jdiff": norm_jdiff,
        "a view of groups": norm_view,
        "a x + b": norm_affine,
        "one pass (inaccurate)": norm_one_pass,
        "sums as products": norm_products,
        "PyTorch": norm_torch,
    },
    "adaLN": {
        "jdiff": adaln_jdiff,
        "factors first": adaln_affine,
        "one pass (inaccurate)": adaln_one_pass,
        "sums as products": adaln_products,
        "PyTorch": adaln_torch,
    },
    "attention": {
        "jdiff": attention.dot_product,
        "by_head": attention.by_head,
        "as usual": attention_usual,
        "jax.nn.dot_product_attention": jax.nn.dot_product_attention,
        "PyTorch": attention_torch,
    },
}

#: Shapes of the first input: what U-Nets, DiT-S/2, XL/2 and SD3 have.
SIZES = {
    "GroupNorm + SiLU": [(4, 32, 32, 128), (2, 64, 64, 320), (4, 16, 16, 640)],
    "adaLN": [(4, 256, 384), (2, 256, 1152), (2, 1024, 1536)],
    "attention": [(4, 256, 6, 64), (2, 256, 16, 72), (2, 1024, 8, 64)],
}
TINY = {"GroupNorm + SiLU": [(2, 8, 8, 64)], "adaLN": [(2, 16, 64)], "attention": [(2, 16, 2, 8)]}


def inputs(what: str, shape: tuple[int, ...]) -> list[np.ndarray]:
    """The arguments of a way, and the gradient that comes back to it."""
    normal = lambda *shape: np.random.default_rng(0).normal(size=shape).astype(np.float32)
    if what == "attention":
        return [normal(*shape)] * 4
    vector = normal(shape[-1]) if what != "adaLN" else normal(shape[0], 1, shape[-1])
    return [normal(*shape), vector, vector, normal(*shape)]


def ours(way, args):
    """Forward and gradient of a way in jax, as calls without arguments."""
    forward = jax.jit(way)
    backward = jax.jit(lambda *args: jax.vjp(way, *args[:-1])[1](args[-1]))
    args = [jnp.asarray(a) for a in args]
    return functools.partial(forward, *args[:-1]), functools.partial(backward, *args)


def theirs(way, args):
    """The same in PyTorch, on as many threads, images as it has them: channels before pixels."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    first = lambda a: np.ascontiguousarray(np.moveaxis(a, -1, 1)) if way is norm_torch else a
    tensors = [torch.from_numpy(first(a) if a.ndim == 4 else a).clone() for a in args]
    *args, cotangent = tensors

    def forward():
        with torch.no_grad():
            way(*args)

    def backward():
        leaves = [a.detach().requires_grad_() for a in args]
        torch.autograd.grad(way(*leaves), leaves, cotangent)

    return forward, backward


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="one tiny size of each, one round")
    p.add_argument("--rounds", type=int, default=7, help="repetitions, the best counts (default 7)")
    p.add_argument("--only", choices=WAYS, action="append", help="leave out the others")
    a = p.parse_args()
    for what in a.only or WAYS:
        rows = []
        for shape in (TINY if a.quick else SIZES)[what]:
            args, forward, backward = inputs(what, shape), {}, {}
            for name, way in WAYS[what].items():
                try:
                    pair = theirs(way, args) if name == "PyTorch" else ours(way, args)
                except ImportError:
                    continue  # without the extra `parity`
                forward[name], backward[name] = pair
                if name != "PyTorch":
                    np.testing.assert_allclose(
                        forward[name](), forward["jdiff"](), rtol=1e-3, atol=1e-3
                    )
            rounds = 1 if a.quick else a.rounds
            fast, slow = race(forward, rounds), race(backward, rounds)
            ms = [f"{1e3 * seconds['jdiff']:.2f}" for seconds in (fast, slow)]
            rows.append((f"{list(shape)} jdiff, ms: forward, gradient", ", ".join(ms), "", ""))
            for name in list(forward)[1:]:
                ratios = [seconds[name] / seconds["jdiff"] for seconds in (fast, slow)]
                rows.append((f"    {name} / jdiff", "{:.2f}, {:.2f}".format(*ratios), "", ""))
        table(what, rows)


if __name__ == "__main__":
    main()
