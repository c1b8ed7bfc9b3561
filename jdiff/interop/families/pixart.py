"""PixArt-alpha and -sigma: PixArtTransformer2DModel; and Transformer2DModel, its older name.

`Transformer2DModel` is also the older name of DiT's class, which the published weights have.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from jdiff.errors import UserError
from jdiff.interop.families import dit
from jdiff.interop.tables import Family, Rule, leaf, linear, patch
from jdiff.models.pixart import PixArt

CLS, OLD_CLS = "PixArtTransformer2DModel", "Transformer2DModel"

#: What a config that does not say otherwise means.
DEFAULTS: Mapping[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "sample_size": 128,
    "patch_size": 2,
    "interpolation_scale": None,
    "use_additional_conditions": None,
    "caption_channels": None,
}

#: What `PixArt` computes, of options that it does not have.
SERVED: Mapping[str, Any] = {
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "upcast_attention": False,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "attention_type": "default",
}

#: Options of the older class, and the defaults of it that neither network has.
OLD_SERVED: Mapping[str, Any] = {
    "num_vector_embeds": None,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "double_self_attention": False,
    "attention_type": "default",
}
OLD_DEFAULTS: Mapping[str, Any] = {
    "num_layers": 1,
    "attention_head_dim": 88,
    "in_channels": None,
    "out_channels": None,
    "attention_bias": False,
    "cross_attention_dim": None,
    "sample_size": None,
    "patch_size": None,
    "activation_fn": "geglu",
    "num_embeds_ada_norm": None,
    "norm_type": "layer_norm",
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
}


def fields_from_config(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`PixArt` and its fields."""
    dit.check_served(CLS, config, SERVED)
    c = DEFAULTS | config
    width = c["num_attention_heads"] * c["attention_head_dim"]
    if c["caption_channels"] is None:
        raise UserError(f"{CLS}: caption_channels=None is not served: give the text's channels.")
    if c["cross_attention_dim"] != width:
        raise UserError(
            f"{CLS}: cross_attention_dim={c['cross_attention_dim']} is not served, only the width "
            f"of the tokens, {width}."
        )
    side, micro = c["sample_size"], c["use_additional_conditions"]
    fields = {
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"] or c["in_channels"],
        "patch": c["patch_size"],
        "width": width,
        "depth": c["num_layers"],
        "heads": c["num_attention_heads"],
        "text_width": c["caption_channels"],
        "image_size": side,
        "interpolation": float(c["interpolation_scale"] or max(side // 64, 1)),
        "micro_conditions": side == 128 if micro is None else bool(micro),
    }
    return PixArt, fields


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a `PixArt` with these fields.

    Raises:
        UserError: for a field that the checkpoints' network has not.
    """
    f = {name: p.default for name, p in inspect.signature(PixArt.__init__).parameters.items()}
    f |= dict(fields)
    dit.check_written(CLS, f, {"time_scale": 1.0, "mlp_ratio": 4.0})
    return SERVED | {
        "num_attention_heads": f["heads"],
        "attention_head_dim": f["width"] // f["heads"],
        "in_channels": f["in_channels"],
        "out_channels": f["out_channels"] or f["in_channels"],
        "num_layers": f["depth"],
        "cross_attention_dim": f["width"],
        "sample_size": f["image_size"],
        "patch_size": f["patch"],
        "num_embeds_ada_norm": 1000,  # not used there, but not to be None
        "interpolation_scale": f["interpolation"],
        "use_additional_conditions": f["micro_conditions"],
        "caption_channels": f["text_width"],
    }


def table(fields: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules for patches of this size."""
    block, text = "transformer_blocks.{i}", "caption_projection.linear"
    rules = [
        Rule("embed_patches", "pos_embed.proj", patch(fields.get("patch", 2))),
        Rule("modulation", "adaln_single.linear", linear),
        Rule("text1", f"{text}_1", linear),
        Rule("text2", f"{text}_2", linear),
        Rule("blocks/{i}/table", f"{block}.scale_shift_table", leaf),
        Rule("blocks/{i}/mlp1", f"{block}.ff.net.0.proj", linear),
        Rule("blocks/{i}/mlp2", f"{block}.ff.net.2", linear),
        Rule("table", "scale_shift_table", leaf),
        Rule("out", "proj_out", linear),
    ]
    embedders = {"time": "timestep", "resolution": "resolution", "aspect_ratio": "aspect_ratio"}
    for ours, theirs in embedders.items():
        name = f"adaln_single.emb.{theirs}_embedder.linear"
        rules += [Rule(f"{ours}/{n}", f"{name}_{n + 1}", linear) for n in (0, 1)]
    for ours, theirs in (("", "attn1"), ("cross_", "attn2")):
        rules.append(Rule(f"blocks/{{i}}/{ours}project", f"{block}.{theirs}.to_out.0", linear))
        rules += [
            Rule(f"blocks/{{i}}/{ours}{part}", f"{block}.{theirs}.to_{part}", linear)
            for part in "qkv"
        ]
    return tuple(rules)


#: The positions; and a null text that the first files have and their network does not read.
IGNORED = (r"pos_embed\.pos_embed", r"caption_projection\.y_embedding")
FAMILY = Family(CLS, fields_from_config, config_from_fields, table, IGNORED)


def old_fields(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """The network that a `Transformer2DModel` on patches is: DiT's or PixArt's."""
    c = OLD_DEFAULTS | config
    dit.check_served(OLD_CLS, c, OLD_SERVED)
    if c["patch_size"] is None or c["norm_type"] not in ("ada_norm_zero", "ada_norm_single"):
        raise UserError(
            f"{OLD_CLS}: patch_size={c['patch_size']!r} with norm_type={c['norm_type']!r} is not "
            "served, only DiT's ('ada_norm_zero') and PixArt's ('ada_norm_single') on patches."
        )
    if c["norm_type"] == "ada_norm_single":
        return fields_from_config(c)
    scale = c.get("interpolation_scale") or max(c["sample_size"] // 64, 1)
    if scale != 1:
        raise UserError(f"{OLD_CLS}: a DiT with interpolation_scale={scale} is not served, only 1.")
    return dit.fields_from_config(c)


def old_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The older config of a network with these fields."""
    if "text_width" in fields:
        return config_from_fields(fields)
    return dit.config_from_fields(fields) | {"interpolation_scale": 1.0}


def old_table(fields: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules of whichever network has these fields."""
    return table(fields) if "text_width" in fields else dit.table(fields)


OLD_FAMILY = Family(OLD_CLS, old_fields, old_config, old_table, IGNORED)
