"""AutoencoderKL: the autoencoders of Stable Diffusion 1 to 3.5, XL and FLUX.1."""

from collections.abc import Mapping
from typing import Any

from jdiff.autoencoders.kl import KL
from jdiff.errors import UserError
from jdiff.interop.families.cond_unet import defaults
from jdiff.interop.tables import Family, Rule, conv, linear, norm

CLS = "AutoencoderKL"

#: What a config that does not say otherwise means.
DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


def fields_from_config(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`KL` and its fields."""
    c = DEFAULTS | config
    levels = len(c["block_out_channels"])
    served = {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    for key, value in served.items():
        given = config.get(key, value)
        given = list(given) if isinstance(given, tuple) else given
        if given != value:
            raise UserError(f"{CLS}: {key}={given!r} is not served, only {value!r}.")
    fields = {
        "channels": c["latent_channels"],
        "widths": tuple(c["block_out_channels"]),
        "blocks": c["layers_per_block"],
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"],
        "groups": c["norm_num_groups"],
        "attention": c["mid_block_add_attention"],
        "quant": c["use_quant_conv"],
        "post_quant": c["use_post_quant_conv"],
    }
    return KL, fields


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a `KL` with these fields.

    Raises:
      UserError: groups that differ by level.
    """
    f = defaults(KL) | dict(fields)
    if f["groups"] is None:
        raise UserError(f"{CLS} has one number of groups; groups=None cannot be written as one.")
    levels = len(f["widths"])
    return {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": f["in_channels"],
        "out_channels": f["out_channels"],
        "block_out_channels": list(f["widths"]),
        "layers_per_block": f["blocks"],
        "latent_channels": f["channels"],
        "norm_num_groups": f["groups"],
        "use_quant_conv": f["quant"],
        "use_post_quant_conv": f["post_quant"],
        "mid_block_add_attention": f["attention"],
    }


def _block(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{ours}/norm1", f"{theirs}.norm1", norm),
        Rule(f"{ours}/conv1", f"{theirs}.conv1", conv),
        Rule(f"{ours}/norm2", f"{theirs}.norm2", norm),
        Rule(f"{ours}/conv2", f"{theirs}.conv2", conv),
        Rule(f"{ours}/skip", f"{theirs}.conv_shortcut", conv),
    )


def _half(name: str, levels: str, resample: str) -> tuple[Rule, ...]:
    """The rules of an encoder or a decoder."""
    attention, theirs = f"{name}/middle/attention", f"{name}.mid_block.attentions.0"
    level = f"{name}/levels/{{i}}"
    return (
        Rule(f"{name}/stem", f"{name}.conv_in", conv),
        *_block(f"{level}/blocks/{{j}}", f"{name}.{levels}.{{i}}.resnets.{{j}}"),
        Rule(f"{level}/resample/conv", f"{name}.{levels}.{{i}}.{resample}.0.conv", conv),
        *_block(f"{name}/middle/blocks/{{j}}", f"{name}.mid_block.resnets.{{j}}"),
        Rule(f"{attention}/norm", f"{theirs}.group_norm", norm),
        *(Rule(f"{attention}/{part}", f"{theirs}.to_{part}", linear) for part in "qkv"),
        Rule(f"{attention}/project", f"{theirs}.to_out.0", linear),
        Rule(f"{name}/out_norm", f"{name}.conv_norm_out", norm),
        Rule(f"{name}/out_conv", f"{name}.conv_out", conv),
    )


FAMILY = Family(
    cls=CLS,
    build=fields_from_config,
    config=config_from_fields,
    table=(
        *_half("encoder", "down_blocks", "downsamplers"),
        *_half("decoder", "up_blocks", "upsamplers"),
        Rule("quant", "quant_conv", conv),
        Rule("post_quant", "post_quant_conv", conv),
    ),
    # Of the first files (Stable Diffusion 1 and 2).
    renamed=(
        (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
        (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
        (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
        (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
    ),
)
