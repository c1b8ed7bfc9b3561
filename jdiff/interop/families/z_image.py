"""ZImageTransformer2DModel: Z-Image and Z-Image-Turbo."""

import inspect
from collections.abc import Mapping
from typing import Any

from jdiff.errors import UserError, choose
from jdiff.interop.tables import Family, Kind, Move, Rule, linear, norm
from jdiff.models.z_image import ZImage

CLS = "ZImageTransformer2DModel"

#: What a config that does not say otherwise means.
DEFAULTS: Mapping[str, Any] = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "siglip_feat_dim": None,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": (32, 48, 48),
    "axes_lens": (1024, 512, 512),
    "nheads": None,  # a copy of n_heads in some configs, which nothing reads
}


def fields_from_config(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`ZImage` and its fields; n_kv_heads says nothing, every head has keys of its own."""
    for key in config:
        if not key.startswith("_"):
            choose(f"{CLS}: key of the config", key, DEFAULTS)
    c = DEFAULTS | config
    if c["siglip_feat_dim"] is not None:
        raise UserError(
            f"{CLS}: siglip_feat_dim={c['siglip_feat_dim']} (Omni) is not served, only None."
        )
    if len(c["all_patch_size"]) != 1 or tuple(c["all_f_patch_size"]) != (1,):
        raise UserError(
            f"{CLS}: all_patch_size={c['all_patch_size']} and all_f_patch_size="
            f"{c['all_f_patch_size']} are not served, only one size and one frame, (1,)."
        )
    return ZImage, {
        "in_channels": c["in_channels"],
        "patch": c["all_patch_size"][0],
        "width": c["dim"],
        "depth": c["n_layers"],
        "refiners": c["n_refiner_layers"],
        "heads": c["n_heads"],
        "text_width": c["cap_feat_dim"],
        "rope_dims": tuple(c["axes_dims"]),
        "theta": c["rope_theta"],
        "positions": tuple(c["axes_lens"]),
        "qk_norm": c["qk_norm"],
        "eps": c["norm_eps"],
        "time_scale": c["t_scale"],
    }


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a `ZImage` with these fields."""
    defaults = inspect.signature(ZImage.__init__).parameters.items()
    f = {name: p.default for name, p in defaults} | dict(fields)
    return {
        "all_patch_size": [f["patch"]],
        "all_f_patch_size": [1],
        "in_channels": f["in_channels"],
        "dim": f["width"],
        "n_layers": f["depth"],
        "n_refiner_layers": f["refiners"],
        "n_heads": f["heads"],
        "n_kv_heads": f["heads"],
        "norm_eps": f["eps"],
        "qk_norm": f["qk_norm"],
        "cap_feat_dim": f["text_width"],
        "rope_theta": f["theta"],
        "t_scale": f["time_scale"],
        "axes_dims": list(f["rope_dims"]),
        "axes_lens": list(f["positions"]),
    }


#: A token, [1, width] of theirs.
token = Kind({"": ("", Move(lambda a: a[0], lambda a: a[None]))})

BLOCK = {
    "modulation": ("adaLN_modulation.0", linear),
    "norm1": ("attention_norm1", norm),
    "norm2": ("attention_norm2", norm),
    "norm3": ("ffn_norm1", norm),
    "norm4": ("ffn_norm2", norm),
    "qkv/q": ("attention.to_q", linear),
    "qkv/k": ("attention.to_k", linear),
    "qkv/v": ("attention.to_v", linear),
    "qkv/norm_q": ("attention.norm_q", norm),
    "qkv/norm_k": ("attention.norm_k", norm),
    "project": ("attention.to_out.0", linear),
    "mlp_gate": ("feed_forward.w1", linear),
    "mlp_in": ("feed_forward.w3", linear),
    "mlp_out": ("feed_forward.w2", linear),
}
STACKS = {"image_blocks": "noise_refiner", "text_blocks": "context_refiner", "blocks": "layers"}


def table(fields: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules; the size of the patches is part of some names."""
    patch = f"{fields['patch']}-1"
    return (
        Rule("time1", "t_embedder.mlp.0", linear),
        Rule("time2", "t_embedder.mlp.2", linear),
        Rule("embed_patches", f"all_x_embedder.{patch}", linear),
        Rule("image_pad", "x_pad_token", token),
        Rule("text_norm", "cap_embedder.0", norm),
        Rule("embed_text", "cap_embedder.1", linear),
        Rule("text_pad", "cap_pad_token", token),
        *(
            Rule(f"{stack}/{{i}}/{ours}", f"{theirs}.{{i}}.{name}", kind)
            for stack, theirs in STACKS.items()
            for ours, (name, kind) in BLOCK.items()
        ),
        Rule("modulation", f"all_final_layer.{patch}.adaLN_modulation.1", linear),
        Rule("out", f"all_final_layer.{patch}.linear", linear),
    )


FAMILY = Family(cls=CLS, build=fields_from_config, config=config_from_fields, table=table)
