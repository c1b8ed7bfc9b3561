"""SD3Transformer2DModel: Stable Diffusion 3 and 3.5."""

import inspect
from collections.abc import Mapping
from typing import Any

from jdiff.errors import UserError, choose
from jdiff.interop.tables import Family, Kind, Move, Rule, linear, norm, patch
from jdiff.models.mmdit import MMDiT

CLS = "SD3Transformer2DModel"

#: What a config that does not say otherwise means.
DEFAULTS: Mapping[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}


def fields_from_config(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`MMDiT` and its fields.

    The table of positions is taken from the checkpoint: the published ones come from the original
    training code, of which the config says nothing.
    """
    for key in config:
        if not key.startswith("_"):
            choose(f"{CLS}: key of the config", key, DEFAULTS)
    c = DEFAULTS | config
    width = c["attention_head_dim"] * c["num_attention_heads"]
    if c["caption_projection_dim"] != width:
        raise UserError(
            f"{CLS}: caption_projection_dim={c['caption_projection_dim']} is not served, only the "
            f"width of the image's tokens, attention_head_dim * num_attention_heads = {width}."
        )
    dual = tuple(c["dual_attention_layers"])
    if dual != tuple(range(len(dual))) or len(dual) >= c["num_layers"]:
        raise UserError(
            f"{CLS}: dual_attention_layers={dual} is not served, only the first layers, in order "
            "and without the last."
        )
    if c["qk_norm"] not in (None, "rms_norm"):
        raise UserError(f"{CLS}: qk_norm={c['qk_norm']!r} is not served, only None and 'rms_norm'.")
    fields = {
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"],
        "patch": c["patch_size"],
        "width": width,
        "depth": c["num_layers"],
        "heads": c["num_attention_heads"],
        "dual_depth": len(dual),
        "qk_norm": c["qk_norm"] is not None,
        "text_width": c["joint_attention_dim"],
        "pooled_width": c["pooled_projection_dim"],
        "image_size": c["sample_size"],
        "positions": c["pos_embed_max_size"],
        "stored_positions": config.get("_stored_positions", True),
    }
    return MMDiT, fields


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an `MMDiT` with these fields.

    A table that is computed is not written: diffusers computes the same. The entry
    "_stored_positions", which diffusers leaves alone, tells us.

    Raises:
        UserError: for a field that the checkpoints' network has not.
    """
    parameters = inspect.signature(MMDiT.__init__).parameters.items()
    f = {name: parameter.default for name, parameter in parameters} | dict(fields)
    for name, served in {"scalars": (), "time_scale": 1.0}.items():
        if (tuple(f[name]) if name == "scalars" else f[name]) != served:
            raise UserError(f"{CLS} has no {name}={f[name]!r}: only {served!r} can be written.")
    config = {
        "sample_size": f["image_size"],
        "patch_size": f["patch"],
        "in_channels": f["in_channels"],
        "num_layers": f["depth"],
        "attention_head_dim": f["width"] // f["heads"],
        "num_attention_heads": f["heads"],
        "joint_attention_dim": f["text_width"],
        "caption_projection_dim": f["width"],
        "pooled_projection_dim": f["pooled_width"],
        "out_channels": f["out_channels"] or f["in_channels"],
        "pos_embed_max_size": f["positions"],
        "dual_attention_layers": list(range(f["dual_depth"])),
        "qk_norm": "rms_norm" if f["qk_norm"] else None,
    }
    return config if f["stored_positions"] else config | {"_stored_positions": False}


def table(fields: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules of a network with these fields: its blocks are numbered through in checkpoints."""
    dual, last = fields["dual_depth"], fields["depth"] - 1
    block = "transformer_blocks.{i}"
    return (
        Rule("embed_patches", "pos_embed.proj", patch(fields["patch"])),
        Rule("table", "pos_embed.pos_embed", _table(fields["positions"])),
        Rule("embed_text", "context_embedder", linear),
        Rule("conditions/time{j}", "time_text_embed.timestep_embedder.linear_{j}", linear),
        Rule("conditions/pooled{j}", "time_text_embed.text_embedder.linear_{j}", linear),
        *image_rules("dual_blocks/{i}", block),
        *text_rules("dual_blocks/{i}", block),
        *image_rules("blocks/{i}", block, first=dual),
        *text_rules("blocks/{i}", block, first=dual),
        *image_rules("last", f"transformer_blocks.{last}"),
        *text_rules("last", f"transformer_blocks.{last}"),
        Rule("modulation", "norm_out.linear", linear),
        Rule("out", "proj_out", linear),
    )


def image_rules(ours: str, theirs: str, first: int = 0) -> tuple[Rule, ...]:
    """The image's half of a joint block."""
    names = {
        "modulation": ("norm1.linear", linear),
        "qkv/q": ("attn.to_q", linear),
        "qkv/k": ("attn.to_k", linear),
        "qkv/v": ("attn.to_v", linear),
        "qkv/norm_q": ("attn.norm_q", norm),
        "qkv/norm_k": ("attn.norm_k", norm),
        "project": ("attn.to_out.0", linear),
        "qkv2/q": ("attn2.to_q", linear),
        "qkv2/k": ("attn2.to_k", linear),
        "qkv2/v": ("attn2.to_v", linear),
        "qkv2/norm_q": ("attn2.norm_q", norm),
        "qkv2/norm_k": ("attn2.norm_k", norm),
        "project2": ("attn2.to_out.0", linear),
        "mlp1": ("ff.net.0.proj", linear),
        "mlp2": ("ff.net.2", linear),
    }
    return _rules(f"{ours}/image", theirs, names, first)


def text_rules(ours: str, theirs: str, first: int = 0) -> tuple[Rule, ...]:
    """The text's half of a joint block."""
    names = {
        "modulation": ("norm1_context.linear", linear),
        "qkv/q": ("attn.add_q_proj", linear),
        "qkv/k": ("attn.add_k_proj", linear),
        "qkv/v": ("attn.add_v_proj", linear),
        "qkv/norm_q": ("attn.norm_added_q", norm),
        "qkv/norm_k": ("attn.norm_added_k", norm),
        "project": ("attn.to_add_out", linear),
        "mlp1": ("ff_context.net.0.proj", linear),
        "mlp2": ("ff_context.net.2", linear),
    }
    return _rules(f"{ours}/text", theirs, names, first)


def _table(side: int) -> Kind:
    """The table of positions as rows and columns, in theirs [1, N, C]."""
    rows = Move(
        lambda a: a.reshape(side, side, -1) if a.shape[1] == side**2 else a,
        lambda a: a.reshape(1, side**2, -1),
    )
    return Kind({"": ("", rows)})


def _rules(
    ours: str, theirs: str, names: Mapping[str, tuple[str, Kind]], first: int
) -> tuple[Rule, ...]:
    return tuple(
        Rule(f"{ours}/{mine}", f"{theirs}.{other}", kind, first)
        for mine, (other, kind) in names.items()
    )


FAMILY = Family(
    cls=CLS,
    build=fields_from_config,
    config=config_from_fields,
    table=table,
    # Where we compute the table, see `config_from_fields`.
    ignored=(r"pos_embed\.pos_embed",),
)
