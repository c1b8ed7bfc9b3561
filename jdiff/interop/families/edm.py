"""EDM's networks in their original layout: SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM).

The published files are pickles, which are not read here. Where PyTorch and the original code are,

    net = pickle.load(file)["ema"]
    config = {"_class_name": type(net).__name__, **net.init_kwargs}
    if config.get("embedding_type") == "fourier":
        config["freqs"] = net.model.map_noise.freqs.tolist()
    safetensors.torch.save_file(net.state_dict(), "diffusion_pytorch_model.safetensors")

and config.json beside it make the folder that `interop.load_component` opens. What the network is
told of the noise is the affair of the parameterisation: log(sigma) / 4 for EDMPrecond.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jdiff.errors import UserError, choose
from jdiff.interop.tables import Family, Kind, Move, Rule, conv, linear, norm
from jdiff.models.unet import UNet
from jdiff.models.unet_blocks import STYLES, Style, named_style

#: (default model_type, output channels for each of the image's) of the wrappers around a network.
PRECONDITIONERS: Mapping[str, tuple[str, int]] = {
    "EDMPrecond": ("DhariwalUNet", 1),
    "VPPrecond": ("SongUNet", 1),
    "VEPrecond": ("SongUNet", 1),
    "iDDPMPrecond": ("DhariwalUNet", 2),
}

#: What a config that does not say otherwise means, by model_type.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "SongUNet": {
        "label_dim": 0,
        "augment_dim": 0,
        "model_channels": 128,
        "channel_mult": (1, 2, 2, 2),
        "num_blocks": 4,
        "attn_resolutions": (16,),
        "dropout": 0.1,
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "resample_filter": (1, 1),
    },
    "DhariwalUNet": {
        "label_dim": 0,
        "augment_dim": 0,
        "model_channels": 192,
        "channel_mult": (1, 2, 3, 4),
        "num_blocks": 3,
        "attn_resolutions": (32, 16, 8),
        "dropout": 0.1,
    },
}

#: What `UNet` computes, of options that it does not have.
SERVED: Mapping[str, Any] = {"channel_mult_emb": 4, "decoder_type": "standard"}

_TIMES = {"positional": "sin_cos", "fourier": "fourier"}
_ENCODERS = {"standard": False, "residual": True}


def song_style(c: Mapping[str, Any]) -> Style:
    """The style of a SongUNet."""
    return Style(
        time=_TIMES[choose("SongUNet: embedding_type", c["embedding_type"], _TIMES)],
        time_width=c["channel_mult_noise"],
        skip_scale=math.sqrt(0.5),
        decoder_attention="last",
        taps=tuple(c["resample_filter"]),
        residual_encoder=_ENCODERS[choose("SongUNet: encoder_type", c["encoder_type"], _ENCODERS)],
    )


def build(cls: str, config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`UNet` and its fields, from the arguments that the wrapper `cls` was made with."""
    default, out = PRECONDITIONERS[cls]
    kind = choose(f"{cls}: model_type", config.get("model_type", default), DEFAULTS)
    for key, served in SERVED.items():
        if config.get(key, served) != served:
            raise UserError(f"{cls}: {key}={config[key]!r} is not served, only {served!r}.")
    for key in ("img_resolution", "img_channels"):
        if key not in config:
            raise UserError(f"{cls}: the config has no {key}; it has {sorted(config)}.")
    c = DEFAULTS[kind] | config
    style = song_style(c) if kind == "SongUNet" else STYLES["adm"]
    named = [name for name, known in STYLES.items() if known == style]
    fields = {
        "image_size": c["img_resolution"],
        "in_channels": c["img_channels"],
        "out_channels": out * c["img_channels"],
        "channels": c["model_channels"],
        "multipliers": tuple(c["channel_mult"]),
        "blocks": c["num_blocks"],
        "attention_sizes": tuple(c["attn_resolutions"]),
        "num_classes": c["label_dim"],
        "augment_dim": c["augment_dim"],
        "dropout": c["dropout"],
        "style": named[0] if named else style,
    }
    if style.time == "fourier":
        if "freqs" not in c:
            raise UserError(
                f"{cls}: embedding_type='fourier' draws its frequencies at random: the config "
                'needs them as "freqs", the tensor model.map_noise.freqs as a list.'
            )
        fields["frequencies"] = tuple(c["freqs"])
    return UNet, fields


def config_of(cls: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with which `cls` makes a `UNet` of these fields.

    Raises:
        UserError: for a network that is not one of EDM's.
    """
    parameters = inspect.signature(UNet.__init__).parameters
    f = {name: p.default for name, p in parameters.items()} | dict(fields)
    style = f["style"] if isinstance(f["style"], Style) else named_style(f["style"])
    config = {
        "img_resolution": f["image_size"],
        "img_channels": f["in_channels"],
        "label_dim": f["num_classes"],
        "augment_dim": f["augment_dim"],
        "model_channels": f["channels"],
        "channel_mult": list(f["multipliers"]),
        "num_blocks": f["blocks"],
        "attn_resolutions": list(f["attention_sizes"]),
        "dropout": f["dropout"],
        "model_type": "DhariwalUNet",
    }
    if style != STYLES["adm"]:
        encoders = {residual: name for name, residual in _ENCODERS.items()}
        times = {ours: name for name, ours in _TIMES.items()}
        config |= {
            "model_type": "SongUNet",
            "embedding_type": times.get(style.time, style.time),
            "channel_mult_noise": style.time_width,
            "encoder_type": encoders[style.residual_encoder],
            "resample_filter": list(style.taps),
        }
        if style.time not in times or song_style(config) != style:
            raise UserError(f"{cls} holds the styles ddpmpp, ncsnpp and adm, not {f['style']!r}.")
    if style.time == "fourier":
        given = f["frequencies"]
        if given is None:
            raise UserError(f"{cls}: name the frequencies of the network to write them down.")
        config["freqs"] = list(given)
    _, again = build(cls, config)
    for name in ("out_channels", "low_res_channels", "text_width", "scalars", "time_scale"):
        if f[name] and f[name] != again.get(name, parameters[name].default):
            raise UserError(f"{cls} has no {name}={f[name]!r}.")
    return config


def _interleaved(a: np.ndarray) -> np.ndarray:
    """Rows (part, channel) of q, k and v as (channel, part)."""
    return a.reshape(3, -1, *a.shape[1:]).swapaxes(0, 1).reshape(a.shape)


def _parted(a: np.ndarray) -> np.ndarray:
    """Rows (channel, part) as (part, channel); a channel's q, k and v are neighbours there."""
    return a.reshape(-1, 3, *a.shape[1:]).swapaxes(0, 1).reshape(a.shape)


def _qkv() -> Kind:
    _, kernel = conv.leaves["kernel"]
    ours = Move(lambda a: kernel.ours(_parted(a)), lambda a: _interleaved(kernel.theirs(a)))
    return Kind({"kernel": ("weight", ours), "bias": ("bias", Move(_parted, _interleaved))})


qkv = _qkv()
"""A 1 x 1 convolution to the queries, keys and values of a pixel."""

_BLOCK: Mapping[str, tuple[str, Kind]] = {
    "norm1": ("norm0", norm),
    "conv1": ("conv0", conv),
    "affine": ("affine", linear),
    "norm2": ("norm1", norm),
    "conv2": ("conv1", conv),
    "skip": ("skip", conv),
    "norm3": ("norm2", norm),
    "qkv": ("qkv", qkv),
    "project": ("proj", conv),
}


def levels(
    image_size: int, count: int, prefix: str, block: Mapping[str, tuple[str, Kind]]
) -> tuple[Rule, ...]:
    """The rules of the blocks of a U-Net, which theirs number by the resolution, r x r."""
    pairs = []
    for level in range(count):
        r, below = f"{image_size >> level}x{image_size >> level}", count - 1 - level
        pairs += [
            (f"encoder/{level}/blocks/{{j}}", f"{prefix}enc.{r}_block{{j}}"),
            (f"encoder/{level}/resample", f"{prefix}enc.{r}_down"),
            (f"decoder/{below}/blocks/{{j}}", f"{prefix}dec.{r}_block{{j}}"),
            (f"decoder/{below}/resample", f"{prefix}dec.{r}_up"),
        ]
        if level == count - 1:
            pairs.append(("middle/{j}", f"{prefix}dec.{r}_in{{j}}"))
    return tuple(
        Rule(f"{ours}/{layer}", f"{theirs}.{name}", kind)
        for ours, theirs in pairs
        for layer, (name, kind) in block.items()
    )


def table(fields: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules for images of this size."""
    size, count = fields["image_size"], len(fields["multipliers"])
    top = f"model.dec.{size}x{size}_aux"
    out_norm, out_conv = f"{top}_norm", f"{top}_conv"
    if fields["style"] in ("adm", STYLES["adm"]):
        out_norm, out_conv = "model.out_norm", "model.out_conv"
    rules = [
        Rule("time1", "model.map_layer0", linear),
        Rule("time2", "model.map_layer1", linear),
        Rule("label", "model.map_label", linear),
        Rule("augment", "model.map_augment", linear),
        Rule("stem", f"model.enc.{size}x{size}_conv", conv),
        Rule("out_norm", out_norm, norm),
        Rule("out_conv", out_conv, conv),
    ]
    for level in range(1, count):
        r = f"{size >> level}x{size >> level}"
        rules.append(Rule(f"encoder/{level}/image", f"model.enc.{r}_aux_residual", conv))
    return (*rules, *levels(size, count, "model.", _BLOCK))


def _family(cls: str) -> Family:
    return Family(
        cls,
        lambda config: build(cls, config),
        lambda fields: config_of(cls, fields),
        table,
        (r".*\.resample_filter", r"model\.map_noise\.freqs", "u"),
    )


FAMILIES: tuple[Family, ...] = tuple(map(_family, PRECONDITIONERS))
