"""AutoencoderDC: DC-AE, as SANA has it."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from jdiff.autoencoders.dc import DCAutoencoder, Size
from jdiff.autoencoders.dc_blocks import ACTIVATIONS, NORMS
from jdiff.errors import UserError, choose
from jdiff.interop.tables import (
    Family,
    Kind,
    Rule,
    conv,
    conv_linear,
    linear,
    linears,
    norm,
    same,
)

CLS = "AutoencoderDC"

_WIDTHS = (128, 256, 512, 512, 1024, 1024)
_SCALES = ((), (), (), (5,), (5,), (5,))

#: What a config that does not say otherwise means.
DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": _WIDTHS,
    "decoder_block_out_channels": _WIDTHS,
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": _SCALES,
    "decoder_qkv_multiscales": _SCALES,
    "upsample_block_type": "pixel_shuffle",
    "downsample_block_type": "pixel_unshuffle",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "decoder_conv_act_fn": "relu",
    "scaling_factor": 1.0,  # the latents' unit is told by `interop.autoencoder`
}
#: Their blocks as ours.
BLOCKS = {"ResBlock": "residual", "EfficientViTBlock": "efficient_vit"}
#: How they step down and up, and whether by folding.
STEPS = {
    "downsample_block_type": {"pixel_unshuffle": True, "conv": False},
    "upsample_block_type": {"pixel_shuffle": True, "interpolate": False},
}


def fields_from_config(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`DCAutoencoder` and its fields."""
    for key in config:
        if not key.startswith("_"):
            choose(f"{CLS}: key of the config", key, DEFAULTS)
    c = DEFAULTS | config
    steps = {
        key: allowed[choose(f"{CLS}: {key}", c[key], allowed)] for key, allowed in STEPS.items()
    }
    return DCAutoencoder, {
        "image_channels": c["in_channels"],
        "channels": c["latent_channels"],
        "encoder": _sizes(c, "encoder", norms="rms_norm", activations="silu"),
        "decoder": _sizes(
            c, "decoder", norms=c["decoder_norm_types"], activations=c["decoder_act_fns"]
        ),
        "head": c["attention_head_dim"],
        "folded": steps["downsample_block_type"],
        "unfolded": steps["upsample_block_type"],
        "encoder_shortcut": c["encoder_out_shortcut"],
        "decoder_shortcut": c["decoder_in_shortcut"],
        "last_activation": choose(
            f"{CLS}: decoder_conv_act_fn", c["decoder_conv_act_fn"], ACTIVATIONS
        ),
    }


def _sizes(
    c: Mapping[str, Any], side: str, *, norms: str | Sequence[str], activations: str | Sequence[str]
) -> tuple[Size, ...]:
    """One side's sizes; a name where they have a list of names is that of all sizes."""
    widths = c[f"{side}_block_out_channels"]
    listed = lambda given: (given,) * len(widths) if isinstance(given, str) else tuple(given)
    columns = {
        "block_out_channels": widths,
        "layers_per_block": c[f"{side}_layers_per_block"],
        "block_types": listed(c[f"{side}_block_types"]),
        "qkv_multiscales": c[f"{side}_qkv_multiscales"],
        "norm_types": listed(norms),
        "act_fns": listed(activations),
    }
    for name, column in columns.items():
        if len(column) != len(widths):
            raise UserError(
                f"{CLS}: {side}_{name} has {len(column)} entries, {side}_block_out_channels has "
                f"{len(widths)}."
            )
    return tuple(
        Size(
            width,
            depth,
            BLOCKS[choose(f"{CLS}: {side}_block_types", block, BLOCKS)],
            tuple(scales),
            choose(f"{CLS}: {side}_norm_types", normed, NORMS),
            choose(f"{CLS}: {side}_act_fns", activation, ACTIVATIONS),
        )
        for width, depth, block, scales, normed, activation in zip(*columns.values())
    )


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a `DCAutoencoder` with these fields."""
    defaults = inspect.signature(DCAutoencoder.__init__).parameters.items()
    f = {name: p.default for name, p in defaults} | dict(fields)
    theirs = {ours: name for name, ours in BLOCKS.items()}
    config = {
        "in_channels": f["image_channels"],
        "latent_channels": f["channels"],
        "attention_head_dim": f["head"],
        "downsample_block_type": "pixel_unshuffle" if f["folded"] else "conv",
        "upsample_block_type": "pixel_shuffle" if f["unfolded"] else "interpolate",
        "encoder_out_shortcut": f["encoder_shortcut"],
        "decoder_in_shortcut": f["decoder_shortcut"],
        "decoder_conv_act_fn": f["last_activation"],
        "decoder_norm_types": [size.norm for size in f["decoder"]],
        "decoder_act_fns": [size.activation for size in f["decoder"]],
    }
    for side in ("encoder", "decoder"):
        sizes = f[side]
        config |= {
            f"{side}_block_out_channels": [size.width for size in sizes],
            f"{side}_layers_per_block": [size.depth for size in sizes],
            f"{side}_block_types": [theirs[size.block] for size in sizes],
            f"{side}_qkv_multiscales": [list(size.scales) for size in sizes],
        }
    for size in f["encoder"]:
        if (size.norm, size.activation) != ("rms_norm", "silu"):
            raise UserError(
                f"{CLS} has no encoder with {size}: only norm='rms_norm' and activation='silu' can "
                "be written."
            )
    return config


#: A norm with or without statistics of its training.
normed = Kind({**norm.leaves, "mean": ("running_mean", same), "variance": ("running_var", same)})
BLOCK = (
    ("conv1", "conv1", conv),
    ("conv2", "conv2", conv),
    ("norm", "norm", normed),
    ("attention/qkv", ("attn.to_q", "attn.to_k", "attn.to_v"), linears(1)),
    ("attention/scales/{k}/blur", "attn.to_qkv_multiscale.{k}.proj_in", conv),
    ("attention/scales/{k}/mix", "attn.to_qkv_multiscale.{k}.proj_out", conv),
    ("attention/project", "attn.to_out", linear),
    ("attention/norm", "attn.norm_out", normed),
    ("mlp/widen", "conv_out.conv_inverted", conv_linear),
    ("mlp/blur", "conv_out.conv_depth", conv),
    ("mlp/narrow", "conv_out.conv_point", conv_linear),
    ("mlp/norm", "conv_out.norm", norm),
    ("conv", "conv", conv),
)


def _rules(side: str, theirs: str) -> tuple[Rule, ...]:
    """The rules of the encoder or the decoder, whose sizes they call so."""
    rules = [Rule(f"{side}/out_norm", f"{side}.norm_out", norm)]
    for ours, name in (("in_conv", "conv_in"), ("out_conv", "conv_out")):
        rules.append(Rule(f"{side}/{ours}", f"{side}.{name}", conv))
        rules.append(Rule(f"{side}/{ours}/conv", f"{side}.{name}.conv", conv))
    for ours, names, kind in BLOCK:
        names = (names,) if isinstance(names, str) else names  # noqa: PLW2901
        parts = tuple(f"{side}.{theirs}.{{i}}.{{j}}.{name}" for name in names)
        rules.append(Rule(f"{side}/sizes/{{i}}/{{j}}/{ours}", parts, kind))
    return tuple(rules)


FAMILY = Family(
    cls=CLS,
    build=fields_from_config,
    config=config_from_fields,
    table=(*_rules("encoder", "down_blocks"), *_rules("decoder", "up_blocks")),
    ignored=(r".*\.num_batches_tracked",),  # counts steps of their training
)
