"""DiT and SiT: diffusers' DiTTransformer2DModel, and the weights' original layout ("DiT").

The original files have no config:

    interop.load_file("DiT-XL-2-256x256.safetensors", "DiT", {"name": "XL/2"})
"""

import inspect
from collections.abc import Mapping
from typing import Any

from jdiff.errors import UserError, choose
from jdiff.interop.tables import Family, Rule, leaf, linear, linears, patch
from jdiff.models.dit import DiT, dit_imagenet
from jdiff.models.dit_untied import UntiedDiT

CLS = "DiTTransformer2DModel"

#: What a config that does not say otherwise means.
DEFAULTS: Mapping[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}

#: What `UntiedDiT` computes, of options that it does not have.
SERVED: Mapping[str, Any] = {
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}


def fields_from_config(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`UntiedDiT` and its fields."""
    check_served(CLS, config, SERVED)
    c = DEFAULTS | config
    fields = {
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"] or c["in_channels"],
        "patch": c["patch_size"],
        "width": c["num_attention_heads"] * c["attention_head_dim"],
        "depth": c["num_layers"],
        "heads": c["num_attention_heads"],
        "num_classes": c["num_embeds_ada_norm"],
        "image_size": c["sample_size"],
        "mlp_eps": c["norm_eps"],
    }
    return UntiedDiT, fields


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an `UntiedDiT` with these fields.

    Raises:
        UserError: for a field that the checkpoints' network has not.
    """
    f = _given(UntiedDiT, DiT) | dict(fields)
    check_written(CLS, f, {"time_scale": 1.0, "mlp_ratio": 4.0, "low_res_channels": 0})
    if f["image_size"] is None:
        raise UserError(f"{CLS} has one size of images: give image_size, e.g. 32.")
    return SERVED | {
        "num_attention_heads": f["heads"],
        "attention_head_dim": f["width"] // f["heads"],
        "in_channels": f["in_channels"],
        "out_channels": f["out_channels"] or f["in_channels"],
        "num_layers": f["depth"],
        "sample_size": f["image_size"],
        "patch_size": f["patch"],
        "num_embeds_ada_norm": f["num_classes"],
        "norm_eps": f["mlp_eps"],
    }


def table(fields: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules for patches of this size."""
    block, emb = "transformer_blocks.{i}", "transformer_blocks.{i}.norm1.emb"
    heads = tuple(f"{block}.attn1.to_{part}" for part in "qkv")
    return (
        Rule("embed_patches", "pos_embed.proj", patch(fields.get("patch", 2))),
        Rule("blocks/{i}/time1", f"{emb}.timestep_embedder.linear_1", linear),
        Rule("blocks/{i}/time2", f"{emb}.timestep_embedder.linear_2", linear),
        Rule("blocks/{i}/label", f"{emb}.class_embedder.embedding_table.weight", leaf),
        Rule("blocks/{i}/modulation", f"{block}.norm1.linear", linear),
        Rule("blocks/{i}/qkv", heads, linears(1)),
        Rule("blocks/{i}/project", f"{block}.attn1.to_out.0", linear),
        Rule("blocks/{i}/mlp1", f"{block}.ff.net.0.proj", linear),
        Rule("blocks/{i}/mlp2", f"{block}.ff.net.2", linear),
        Rule("modulation", "proj_out_1", linear),
        Rule("out", "proj_out_2", linear),
    )


FAMILY = Family(CLS, fields_from_config, config_from_fields, table, (r"pos_embed\.pos_embed",))


def original_fields(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`DiT` and its fields, from {"name": "XL/2"} and what `dit_imagenet` takes, or from fields.

    SiT's published weights have `learn_sigma` too: they ignore the second half of their output.
    """
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    if "name" in fields:
        fields = dit_imagenet(**fields)
    known = set(inspect.signature(DiT.__init__).parameters) - {"self", "rngs", "block"}
    for name in fields:
        choose("DiT: field", name, known)
    if not fields.get("num_classes"):
        raise UserError('DiT: the file has no config: give {"name": "XL/2"}, or fields of DiT.')
    return DiT, fields


def original_table(fields: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules for patches of this size."""
    return (
        Rule("embed_patches", "x_embedder.proj", patch(fields.get("patch", 2))),
        Rule("time1", "t_embedder.mlp.0", linear),
        Rule("time2", "t_embedder.mlp.2", linear),
        Rule("label", "y_embedder.embedding_table.weight", leaf),
        Rule("blocks/{i}/modulation", "blocks.{i}.adaLN_modulation.1", linear),
        Rule("blocks/{i}/qkv", "blocks.{i}.attn.qkv", linears(3)),
        Rule("blocks/{i}/project", "blocks.{i}.attn.proj", linear),
        Rule("blocks/{i}/mlp1", "blocks.{i}.mlp.fc1", linear),
        Rule("blocks/{i}/mlp2", "blocks.{i}.mlp.fc2", linear),
        Rule("modulation", "final_layer.adaLN_modulation.1", linear),
        Rule("out", "final_layer.linear", linear),
    )


ORIGINAL = Family("DiT", original_fields, dict, original_table, ("pos_embed",))


def check_served(cls: str, config: Mapping[str, Any], served: Mapping[str, Any]) -> None:
    """Raises a UserError that names an option which our network has not."""
    for key, value in served.items():
        if config.get(key, value) != value:
            raise UserError(f"{cls}: {key}={config[key]!r} is not served, only {value!r}.")


def check_written(cls: str, fields: Mapping[str, Any], served: Mapping[str, Any]) -> None:
    """Raises a UserError that names a field which the checkpoints' network has not."""
    for name, value in served.items():
        if fields[name] != value:
            raise UserError(f"{cls} has no {name}={fields[name]!r}: only {value!r} can be written.")


def _given(*classes: type) -> dict[str, Any]:
    """The defaults of the fields of a class, the first given winning."""
    found: dict[str, Any] = {}
    for cls in classes:
        parameters = inspect.signature(cls.__init__).parameters.items()
        found = {name: p.default for name, p in parameters} | found
    return found
