"""Joint attention of two streams, against the formulas written out, and its conditions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jdiff import models
from jdiff.models import joint

RANDOM = np.random.default_rng(0)
WIDTH, HEADS = 8, 2
H = tuple(RANDOM.standard_normal((2, n, WIDTH)).astype(np.float32) for n in (5, 3))
C = RANDOM.standard_normal((2, WIDTH)).astype(np.float32)
TEXT_MASK = np.asarray([[True, True, False], [True, False, True]])
ANGLES = tuple(RANDOM.uniform(-3, 3, (n, WIDTH // HEADS // 2)).astype(np.float32) for n in (5, 3))


@functools.cache
def block():
    build = functools.partial(joint.JointBlock, WIDTH, HEADS, qk_norm=True, dtype=jnp.float32)
    apply, params = models.init(lambda rngs: build(rngs=rngs), jax.random.key(0))
    random = np.random.default_rng(1)
    noise = lambda w: np.asarray(w) + 0.5 * random.standard_normal(w.shape, np.float32)
    return apply, params, jax.tree.map(noise, params)


def run(params, h, mask, angles):
    apply, *_ = block()
    _, places = joint.text_tokens({"text": h[1], "text_mask": mask}, h[0].shape[1])
    return jax.jit(lambda p: apply.merge(p)(h, C, places, angles))(params)


def test_starts_as_the_identity():
    _, params, _ = block()
    for before, after in zip(H, run(params, H, None, (None, None))):
        np.testing.assert_array_equal(before, after)


def numpy_block(params, h, mask, angles):
    """SD3's block (Esser et al. 2024, figure 2b) in numpy, head by head."""

    def linear(p, v):
        return v @ p["kernel"] + p["bias"]

    def layer_norm(v):
        return (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-6)

    def per_head(v, scale, turn):
        v = v.reshape(*v.shape[:2], HEADS, -1)
        v = v / np.sqrt(np.square(v).mean(-1, keepdims=True) + 1e-6) * scale
        z = (v[..., ::2] + 1j * v[..., 1::2]) * np.exp(1j * turn)[:, None]
        return np.stack([z.real, z.imag], -1).reshape(v.shape)

    parts, projected = [], []
    for name, tokens, turn in zip(("image", "text"), h, angles):
        p = params[name]
        parts.append(np.split(linear(p["modulation"], C)[:, None], 6, -1))
        shift, scale = parts[-1][:2]
        y = layer_norm(tokens) * (1 + scale) + shift
        q, k = (
            per_head(linear(p["qkv"][n], y), p["qkv"][f"norm_{n}"]["scale"], turn) for n in "qk"
        )
        projected.append((q, k, linear(p["qkv"]["v"], y).reshape(q.shape)))
    q, k, v = (np.concatenate(both, 1) for both in zip(*projected))
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(WIDTH / HEADS)
    seen = np.concatenate([np.ones((2, h[0].shape[1]), bool), mask], 1)
    logits = np.where(seen[:, None, None], logits, -np.inf)
    attended = np.einsum("bhqk,bkhd->bqhd", scipy.special.softmax(logits, -1), v)
    attended = attended.reshape(2, -1, WIDTH)
    cut = h[0].shape[1]
    out = []
    for name, tokens, (_, _, gate1, shift, scale, gate2), a in zip(
        ("image", "text"), h, parts, (attended[:, :cut], attended[:, cut:])
    ):
        p = params[name]
        tokens = tokens + gate1 * linear(p["project"], a)
        y = linear(p["mlp1"], layer_norm(tokens) * (1 + scale) + shift)
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        out.append(tokens + gate2 * linear(p["mlp2"], y))
    return out


def test_block_is_the_formula():
    *_, params = block()
    expected = numpy_block(params, H, TEXT_MASK, ANGLES)
    for ours, theirs in zip(run(params, H, TEXT_MASK, ANGLES), expected):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_masked_token_is_as_good_as_absent():
    *_, params = block()
    mask = np.asarray([[True, True, False]] * 2)
    image, text = run(params, H, mask, ANGLES)
    shorter = (H[0], H[1][:, :2])
    alone = run(params, shorter, None, (ANGLES[0], ANGLES[1][:2]))
    np.testing.assert_allclose(image, alone[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(text[:, :2], alone[1], rtol=1e-4, atol=1e-5)


CHECKS = {
    "text": ({"text": None}, r"needs cond\['text'\] of shape \[2, L, 6\]; cond has"),
    "text width": ({"text": np.zeros((2, 4, 5))}, r"cond\['text'\] \[2, L, 6\], not \[2, 4, 5\]"),
    "text batch": ({"text": np.zeros((1, 4, 6))}, r"cond\['text'\] \[2, L, 6\], not \[1, 4, 6\]"),
    "pooled": ({"pooled": None}, r"needs cond\['pooled'\] of shape \[2, 7\]; cond has"),
    "pooled width": ({"pooled": np.zeros((2, 6))}, r"cond\['pooled'\] \[2, 7\], not \[2, 6\]"),
    "mask": (
        {"text_mask": np.ones((2, 3), bool)},
        r"'text_mask'\] as bool \[2, 4\].*not bool \[2, 3",
    ),
    "mask dtype": ({"text_mask": np.ones((2, 4))}, r"'text_mask'\] as bool .*not float64 \[2, 4\]"),
}


@pytest.mark.parametrize(("changes", "message"), CHECKS.values(), ids=CHECKS)
def test_wrong_conditions_are_named(changes, message):
    cond = {"text": np.zeros((2, 4, 6)), "pooled": np.zeros((2, 7))} | changes
    cond = {name: value for name, value in cond.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        joint.check_text(None, cond, 2, width=6, pooled=7)
