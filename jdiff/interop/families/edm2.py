"""EDM2's networks in their original layout.

The published files are pickles, which are not read here. Where PyTorch and the original code are,

    net = pickle.load(file)["ema"]
    config = {"_class_name": "EDM2", **net.init_kwargs}
    config["freqs"] = net.unet.emb_fourier.freqs.tolist()
    config["phases"] = net.unet.emb_fourier.phases.tolist()
    safetensors.torch.save_file(net.state_dict(), "diffusion_pytorch_model.safetensors")

and config.json beside it make the folder that `interop.load_component` opens. The head that
predicts the loss's log variance is no part of the network and is left.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from jdiff.errors import UserError
from jdiff.interop.families.edm import levels, qkv
from jdiff.interop.tables import Family, Rule, conv, leaf, linear
from jdiff.models.edm2 import EDM2

CLS = "EDM2"

#: Our field by their argument.
NAMES: Mapping[str, str] = {
    "img_resolution": "image_size",
    "img_channels": "in_channels",
    "label_dim": "num_classes",
    "model_channels": "channels",
    "channel_mult": "multipliers",
    "num_blocks": "blocks",
    "attn_resolutions": "attention_sizes",
    "channels_per_head": "head_channels",
    "dropout": "dropout",
    "label_balance": "label_balance",
    "concat_balance": "concat_balance",
    "res_balance": "residual_balance",
    "attn_balance": "attention_balance",
    "clip_act": "clip",
    "freqs": "frequencies",
    "phases": "phases",
}
#: Those of the original are ours.
DEFAULTS: Mapping[str, Any] = {
    name: field.default for name, field in inspect.signature(EDM2.__init__).parameters.items()
}
NEEDED = ("img_resolution", "img_channels", "label_dim", "freqs", "phases")


def fields_from_config(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`EDM2` and its fields."""
    if missing := [key for key in NEEDED if key not in config]:
        raise UserError(f"{CLS}: the config has no {', '.join(missing)}; it has {sorted(config)}.")
    multipliers = tuple(config.get("channel_mult", (1, 2, 3, 4)))
    served = {
        "channel_mult_noise": (None, multipliers[0]),
        "channel_mult_emb": (None, max(multipliers)),
        "resample_filter": ([1, 1],),
    }
    for key, values in served.items():
        if config.get(key, values[0]) not in values:
            raise UserError(f"{CLS}: {key}={config[key]!r} is not served, only {values[-1]!r}.")
    if config.get("clip_act", 256) is None:
        raise UserError(f"{CLS}: clip_act=None is not served, only a bound.")
    fields = {ours: config.get(key, DEFAULTS[ours]) for key, ours in NAMES.items()}
    return EDM2, {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with which the original code makes an `EDM2` of these fields.

    Raises:
        UserError: for a field that the original has not.
    """
    f = dict(DEFAULTS) | dict(fields)
    if f["out_channels"] not in (None, f["in_channels"]) or f["time_scale"] != 1.0:
        raise UserError(f"{CLS} has as many channels out as in, and time_scale 1.")
    if f["frequencies"] is None or f["phases"] is None:
        raise UserError(f"{CLS}: give frequencies and phases, to write them down.")
    config = {theirs: f[ours] for theirs, ours in NAMES.items()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}


_BLOCK = {
    "gain": ("emb_gain", leaf),
    "conv1": ("conv_res0", conv),
    "affine": ("emb_linear", linear),
    "conv2": ("conv_res1", conv),
    "skip": ("conv_skip", conv),
    "qkv": ("attn_qkv", qkv),
    "project": ("attn_proj", conv),
}


def table(fields: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules for images of this size."""
    size, count = fields["image_size"], len(fields.get("multipliers", (1, 2, 3, 4)))
    return (
        Rule("noise", "unet.emb_noise", linear),
        Rule("label", "unet.emb_label", linear),
        Rule("stem", f"unet.enc.{size}x{size}_conv", conv),
        Rule("out", "unet.out_conv", conv),
        Rule("gain", "unet.out_gain", leaf),
        *levels(size, count, "unet.", _BLOCK),
    )


FAMILY = Family(
    CLS,
    fields_from_config,
    config_from_fields,
    table,
    (r"unet\.emb_fourier\.(freqs|phases)", r"logvar_(linear\.weight|fourier\.(freqs|phases))"),
)
