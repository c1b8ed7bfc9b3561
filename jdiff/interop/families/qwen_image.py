"""QwenImageTransformer2DModel: Qwen-Image, and its Edit of 2509 and earlier."""

import inspect
from collections.abc import Mapping
from typing import Any

from jdiff.errors import UserError, choose
from jdiff.interop.families.flux import PATCH, patch_in, patch_out
from jdiff.interop.tables import Family, Rule, linear, norm
from jdiff.models.qwen_image import QwenImage

CLS = "QwenImageTransformer2DModel"

#: What a config that does not say otherwise means.
DEFAULTS: Mapping[str, Any] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
    "zero_cond_t": False,
    "use_additional_t_cond": False,
    "use_layer3d_rope": False,
    "pooled_projection_dim": None,  # the released config has it, the network does not
}

#: What other variants switch on: a second time for given images, a kind of image, layers.
SWITCHES = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")


def fields_from_config(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`QwenImage` and its fields."""
    for key in config:
        if not key.startswith("_"):
            choose(f"{CLS}: key of the config", key, DEFAULTS)
    c = DEFAULTS | config
    for name in SWITCHES:
        if c[name]:
            raise UserError(f"{CLS}: {name}={c[name]!r} is not served, only False.")
    if c["patch_size"] != PATCH or c["in_channels"] % PATCH**2:
        raise UserError(
            f"{CLS}: patch_size={c['patch_size']} and in_channels={c['in_channels']} are not "
            f"served, only patch_size={PATCH} and channels of {PATCH} x {PATCH} latent pixels."
        )
    return QwenImage, {
        "in_channels": c["in_channels"] // PATCH**2,
        "out_channels": c["out_channels"] or c["in_channels"],
        "patch": c["patch_size"],
        "width": c["attention_head_dim"] * c["num_attention_heads"],
        "depth": c["num_layers"],
        "heads": c["num_attention_heads"],
        "text_width": c["joint_attention_dim"],
        "rope_dims": tuple(c["axes_dims_rope"]),
    }


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a `QwenImage` with these fields.

    Raises:
        UserError: for a field that the checkpoints' network has not.
    """
    defaults = inspect.signature(QwenImage.__init__).parameters.items()
    f = {name: p.default for name, p in defaults} | dict(fields)
    served = {"time_scale": 1000.0, "theta": 10_000.0, "patch": PATCH, "scalars": ()}
    for name, value in served.items():
        given = tuple(f[name]) if name == "scalars" else f[name]
        if given != value:
            raise UserError(f"{CLS} has no {name}={given!r}: only {value!r} can be written.")
    return {
        "patch_size": f["patch"],
        "in_channels": PATCH**2 * f["in_channels"],
        "out_channels": f["out_channels"] or f["in_channels"],
        "num_layers": f["depth"],
        "attention_head_dim": f["width"] // f["heads"],
        "num_attention_heads": f["heads"],
        "joint_attention_dim": f["text_width"],
        "axes_dims_rope": list(f["rope_dims"]),
    }


IMAGE = {
    "modulation": ("img_mod.1", linear),
    "qkv/q": ("attn.to_q", linear),
    "qkv/k": ("attn.to_k", linear),
    "qkv/v": ("attn.to_v", linear),
    "qkv/norm_q": ("attn.norm_q", norm),
    "qkv/norm_k": ("attn.norm_k", norm),
    "project": ("attn.to_out.0", linear),
    "mlp1": ("img_mlp.net.0.proj", linear),
    "mlp2": ("img_mlp.net.2", linear),
}
TEXT = {
    "modulation": ("txt_mod.1", linear),
    "qkv/q": ("attn.add_q_proj", linear),
    "qkv/k": ("attn.add_k_proj", linear),
    "qkv/v": ("attn.add_v_proj", linear),
    "qkv/norm_q": ("attn.norm_added_q", norm),
    "qkv/norm_k": ("attn.norm_added_k", norm),
    "project": ("attn.to_add_out", linear),
    "mlp1": ("txt_mlp.net.0.proj", linear),
    "mlp2": ("txt_mlp.net.2", linear),
}
FAMILY = Family(
    cls=CLS,
    build=fields_from_config,
    config=config_from_fields,
    table=(
        Rule("embed_patches", "img_in", patch_in),
        Rule("text_norm", "txt_norm", norm),
        Rule("embed_text", "txt_in", linear),
        Rule("conditions/time{j}", "time_text_embed.timestep_embedder.linear_{j}", linear),
        *(
            Rule(f"blocks/{{i}}/{stream}/{ours}", f"transformer_blocks.{{i}}.{theirs}", kind)
            for stream, names in {"image": IMAGE, "text": TEXT}.items()
            for ours, (theirs, kind) in names.items()
        ),
        Rule("modulation", "norm_out.linear", linear),
        Rule("out", "proj_out", patch_out),
    ),
)
