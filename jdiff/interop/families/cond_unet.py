"""UNet2DConditionModel: Stable Diffusion 1, 2 and XL, inpainting, the upscaler and LCM."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from jdiff.errors import UserError
from jdiff.interop.tables import Family, Kind, Move, Rule, conv, leaf, linear, norm, same
from jdiff.models.cond_unet import CondUNet

CLS = "UNet2DConditionModel"

#: What a config that does not say otherwise means.
DEFAULTS: Mapping[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 1280,
    "only_cross_attention": False,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "num_class_embeds": None,
    "time_cond_proj_dim": None,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
}

#: What `CondUNet` computes, of options that it does not have.
SERVED: Mapping[str, Any] = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
}

#: The types of levels, each: does it attend?
DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}


def fields_from_config(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`CondUNet` and its fields.

    Channels that the input has and the output has not are those of "low_res": a small image's, or a
    mask's and a masked image's.
    """
    for key, served in SERVED.items():
        if config.get(key, served) != served:
            raise UserError(f"{CLS}: {key}={config[key]!r} is not served, only {served!r}.")
    c = DEFAULTS | config
    widths = tuple(c["block_out_channels"])
    number = len(widths)
    attends = _attending(c["down_block_types"], c["up_block_types"])
    layers = _each(c, "transformer_layers_per_block", number)
    cross_only = _each(c, "only_cross_attention", number)
    if c["addition_embed_type"] not in (None, "text_time"):
        raise UserError(
            f"{CLS}: addition_embed_type={c['addition_embed_type']!r} is not served, only None and "
            "'text_time'."
        )
    added = c["addition_embed_type"] is not None
    low_res = config.get("low_res_channels", max(0, c["in_channels"] - c["out_channels"]))
    fields = {
        "in_channels": c["in_channels"] - low_res,
        "out_channels": c["out_channels"],
        "low_res_channels": low_res,
        "low_res_method": config.get("low_res_method", "bilinear"),
        "widths": widths,
        "blocks": _equal(c, "layers_per_block"),
        "depths": tuple(depth if attend else 0 for depth, attend in zip(layers, attends)),
        "middle_depth": layers[-1],
        "heads": _each(c, "attention_head_dim", number),  # the checkpoints' name for their number
        "text_width": _equal(c, "cross_attention_dim"),
        "cross_only": cross_only if any(cross_only) else (),
        "projection": "linear" if c["use_linear_projection"] else "conv",
        "added_width": c["projection_class_embeddings_input_dim"] if added else 0,
        "added_channels": c["addition_time_embed_dim"] if added else 256,
        "num_classes": c["num_class_embeds"] or 0,
        "guidance_channels": c["time_cond_proj_dim"] or 0,
        "groups": c["norm_num_groups"],
        "eps": c["norm_eps"],
    }
    return CondUNet, fields


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a `CondUNet` with these fields.

    Raises:
        UserError: for a field that the checkpoints' network has not.
    """
    f = defaults(CondUNet) | dict(fields)
    for name, served in {"scalars": (), "time_scale": 1.0}.items():
        if f[name] != served:
            raise UserError(f"{CLS} has no {name}={f[name]!r}: only {served!r} can be written.")
    attends = [depth > 0 for depth in f["depths"]]
    if attends[-1] and f["depths"][-1] != f["middle_depth"]:
        raise UserError(
            f"{CLS} has one depth for the last level and the middle, not "
            f"depths={tuple(f['depths'])} and middle_depth={f['middle_depth']}."
        )
    out_channels = f["out_channels"] or f["in_channels"]
    in_channels = f["in_channels"] + f["low_res_channels"]
    config = SERVED | {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": list(f["widths"]),
        "layers_per_block": f["blocks"],
        "down_block_types": [_name(DOWN, attend) for attend in attends],
        "up_block_types": [_name(UP, attend) for attend in reversed(attends)],
        "transformer_layers_per_block": [*(d or 1 for d in f["depths"][:-1]), f["middle_depth"]],
        "attention_head_dim": list(f["heads"]),
        "cross_attention_dim": f["text_width"],
        "only_cross_attention": list(f["cross_only"]) or False,
        "use_linear_projection": f["projection"] == "linear",
        "addition_embed_type": "text_time" if f["added_width"] else None,
        "addition_time_embed_dim": f["added_channels"] if f["added_width"] else None,
        "projection_class_embeddings_input_dim": f["added_width"] or None,
        "num_class_embeds": f["num_classes"] or None,
        "time_cond_proj_dim": f["guidance_channels"] or None,
        "norm_num_groups": f["groups"],
        "norm_eps": f["eps"],
    }
    if f["low_res_channels"] != max(0, in_channels - out_channels):
        config["low_res_channels"] = f["low_res_channels"]  # not to be told from the others
    if f["low_res_method"] != "bilinear":
        config["low_res_method"] = f["low_res_method"]  # theirs is enlarged ahead of the network
    return config


def defaults(model: type) -> dict[str, Any]:
    """The fields of a network that need not be given."""
    parameters = inspect.signature(model.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _attending(down: Sequence[str], up: Sequence[str]) -> list[bool]:
    """For each level, whether it attends."""
    for key, given, known in (("down_block_types", down, DOWN), ("up_block_types", up, UP)):
        for name in given:
            if name not in known:
                raise UserError(f"{CLS}: {key} has {name!r}; served are {', '.join(known)}.")
    attends = [DOWN[name] for name in down]
    if [UP[name] for name in up] != attends[::-1]:
        raise UserError(
            f"{CLS}: up_block_types={list(up)} do not mirror down_block_types={list(down)}."
        )
    return attends


def _name(types: Mapping[str, bool], attend: bool) -> str:
    return next(name for name, attends in types.items() if attends == attend)


def _each(config: Mapping[str, Any], key: str, number: int) -> tuple:
    """An entry a level, where the config may give one for all."""
    given = config[key]
    entries = tuple(given) if isinstance(given, list | tuple) else (given,) * number
    if len(entries) != number or not all(isinstance(entry, int) for entry in entries):
        raise UserError(f"{CLS}: {key}={given!r} is not served, only a number a level ({number}).")
    return entries


def _equal(config: Mapping[str, Any], key: str) -> int:
    """One number, where the config may give an equal one for each level."""
    given = config[key]
    entries = set(given) if isinstance(given, list | tuple) else {given}
    if len(entries) != 1:
        raise UserError(f"{CLS}: {key}={given!r} is not served, only one for all levels.")
    return entries.pop()


# A 1 x 1 convolution or a linear layer, the same on both sides: the number of axes tells.
_projection = Kind(
    {
        "kernel": (
            "weight",
            Move(
                lambda a: a.transpose(2, 3, 1, 0) if a.ndim == 4 else a.T,
                lambda a: a.transpose(3, 2, 0, 1) if a.ndim == 4 else a.T,
            ),
        ),
        "bias": ("bias", same),
    }
)


def residual_block(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The rules of one of the U-Nets' residual blocks."""
    return (
        Rule(f"{ours}/norm1", f"{theirs}.norm1", norm),
        Rule(f"{ours}/conv1", f"{theirs}.conv1", conv),
        Rule(f"{ours}/affine", f"{theirs}.time_emb_proj", linear),
        Rule(f"{ours}/norm2", f"{theirs}.norm2", norm),
        Rule(f"{ours}/conv2", f"{theirs}.conv2", conv),
        Rule(f"{ours}/skip", f"{theirs}.conv_shortcut", conv),
    )


def _transformer(ours: str, theirs: str) -> tuple[Rule, ...]:
    block, their_block = f"{ours}/blocks/{{k}}", f"{theirs}.transformer_blocks.{{k}}"
    rules = [
        Rule(f"{ours}/norm", f"{theirs}.norm", norm),
        Rule(f"{ours}/project_in", f"{theirs}.proj_in", _projection),
        Rule(f"{ours}/project_out", f"{theirs}.proj_out", _projection),
        Rule(f"{block}/mlp1", f"{their_block}.ff.net.0.proj", linear),
        Rule(f"{block}/mlp2", f"{their_block}.ff.net.2", linear),
    ]
    rules += [Rule(f"{block}/norm{n}", f"{their_block}.norm{n}", norm) for n in (1, 2, 3)]
    for name, their_name in (("self_attention", "attn1"), ("cross_attention", "attn2")):
        mine, other = f"{block}/{name}", f"{their_block}.{their_name}"
        rules += [Rule(f"{mine}/{part}", f"{other}.to_{part}", linear) for part in "qkv"]
        rules += [Rule(f"{mine}/project", f"{other}.to_out.0", linear)]
    return tuple(rules)


FAMILY = Family(
    cls=CLS,
    build=fields_from_config,
    config=config_from_fields,
    table=(
        Rule("stem", "conv_in", conv),
        Rule("time1", "time_embedding.linear_1", linear),
        Rule("time2", "time_embedding.linear_2", linear),
        Rule("guidance", "time_embedding.cond_proj", linear),
        Rule("added1", "add_embedding.linear_1", linear),
        Rule("added2", "add_embedding.linear_2", linear),
        Rule("label", "class_embedding.weight", leaf),
        *residual_block("encoder/{i}/blocks/{j}", "down_blocks.{i}.resnets.{j}"),
        *_transformer("encoder/{i}/transformers/{j}", "down_blocks.{i}.attentions.{j}"),
        Rule("encoder/{i}/resample/conv", "down_blocks.{i}.downsamplers.0.conv", conv),
        *residual_block("middle/blocks/{j}", "mid_block.resnets.{j}"),
        *_transformer("middle/transformers/{j}", "mid_block.attentions.{j}"),
        *residual_block("decoder/{i}/blocks/{j}", "up_blocks.{i}.resnets.{j}"),
        *_transformer("decoder/{i}/transformers/{j}", "up_blocks.{i}.attentions.{j}"),
        Rule("decoder/{i}/resample/conv", "up_blocks.{i}.upsamplers.0.conv", conv),
        Rule("out_norm", "conv_norm_out", norm),
        Rule("out_conv", "conv_out", conv),
    ),
)
