"""The networks of benchmarks/models.py as plain functions: what someone would write by hand in jax.

No modules and no checks: dictionaries of weights, the ones of jdiff's networks, and the operations
in the papers' order, norms and attention as usually written. They return what jdiff's return.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def dense(p, x):
    y = jnp.tensordot(x, p["kernel"].astype(x.dtype), 1)
    return y + p["bias"].astype(x.dtype) if "bias" in p else y


def conv(p, x, stride=1, padding="SAME"):
    kernel = p["kernel"].astype(x.dtype)
    layout = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, dimension_numbers=layout)
    return y + p["bias"].astype(x.dtype)


def layer_norm(x, p=None, eps=1e-6):
    y = x.astype(jnp.float32)
    y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + eps)
    return (y if p is None else y * p["scale"] + p["bias"]).astype(x.dtype)


def group_norm(p, x, groups, eps):
    y = x.astype(jnp.float32).reshape(*x.shape[:3], groups, -1)
    mean, variance = y.mean((1, 2, 4), keepdims=True), y.var((1, 2, 4), keepdims=True)
    y = ((y - mean) * jax.lax.rsqrt(variance + eps)).reshape(x.shape)
    return (y * p["scale"] + p["bias"]).astype(x.dtype)


def attention(q, k, v, heads):
    fused = "cudnn" if q.dtype == jnp.bfloat16 else None
    split = [a.reshape(a.shape[0], -1, heads, a.shape[-1] // heads) for a in (q, k, v)]
    return jax.nn.dot_product_attention(*split, implementation=fused).reshape(q.shape)


def waves(t, channels):
    angles = t[:, None] * 10_000.0 ** -(jnp.arange(channels // 2) / (channels // 2))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def embed(p, t, channels, name="time"):
    return dense(p[name + "2"], jax.nn.silu(dense(p[name + "1"], waves(t, channels))))


def positions(rows, columns, width, spacing=1.0, start=(0, 0)):
    """Sines and cosines of the column, then of the row: [rows * columns, width]."""
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    row, column = np.meshgrid(
        np.arange(rows) + start[0], np.arange(columns) + start[1], indexing="ij"
    )
    parts = [
        f(spacing * i.reshape(-1, 1) * frequencies) for i in (column, row) for f in (np.sin, np.cos)
    ]
    return np.concatenate(parts, axis=1).astype(np.float32)


def patches(x, p):
    b, h, w, c = x.shape
    x = x.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def image(tokens, p, rows, columns):
    x = tokens.reshape(len(tokens), rows, columns, p, p, -1).swapaxes(2, 3)
    return x.reshape(len(tokens), rows * p, columns * p, -1).astype(jnp.float32)


def modulate(x, scale, shift):
    return layer_norm(x) * (1 + scale) + shift


def parts(p, c, number, dtype):
    return jnp.split(dense(p, c.astype(dtype))[:, None], number, axis=-1)


def mlp(p, x):
    return dense(p["mlp2"], jax.nn.gelu(dense(p["mlp1"], x), approximate=True))


def dit(fields, params, x, t, cond, dtype=jnp.float32):
    """DiT with adaLN-Zero."""
    patch, width, heads = fields["patch"], fields["width"], fields["heads"]
    rows, columns = x.shape[1] // patch, x.shape[2] // patch
    c = jax.nn.silu(embed(params, t, 256) + params["label"][cond["label"]])
    h = dense(params["embed_patches"], patches(x, patch).astype(dtype))
    h = h + positions(rows, columns, width).astype(dtype)

    def block(h, p):
        shift1, scale1, gate1, shift2, scale2, gate2 = parts(p["modulation"], c, 6, dtype)
        q, k, v = jnp.unstack(dense(p["qkv"], modulate(h, scale1, shift1)), axis=-2)
        h = h + gate1 * dense(p["project"], attention(q, k, v, heads))
        return h + gate2 * mlp(p, modulate(h, scale2, shift2)), None

    if fields.get("scan"):
        h, _ = jax.lax.scan(block, h, params["blocks"])
    else:
        for i in range(fields["depth"]):
            h, _ = block(h, params["blocks"][str(i)])
    shift, scale = parts(params["modulation"], c, 2, dtype)
    return image(dense(params["out"], modulate(h, scale, shift)), patch, rows, columns)


def mmdit(fields, params, x, t, cond, dtype=jnp.float32):
    """MM-DiT as in SD3-medium."""
    patch, width, heads = fields["patch"], fields["width"], fields["heads"]
    rows, columns = x.shape[1] // patch, x.shape[2] // patch
    p = params["conditions"]
    pooled = dense(p["pooled2"], jax.nn.silu(dense(p["pooled1"], cond["pooled"])))
    c = jax.nn.silu(embed(p, t, 256) + pooled)
    table, base = fields["positions"], fields["image_size"] // patch
    places = positions(
        rows, columns, width, base / table, [(table - n) // 2 for n in (rows, columns)]
    )
    h = dense(params["embed_patches"], patches(x, patch).astype(dtype)) + places.astype(dtype)
    text = dense(params["embed_text"], cond["text"].astype(dtype))
    qkv = lambda p, y: [dense(p["qkv"][name], y) for name in "qkv"]

    def leave(p, h, seen, vectors):
        gate1, shift2, scale2, gate2 = vectors
        h = h + gate1 * dense(p["project"], seen)
        return h + gate2 * mlp(p, modulate(h, scale2, shift2))

    def block(p, h, text, last=False):
        of_image = parts(p["image"]["modulation"], c, 6, dtype)
        of_text = parts(p["text"]["modulation"], c, 2 if last else 6, dtype)
        scale, shift = of_text[:2] if last else of_text[1::-1]
        of_places = [qkv(p["text"], modulate(text, scale, shift)),
                     qkv(p["image"], modulate(h, of_image[1], of_image[0]))]  # fmt: skip
        seen = attention(*(jnp.concatenate(pair, axis=1) for pair in zip(*of_places)), heads)
        length = text.shape[1]
        h = leave(p["image"], h, seen[:, length:], of_image[2:])
        return h, None if last else leave(p["text"], text, seen[:, :length], of_text[2:])

    for i in range(fields["depth"] - 1):
        h, text = block(params["blocks"][str(i)], h, text)
    h, _ = block(params["last"], h, text, last=True)
    scale, shift = parts(params["modulation"], c, 2, dtype)
    return image(dense(params["out"], modulate(h, scale, shift)), patch, rows, columns)


def residual(p, x, embedding, *, groups, eps, scale_shift, resample=lambda x: x):
    """A U-Net's residual block, and its attention if it has one."""
    h = jax.nn.silu(group_norm(p["norm1"], x, groups(x.shape[-1]), eps))
    h = conv(p["conv1"], resample(h))
    affine = dense(p["affine"], embedding)[:, None, None].astype(h.dtype)
    norm = lambda h: group_norm(p["norm2"], h, groups(h.shape[-1]), eps)
    if scale_shift:
        scale, shift = jnp.split(affine, 2, axis=-1)
        h = norm(h) * (1 + scale) + shift
    else:
        h = norm(h + affine)
    h = conv(p["conv2"], jax.nn.silu(h))
    x = resample(x)
    x = h + (conv(p["skip"], x) if "skip" in p else x)
    if "qkv" in p:
        y = conv(p["qkv"], group_norm(p["norm3"], x, groups(x.shape[-1]), eps))
        q, k, v = jnp.split(y, 3, axis=-1)
        x = x + conv(p["project"], attention(q, k, v, max(1, x.shape[-1] // 64)))
    return x


def halve(x):
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def double(x):
    return x.repeat(2, axis=1).repeat(2, axis=2)


def in_order(p):
    return [p[str(i)] for i in range(len(p))]


def adm(fields, params, x, t, cond, dtype=jnp.float32):
    """ADM's U-Net as configured by EDM."""
    label = jax.nn.one_hot(cond["label"], fields["num_classes"])
    embedding = jax.nn.silu(embed(params, t, fields["channels"]) + dense(params["label"], label))
    groups = lambda channels: min(32, channels // 4)
    block = functools.partial(residual, groups=groups, eps=1e-5, scale_shift=True)
    h = conv(params["stem"], x.astype(dtype))
    skips = [h]
    for stage in in_order(params["encoder"]):
        if "resample" in stage:
            h = block(stage["resample"], h, embedding, resample=halve)
            skips.append(h)
        for p in in_order(stage["blocks"]):
            h = block(p, h, embedding)
            skips.append(h)
    for p in in_order(params["middle"]):
        h = block(p, h, embedding)
    for stage in in_order(params["decoder"]):
        if "resample" in stage:
            h = block(stage["resample"], h, embedding, resample=double)
        for p in in_order(stage["blocks"]):
            h = block(p, jnp.concatenate([h, skips.pop()], axis=-1), embedding)
    h = jax.nn.silu(group_norm(params["out_norm"], h, groups(h.shape[-1]), 1e-5))
    return conv(params["out_conv"], h).astype(jnp.float32)


def transformer(p, x, text, heads):
    """Self-attention, attention to the text and a gated MLP on the pixels of an image."""
    project = lambda p, x: conv(p, x) if p["kernel"].ndim == 4 else dense(p, x)

    def attend(p, y, context):
        q, k, v = dense(p["q"], y), dense(p["k"], context), dense(p["v"], context)
        return dense(p["project"], attention(q, k, v, heads))

    h = project(p["project_in"], group_norm(p["norm"], x, 32, 1e-6))
    for b in in_order(p["blocks"]):
        y = layer_norm(h, b["norm1"], 1e-5)
        h = h + attend(b["self_attention"], y, y)
        h = h + attend(b["cross_attention"], layer_norm(h, b["norm2"], 1e-5), text)
        y, gate = jnp.split(dense(b["mlp1"], layer_norm(h, b["norm3"], 1e-5)), 2, axis=-1)
        h = h + dense(b["mlp2"], y * jax.nn.gelu(gate, approximate=False))
    return x + project(p["project_out"], h)


def sd(fields, params, x, t, cond, dtype=jnp.float32):
    """The text-conditional U-Net of Stable Diffusion 1."""
    embedding = jax.nn.silu(embed(params, t, fields["widths"][0]))
    text = cond["text"].astype(dtype)
    block = functools.partial(
        residual, embedding=embedding, groups=lambda _: 32, eps=1e-5, scale_shift=False
    )
    look = functools.partial(transformer, text=text, heads=8)
    h = conv(params["stem"], x.astype(dtype))
    skips = [h]
    for stage in in_order(params["encoder"]):
        for i, p in enumerate(in_order(stage["blocks"])):
            h = block(p, h)
            h = look(stage["transformers"][str(i)], h) if "transformers" in stage else h
            skips.append(h)
        if "resample" in stage:
            h = conv(stage["resample"]["conv"], h, 2, [(1, 1), (1, 1)])
            skips.append(h)
    first, second = in_order(params["middle"]["blocks"])
    h = block(second, look(params["middle"]["transformers"]["0"], block(first, h)))
    for stage in in_order(params["decoder"]):
        for i, p in enumerate(in_order(stage["blocks"])):
            h = block(p, jnp.concatenate([h, skips.pop()], axis=-1))
            h = look(stage["transformers"][str(i)], h) if "transformers" in stage else h
        if "resample" in stage:
            h = conv(stage["resample"]["conv"], double(h))
    h = jax.nn.silu(group_norm(params["out_norm"], h, 32, 1e-5))
    return conv(params["out_conv"], h).astype(jnp.float32)
