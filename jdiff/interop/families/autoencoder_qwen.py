"""AutoencoderKLQwenImage: the autoencoder of Qwen-Image, and of Wan's videos under other names."""

import inspect
from collections.abc import Mapping
from typing import Any

from jdiff.autoencoders.qwen import QwenAutoencoder
from jdiff.errors import UserError, choose
from jdiff.interop.tables import Family, Kind, Move, Rule, conv, conv_linear, same

CLS = "AutoencoderKLQwenImage"

#: What a config that does not say otherwise means.
DEFAULTS: Mapping[str, Any] = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "attn_scales": (),  # diffusers' network does not run with others
    "temperal_downsample": (False, True, True),
    "dropout": 0.0,  # of their training
    "input_channels": 3,
    "latents_mean": None,  # the latents' units are told by `interop.autoencoder`
    "latents_std": None,
}


def fields_from_config(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`QwenAutoencoder` and its fields."""
    for key in config:
        if not key.startswith("_"):
            choose(f"{CLS}: key of the config", key, DEFAULTS)
    c = DEFAULTS | config
    if c["attn_scales"]:
        raise UserError(f"{CLS}: attn_scales={list(c['attn_scales'])} is not served, only [].")
    steps = len(c["dim_mult"]) - 1
    if len(c["temperal_downsample"]) != steps:
        raise UserError(
            f"{CLS}: temperal_downsample={list(c['temperal_downsample'])} is not served, only one "
            f"entry for each of the {steps} steps of dim_mult={list(c['dim_mult'])}."
        )
    return QwenAutoencoder, {
        "image_channels": c["input_channels"],
        "channels": c["z_dim"],
        "width": c["base_dim"],
        "multipliers": tuple(c["dim_mult"]),
        "depth": c["num_res_blocks"],
        "temporal": tuple(c["temperal_downsample"]),
    }


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a `QwenAutoencoder` with these fields."""
    defaults = inspect.signature(QwenAutoencoder.__init__).parameters.items()
    f = {name: p.default for name, p in defaults} | dict(fields)
    return {
        "input_channels": f["image_channels"],
        "z_dim": f["channels"],
        "base_dim": f["width"],
        "dim_mult": list(f["multipliers"]),
        "num_res_blocks": f["depth"],
        "temperal_downsample": list(f["temporal"]),
    }


#: A convolution in time and space, [O, I, T, H, W] of theirs.
conv3d = Kind(
    {
        "kernel": (
            "weight",
            Move(lambda a: a.transpose(2, 3, 4, 1, 0), lambda a: a.transpose(4, 3, 0, 1, 2)),
        ),
        "bias": ("bias", same),
    }
)


def gamma(axes: int) -> Kind:
    """A norm's scale, [C, 1, ..., 1] of theirs with so many axes of size one."""
    theirs = lambda a: a.reshape(-1, *(1,) * axes)
    return Kind({"scale": ("gamma", Move(lambda a: a.reshape(-1), theirs))})


#: A 1 x 1 convolution to queries, keys and values.
qkv = Kind(
    {
        "kernel": (
            "weight",
            Move(
                lambda a: a[:, :, 0, 0].T.reshape(a.shape[1], 3, -1),
                lambda a: a.reshape(len(a), -1).T[:, :, None, None],
            ),
        ),
        "bias": ("bias", Move(lambda a: a.reshape(3, -1), lambda a: a.reshape(-1))),
    }
)

RESIDUAL = {
    "norm1": ("norm1", gamma(3)),
    "conv1": ("conv1", conv3d),
    "norm2": ("norm2", gamma(3)),
    "conv2": ("conv2", conv3d),
    "shortcut": ("conv_shortcut", conv3d),
}
ATTENTION = {
    "norm": ("norm", gamma(2)),
    "qkv": ("to_qkv", qkv),
    "project": ("proj", conv_linear),
}
RESAMPLE = {"conv": ("resample.1", conv), "time": ("time_conv", conv3d)}
ENDS = {
    "in_conv": ("conv_in", conv3d),
    "out_norm": ("norm_out", gamma(3)),
    "out_conv": ("conv_out", conv3d),
}


def _under(ours: str, theirs: str, names: Mapping[str, tuple[str, Kind]]) -> tuple[Rule, ...]:
    """The rules of a module's parts."""
    return tuple(
        Rule(f"{ours}/{mine}", f"{theirs}.{name}", kind) for mine, (name, kind) in names.items()
    )


FAMILY = Family(
    cls=CLS,
    build=fields_from_config,
    config=config_from_fields,
    table=(
        Rule("to_moments", "quant_conv", conv3d),
        Rule("from_latents", "post_quant_conv", conv3d),
        *(
            rule
            for side in ("encoder", "decoder")
            for rule in (
                *_under(side, side, ENDS),
                *_under(
                    f"{side}/middle/residuals/{{i}}", f"{side}.mid_block.resnets.{{i}}", RESIDUAL
                ),
                *_under(
                    f"{side}/middle/attentions/{{i}}",
                    f"{side}.mid_block.attentions.{{i}}",
                    ATTENTION,
                ),
            )
        ),
        *_under("encoder/blocks/{i}", "encoder.down_blocks.{i}", RESIDUAL | RESAMPLE),
        *_under("decoder/sizes/{i}/blocks/{j}", "decoder.up_blocks.{i}.resnets.{j}", RESIDUAL),
        *_under("decoder/sizes/{i}/up", "decoder.up_blocks.{i}.upsamplers.0", RESAMPLE),
    ),
)
