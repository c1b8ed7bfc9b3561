"""EDM's and EDM2's networks said again in torch, as functions of weights that they name themselves.

A `Weights` draws a tensor when a network first asks for it, so names and shapes are those that the
layers of the papers' figures need in the order and under the names of the published files.
"""

import math

import torch
import torch.nn.functional as F


class Weights(dict):
    """Tensors by name, drawn when first asked for."""

    def __init__(self, std: float = 0.1):
        super().__init__()
        self.std, self.generator = std, torch.Generator().manual_seed(0)

    def __call__(self, name: str, *shape: int, centre: float = 0.0) -> torch.Tensor:
        if name not in self:
            self[name] = centre + self.std * torch.randn(shape, generator=self.generator)
        return self[name]


def conv(w, name, x, width, size):
    kernel = w(f"{name}.weight", width, x.shape[1], size, size)
    return F.conv2d(x, kernel, w(f"{name}.bias", width), padding=size // 2)


def linear(w, name, x, width, bias=True):
    return F.linear(
        x, w(f"{name}.weight", width, x.shape[1]), w(f"{name}.bias", width) if bias else None
    )


def norm(w, name, x, eps):
    width = x.shape[1]
    scale, shift = w(f"{name}.weight", width, centre=1.0), w(f"{name}.bias", width)
    return F.group_norm(x, min(32, width // 4), scale, shift, eps)


def resample(x, direction, taps, margin=None):
    """Doubles or halves an image with the separable filter `taps`, padded by `margin`."""
    line = torch.tensor(taps, dtype=x.dtype) / sum(taps)
    kernel = torch.outer(line, line).expand(x.shape[1], 1, -1, -1)
    margin = len(taps) // 2 - 1 if margin is None else margin
    shape = {"stride": 2, "padding": margin, "groups": x.shape[1]}
    if direction == "up":
        return F.conv_transpose2d(x, 4 * kernel, **shape)
    return F.conv2d(x, kernel, **shape) if direction == "down" else x


def attend(qkv, heads):
    """Channel by channel, query, key and value lie side by side."""
    batch, width, height, side = qkv.shape
    q, k, v = qkv.reshape(batch, heads, width // heads // 3, 3, height * side).unbind(3)
    weights = torch.softmax(q.mT @ k / math.sqrt(q.shape[2]), dim=-1)
    return (v @ weights.mT).reshape(batch, width // 3, height, side)


def block(w, name, x, embedding, width, adm, taps, direction=None, attends=False):
    eps, factor = (1e-5, 1.0) if adm else (1e-6, math.sqrt(0.5))
    h = resample(F.silu(norm(w, f"{name}.norm0", x, eps)), direction, taps)
    h = conv(w, f"{name}.conv0", h, width, 3)
    if adm:
        affine = linear(w, f"{name}.affine", embedding, 2 * width)[..., None, None]
        scale, shift = affine.split(width, dim=1)
        h = norm(w, f"{name}.norm1", h, eps) * (1 + scale) + shift
    else:
        h = h + linear(w, f"{name}.affine", embedding, width)[..., None, None]
        h = norm(w, f"{name}.norm1", h, eps)
    h = conv(w, f"{name}.conv1", F.silu(h), width, 3)
    x_width, x = x.shape[1], resample(x, direction, taps)
    if x_width != width or (direction and not adm):
        x = conv(w, f"{name}.skip", x, width, 1)
    x = (x + h) * factor
    if attends:
        qkv = conv(w, f"{name}.qkv", norm(w, f"{name}.norm2", x, eps), 3 * width, 1)
        h = conv(w, f"{name}.proj", attend(qkv, width // 64 if adm else 1), width, 1)
        x = (x + h) * factor
    return x


def edm(w, config, x, t, label, augment):
    """SongUNet or DhariwalUNet, of [B, C, H, W]; `label` is one-hot."""
    adm, size, base = (config[k] for k in ("adm", "img_resolution", "model_channels"))
    taps = config.get("resample_filter", [1, 1])
    if "freqs" in config:
        angles = 2 * math.pi * t[:, None] * torch.tensor(config["freqs"])
    else:
        half = base // 2
        powers = torch.arange(half) / (half if adm else half - 1)
        angles = t[:, None] * 10_000.0**-powers
    waves = [angles.cos(), angles.sin()] if adm else [angles.sin(), angles.cos()]
    c = torch.cat(waves, dim=1)
    if not adm:
        scaled = label * math.sqrt(label.shape[1])
        c = c + linear(w, "model.map_label", scaled, c.shape[1])
    c = c + linear(w, "model.map_augment", augment, c.shape[1], bias=False)
    c = F.silu(linear(w, "model.map_layer0", c, 4 * base))
    c = linear(w, "model.map_layer1", c, 4 * base)
    if adm:
        c = c + linear(w, "model.map_label", label, 4 * base, bias=False)
    c = F.silu(c)

    widths = [base * m for m in config["channel_mult"]]
    kwargs = {"adm": adm, "taps": taps}
    attends = [size >> level in config["attn_resolutions"] for level in range(len(widths))]
    stem = widths[0] if adm else base
    aux, h, skips = x, conv(w, f"model.enc.{size}x{size}_conv", x, stem, 3), []
    skips.append(h)
    for level, width in enumerate(widths):
        r = f"{size >> level}x{size >> level}"
        if level:
            h = block(w, f"model.enc.{r}_down", h, c, h.shape[1], direction="down", **kwargs)
            if config.get("encoder_type") == "residual":
                name, now = f"model.enc.{r}_aux_residual", h.shape[1]
                kernel = w(f"{name}.weight", now, aux.shape[1], 3, 3)
                # The convolution reaches beyond the border by what the filter then takes away.
                wide = F.conv2d(aux, kernel, padding=len(taps) // 2)
                shrunk = resample(wide, "down", taps, margin=0)
                h = aux = (h + shrunk + w(f"{name}.bias", now)[:, None, None]) * math.sqrt(0.5)
            skips.append(h)
        for j in range(config["num_blocks"]):
            h = block(w, f"model.enc.{r}_block{j}", h, c, width, attends=attends[level], **kwargs)
            skips.append(h)
    h = block(w, f"model.dec.{r}_in0", h, c, width, attends=True, **kwargs)
    h = block(w, f"model.dec.{r}_in1", h, c, width, **kwargs)
    for level in reversed(range(len(widths))):
        r, last = f"{size >> level}x{size >> level}", config["num_blocks"]
        if level < len(widths) - 1:
            h = block(w, f"model.dec.{r}_up", h, c, h.shape[1], direction="up", **kwargs)
        for j in range(last + 1):
            h = torch.cat([h, skips.pop()], dim=1)
            here = attends[level] and (adm or j == last)
            h = block(w, f"model.dec.{r}_block{j}", h, c, widths[level], attends=here, **kwargs)
    names = ("model.out_norm", "model.out_conv")
    if not adm:
        names = (f"model.dec.{r}_aux_norm", f"model.dec.{r}_aux_conv")
    h = F.silu(norm(w, names[0], h, 1e-5 if adm else 1e-6))
    return conv(w, names[1], h, x.shape[1], 3)


def magnitude_preserving(w, name, x, width, size=0, gain=1.0):
    """A layer of EDM2: its kernel has length 1 for each output."""
    shape = (width, x.shape[1]) + (size, size) * bool(size)
    kernel = w(f"{name}.weight", *shape)
    fan_in = kernel[0].numel()
    rms = kernel.flatten(1).square().mean(dim=1).sqrt().reshape(-1, *[1] * (kernel.ndim - 1))
    kernel = kernel / (rms + 1e-4) * gain / math.sqrt(fan_in)
    return F.conv2d(x, kernel, padding=size // 2) if size else F.linear(x, kernel)


def pixel_norm(x, dim):
    return x / (x.square().mean(dim=dim, keepdim=True).sqrt() + 1e-4)


def lerp(a, b, t):
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def block2(w, name, x, c, width, side, direction=None, attends=False):
    x = resample(x, direction, [1, 1])
    skip = lambda x: (
        magnitude_preserving(w, f"{name}.conv_skip", x, width, 1) if x.shape[1] != width else x
    )
    if side == "enc":
        x = pixel_norm(skip(x), 1)
    h = magnitude_preserving(w, f"{name}.conv_res0", F.silu(x) / 0.596, width, 3)
    gain = w(f"{name}.emb_gain")
    scale = 1 + magnitude_preserving(w, f"{name}.emb_linear", c, width, gain=gain)
    h = F.silu(h * scale[..., None, None]) / 0.596
    h = magnitude_preserving(w, f"{name}.conv_res1", h, width, 3)
    x = lerp(skip(x) if side == "dec" else x, h, 0.3)
    if attends:
        heads = width // 8
        qkv = magnitude_preserving(w, f"{name}.attn_qkv", x, 3 * width, 1)
        parts = qkv.reshape(len(x), heads, 8, 3, *x.shape[2:])
        h = attend(pixel_norm(parts, 2).reshape(qkv.shape), heads)
        x = lerp(x, magnitude_preserving(w, f"{name}.attn_proj", h, width, 1), 0.3)
    return x.clip(-256, 256)


def edm2(w, config, x, t, label):
    """EDM2's network with heads of 8 channels, of [B, C, H, W]; `label` is one-hot."""
    size, widths = config["img_resolution"], [config["model_channels"] * m for m in (1, 2)]
    freqs, phases = (torch.tensor(config[k]) for k in ("freqs", "phases"))
    c = math.sqrt(2) * torch.cos(t[:, None] * freqs + phases)
    c = magnitude_preserving(w, "unet.emb_noise", c, widths[-1])
    hot = label * math.sqrt(label.shape[1])
    c = F.silu(lerp(c, magnitude_preserving(w, "unet.emb_label", hot, widths[-1]), 0.5)) / 0.596
    big, low = f"{size}x{size}", f"{size // 2}x{size // 2}"
    ones = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    h = magnitude_preserving(w, f"unet.enc.{big}_conv", ones, widths[0], 3)
    skips = [h]
    for name, width, kind in (
        (f"{big}_block0", widths[0], {}),
        (f"{low}_down", widths[0], {"direction": "down"}),
        (f"{low}_block0", widths[1], {"attends": True}),
    ):
        h = block2(w, f"unet.enc.{name}", h, c, width, "enc", **kind)
        skips.append(h)
    for name, width, kind in (
        (f"{low}_in0", widths[1], {"attends": True}),
        (f"{low}_in1", widths[1], {}),
        (f"{low}_block0", widths[1], {"attends": True}),
        (f"{low}_block1", widths[1], {"attends": True}),
        (f"{big}_up", widths[1], {"direction": "up"}),
        (f"{big}_block0", widths[0], {}),
        (f"{big}_block1", widths[0], {}),
    ):
        if "block" in name:
            skip = skips.pop()
            n, m = h.shape[1], skip.shape[1]
            both = [h * math.sqrt((n + m) / 2 / n), skip * math.sqrt((n + m) / 2 / m)]
            h = torch.cat(both, dim=1)
        h = block2(w, f"unet.dec.{name}", h, c, width, "dec", **kind)
    return magnitude_preserving(w, "unet.out_conv", h, x.shape[1], 3, gain=w("unet.out_gain"))
