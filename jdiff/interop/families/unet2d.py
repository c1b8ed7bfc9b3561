"""UNet2DModel: the unconditional and class-conditional pixel U-Nets, as `models.UNet`.

With convolutions between the levels it is DDPM's network (google/ddpm-cifar10-32), with residual
blocks between them ADM's (the consistency models of ImageNet-64).
"""

import dataclasses
import fractions
from collections.abc import Mapping
from typing import Any

import numpy as np

from jdiff.errors import UserError
from jdiff.interop.families.cond_unet import defaults, residual_block
from jdiff.interop.tables import Family, Kind, Move, Rule, conv, leaf, linear, norm, same
from jdiff.models.layers import group_count
from jdiff.models.unet import UNet
from jdiff.models.unet_blocks import STYLES, Style, named_style

CLS = "UNet2DModel"

#: What a config that does not say otherwise means.
DEFAULTS: Mapping[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "num_class_embeds": None,
}

#: What `UNet` computes, of options that it does not have.
SERVED: Mapping[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "add_attention": True,
    "class_embed_type": None,
}

#: Our embedding of t, by (flip_sin_to_cos, freq_shift).
TIMES = {(False, 1): "sin_cos", (True, 0): "cos_sin"}
#: (type of a level that attends, of one that does not) by what changes the resolution.
DOWN = {
    "conv": ("AttnDownBlock2D", "DownBlock2D"),
    "resnet": ("AttnDownBlock2D", "ResnetDownsampleBlock2D"),
}
UP = {"conv": ("AttnUpBlock2D", "UpBlock2D"), "resnet": ("AttnUpBlock2D", "ResnetUpsampleBlock2D")}

#: The fields of `UNet` that a config says, and those that are chosen when it is opened.
SAID = ("image_size", "in_channels", "out_channels", "low_res_channels", "channels", "multipliers")
SAID += ("low_res_method", "blocks", "attention_sizes", "num_classes", "dropout", "style")
CHOSEN = ("dtype", "remat", "frequencies")


def fields_from_config(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`UNet` and its fields, with the style spelled out.

    Channels that the input has and the output has not are those of "low_res".
    """
    for key, served in SERVED.items():
        if config.get(key, served) != served:
            raise UserError(f"{CLS}: {key}={config[key]!r} is not served, only {served!r}.")
    c = DEFAULTS | config
    widths = tuple(c["block_out_channels"])
    ratios = [fractions.Fraction(width, widths[0]) for width in widths]
    low_res = config.get("low_res_channels", max(0, c["in_channels"] - c["out_channels"]))
    if (given := (c["flip_sin_to_cos"], c["freq_shift"])) not in TIMES:
        raise UserError(
            f"{CLS}: flip_sin_to_cos, freq_shift = {given} is not served: {list(TIMES)}."
        )
    resample = c["downsample_type"]
    if resample not in DOWN or resample != c["upsample_type"]:
        raise UserError(
            f"{CLS}: downsample_type={resample!r}, upsample_type={c['upsample_type']!r} are not "
            "served, only both 'conv' or both 'resnet'."
        )
    shift_scale = {"default": False, "scale_shift": True}.get(c["resnet_time_scale_shift"])
    if shift_scale is None:
        raise UserError(
            f"{CLS}: resnet_time_scale_shift={c['resnet_time_scale_shift']!r} is not served, only "
            "'default' and 'scale_shift'."
        )
    groups = c["norm_num_groups"]
    if c["attn_norm_num_groups"] != groups and (shift_scale or c["attn_norm_num_groups"]):
        raise UserError(
            f"{CLS}: attn_norm_num_groups={c['attn_norm_num_groups']} is not served, only "
            f"norm_num_groups={groups}."
        )
    image_size = _side(c["sample_size"], len(widths))
    style = dataclasses.replace(
        STYLES["ddpm" if resample == "conv" else "adm"],
        time=TIMES[given],
        label="after",
        scale_shift=shift_scale,
        eps=c["norm_eps"],
        groups=groups,
        heads=1 if c["attention_head_dim"] is None else None,
        head_channels=c["attention_head_dim"] or Style.head_channels,
        down_padding={0: "SAME", 1: 1}[c["downsample_padding"]],
    )
    fields = {
        "image_size": image_size,
        "in_channels": c["in_channels"] - low_res,
        "out_channels": c["out_channels"],
        "low_res_channels": low_res,
        "low_res_method": config.get("low_res_method", "bilinear"),
        "channels": widths[0],
        "multipliers": tuple(int(r) if r.denominator == 1 else float(r) for r in ratios),
        "blocks": c["layers_per_block"],
        "attention_sizes": _attention_sizes(c, image_size),
        "num_classes": c["num_class_embeds"] or 0,
        "dropout": c["dropout"],
        "style": style,
    }
    return UNet, fields


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a `UNet` with these fields.

    Raises:
        UserError: for a style or a field that the checkpoints' network has not.
    """
    without = defaults(UNet)
    f = without | dict(fields)
    s = f["style"] if isinstance(f["style"], Style) else named_style(f["style"])
    widths = [round(f["channels"] * multiplier) for multiplier in f["multipliers"]]
    groups = s.groups or group_count(widths[0])
    times = {time: key for key, time in TIMES.items()}
    extra = {name: value for name, value in f.items() if name not in (*SAID, *CHOSEN)}
    for what, served in {
        **{f"{name}={value!r}": value == without[name] for name, value in extra.items()},
        f"time={s.time!r}": s.time in times,
        f"label={s.label!r}": s.label == "after" or not f["num_classes"],
        f"skip_scale={s.skip_scale}": s.skip_scale == 1.0,
        f"decoder_attention={s.decoder_attention!r}": s.decoder_attention == "all",
        f"time_width={s.time_width}": s.time_width == 1,
        "a residual encoder": not s.residual_encoder,
        f"heads={s.heads}": s.heads in (None, 1),
        f"taps={s.taps} between levels": s.resample == "conv" or tuple(s.taps) == (1, 1),
        "projections of resampled images": s.resample == "conv" or not s.project_resampled,
        # Sums of widths are normalised too, and get as many groups only if these are 32.
        "groups that differ": bool(s.groups) or {group_count(w) for w in widths} == {32},
        f"multipliers={f['multipliers']}, only such that begin with 1": f["multipliers"][0] == 1,
    }.items():
        if not served:
            raise UserError(f"{CLS} has no {what}: this network cannot be written as one.")
    resample = {"conv": "conv", "block": "resnet"}[s.resample]
    sizes = [f["image_size"] >> level for level in range(len(widths))]
    kinds = [0 if size in f["attention_sizes"] else 1 for size in sizes]
    flip, shift = times[s.time]
    out_channels = f["out_channels"] or f["in_channels"]
    in_channels = f["in_channels"] + f["low_res_channels"]
    config = SERVED | {
        "sample_size": f["image_size"],
        "in_channels": in_channels,
        "out_channels": out_channels,
        "freq_shift": shift,
        "flip_sin_to_cos": flip,
        "down_block_types": [DOWN[resample][kind] for kind in kinds],
        "up_block_types": [UP[resample][kind] for kind in reversed(kinds)],
        "block_out_channels": widths,
        "layers_per_block": f["blocks"],
        "downsample_padding": {"SAME": 0, 1: 1}[s.down_padding],
        "downsample_type": resample,
        "upsample_type": resample,
        "dropout": f["dropout"],
        "attention_head_dim": None if s.heads == 1 else s.head_channels,
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,
        "norm_eps": s.eps,
        "resnet_time_scale_shift": "scale_shift" if s.scale_shift else "default",
        "num_class_embeds": f["num_classes"] or None,
    }
    if f["low_res_channels"] != max(0, in_channels - out_channels):
        config["low_res_channels"] = f["low_res_channels"]  # not to be told from the others
    if f["low_res_method"] != "bilinear":
        config["low_res_method"] = f["low_res_method"]  # theirs is enlarged ahead of the network
    return config


def _side(sample_size: int | list[int] | None, levels: int) -> int:
    """The image's side; where the config has none, any that tells the levels apart."""
    side = sample_size[0] if isinstance(sample_size, list | tuple) else sample_size
    return side or 2 ** (levels + 2)


def _attention_sizes(config: Mapping[str, Any], image_size: int) -> tuple[int, ...]:
    """The resolutions of the levels that attend."""
    attends = {}
    for key, types in (("down_block_types", DOWN), ("up_block_types", UP)):
        allowed = types[config["downsample_type"]]
        given = list(config[key])
        # Without a change of resolution the two types that do not attend are one.
        ends = [types["conv"][1], types["resnet"][1]]
        for level, name in enumerate(given):
            if name not in allowed and not (level == len(given) - 1 and name in ends):
                raise UserError(f"{CLS}: {key} has {name!r}; served are {', '.join(allowed)}.")
        attends[key] = [name == allowed[0] for name in given]
    if attends["up_block_types"] != attends["down_block_types"][::-1]:
        raise UserError(
            f"{CLS}: up_block_types={list(config['up_block_types'])} do not mirror "
            f"down_block_types={list(config['down_block_types'])}."
        )
    return tuple(image_size >> n for n, attend in enumerate(attends["down_block_types"]) if attend)


# Their linear layers on pixels are our 1 x 1 convolutions.
_pixelwise = Kind(
    {
        "kernel": ("weight", Move(lambda a: a.T[np.newaxis, np.newaxis], lambda a: a[0, 0].T)),
        "bias": ("bias", same),
    }
)


def _attention(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{ours}/norm3", f"{theirs}.group_norm", norm),
        Rule(f"{ours}/qkv", tuple(f"{theirs}.to_{part}" for part in "qkv"), _pixelwise),
        Rule(f"{ours}/project", f"{theirs}.to_out.0", _pixelwise),
    )


def _resampling(level: int) -> tuple[Rule, ...]:
    """Ours begin a level with the change of resolution; theirs end the level before with it."""
    down, up = (
        (f"encoder/{level}/resample", f"down_blocks.{level - 1}.downsamplers.0"),
        (f"decoder/{level}/resample", f"up_blocks.{level - 1}.upsamplers.0"),
    )
    rules = [Rule(f"{ours}/conv", f"{theirs}.conv", conv) for ours, theirs in (down, up)]
    return (*rules, *residual_block(*down), *residual_block(*up))


FAMILY = Family(
    cls=CLS,
    build=fields_from_config,
    config=config_from_fields,
    table=(
        Rule("stem", "conv_in", conv),
        Rule("time1", "time_embedding.linear_1", linear),
        Rule("time2", "time_embedding.linear_2", linear),
        Rule("label/kernel", "class_embedding.weight", leaf),
        *residual_block("encoder/{i}/blocks/{j}", "down_blocks.{i}.resnets.{j}"),
        *_attention("encoder/{i}/blocks/{j}", "down_blocks.{i}.attentions.{j}"),
        *residual_block("middle/{i}", "mid_block.resnets.{i}"),
        *_attention("middle/{i}", "mid_block.attentions.{i}"),
        *residual_block("decoder/{i}/blocks/{j}", "up_blocks.{i}.resnets.{j}"),
        *_attention("decoder/{i}/blocks/{j}", "up_blocks.{i}.attentions.{j}"),
        *(rule for level in range(1, 9) for rule in _resampling(level)),
        Rule("out_norm", "conv_norm_out", norm),
        Rule("out_conv", "conv_out", conv),
    ),
    # Of the first files (google/ddpm-*).
    renamed=(
        (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
        (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
        (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
        (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
    ),
)
