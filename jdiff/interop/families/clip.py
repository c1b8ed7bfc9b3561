"""CLIP's text tower as transformers has it, CLIPTextModel and CLIPTextModelWithProjection.

Before version 5 of transformers the first one's tensors began with "text_model.".
"""

import inspect
from collections.abc import Mapping
from typing import Any

from jdiff.errors import UserError
from jdiff.interop.tables import Family, Rule, leaf, linear, linears, norm
from jdiff.texts.clip import ClipText

CLS, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"

#: What a config that does not say otherwise means.
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}

#: Their names of a tower's fields.
TOWER: Mapping[str, str] = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "activation": "hidden_act",
    "eps": "layer_norm_eps",
}
TEXT: Mapping[str, str] = TOWER | {
    "vocab": "vocab_size",
    "length": "max_position_embeddings",
    "eos": "eos_token_id",
}


def fields_from_config(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`ClipText` without a projection and its fields."""
    c = DEFAULTS | config
    if not isinstance(c["eos_token_id"], int):
        raise UserError(
            f"{CLS}: eos_token_id={c['eos_token_id']!r} is not served, only one number."
        )
    return ClipText, {ours: c[theirs] for ours, theirs in TEXT.items()}


def projected_fields(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`ClipText` with a projection and its fields."""
    model, fields = fields_from_config(config)
    return model, fields | {"projection": (DEFAULTS | config)["projection_dim"]}


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a `ClipText` with these fields."""
    f = given(ClipText, fields)
    config = {theirs: f[ours] for ours, theirs in TEXT.items()} | {"model_type": "clip_text_model"}
    return config if f["projection"] is None else config | {"projection_dim": f["projection"]}


def plain_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a `ClipText` without a projection.

    Raises:
      UserError: it has one.
    """
    if fields.get("projection") is not None:
        raise UserError(f"{CLS} has no projection; {PROJECTED} has.")
    return config_from_fields(fields)


def given(model: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A model's fields, its defaults where none are given."""
    parameters = inspect.signature(model.__init__).parameters.items()
    return {name: p.default for name, p in parameters} | dict(fields)


def tower(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The blocks of one of CLIP's towers, text or vision; the arguments begin their names."""
    ours, theirs = f"{ours}blocks/{{i}}", f"{theirs}.encoder.layers.{{i}}"
    return (
        Rule(f"{ours}/norm1", f"{theirs}.layer_norm1", norm),
        Rule(f"{ours}/norm2", f"{theirs}.layer_norm2", norm),
        Rule(f"{ours}/qkv", tuple(f"{theirs}.self_attn.{a}_proj" for a in "qkv"), linears(1)),
        Rule(f"{ours}/project", f"{theirs}.self_attn.out_proj", linear),
        Rule(f"{ours}/mlp1", f"{theirs}.mlp.fc1", linear),
        Rule(f"{ours}/mlp2", f"{theirs}.mlp.fc2", linear),
    )


def text(ours: str = "") -> tuple[Rule, ...]:
    """The text tower; `ours` begins our names."""
    embeddings = "text_model.embeddings"
    return (
        Rule(f"{ours}tokens", f"{embeddings}.token_embedding.weight", leaf),
        Rule(f"{ours}positions", f"{embeddings}.position_embedding.weight", leaf),
        *tower(ours, "text_model"),
        Rule(f"{ours}norm", "text_model.final_layer_norm", norm),
        Rule(f"{ours}projection", "text_projection", linear),
    )


#: Positions are counted, and a tower that is used without its projection may be stored with it.
IGNORED = (r"text_model\.embeddings\.position_ids",)
#: How version 5 of transformers writes CLIPTextModel.
RENAMED = ((r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),)

FAMILY = Family(
    CLS,
    fields_from_config,
    plain_config,
    text(),
    (*IGNORED, r"text_projection\.weight"),
    RENAMED,
    library="transformers",
)
FAMILY_PROJECTED = Family(
    PROJECTED, projected_fields, config_from_fields, text(), IGNORED, RENAMED,
    library="transformers",
)  # fmt: skip
