"""FluxTransformer2DModel: FLUX.1 dev, schnell, Fill, Depth and Canny."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from jdiff.errors import UserError, choose
from jdiff.interop.families.sd3 import image_rules, text_rules
from jdiff.interop.tables import Family, Kind, Move, Rule, linear, linears, norm
from jdiff.models.flux import Flux

CLS = "FluxTransformer2DModel"

#: What a config that does not say otherwise means.
DEFAULTS: Mapping[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}

#: Their networks take patches of 2 x 2 latent pixels, cut by the pipeline, as channels.
PATCH = 2


def fields_from_config(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`Flux` and its fields."""
    for key in config:
        if not key.startswith("_"):
            choose(f"{CLS}: key of the config", key, DEFAULTS)
    c = DEFAULTS | config
    channels = {name: c[name] or c["in_channels"] for name in ("in_channels", "out_channels")}
    for name, value in channels.items():
        if value % PATCH**2 or c["patch_size"] != 1:
            raise UserError(
                f"{CLS}: patch_size={c['patch_size']} and {name}={value} are not served, only "
                f"patch_size=1 and channels of {PATCH} x {PATCH} latent pixels."
            )
    fields = {name: value // PATCH**2 for name, value in channels.items()} | {
        "patch": PATCH,
        "width": c["attention_head_dim"] * c["num_attention_heads"],
        "depth": c["num_layers"],
        "single_depth": c["num_single_layers"],
        "heads": c["num_attention_heads"],
        "text_width": c["joint_attention_dim"],
        "pooled_width": c["pooled_projection_dim"],
        "rope_dims": tuple(c["axes_dims_rope"]),
        "scalars": ("guidance",) if c["guidance_embeds"] else (),
    }
    return Flux, fields


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a `Flux` with these fields.

    Raises:
        UserError: for a field that the checkpoints' network has not.
    """
    parameters = inspect.signature(Flux.__init__).parameters.items()
    f = {name: parameter.default for name, parameter in parameters} | dict(fields)
    scalars = tuple(f["scalars"])
    for name, served in {"time_scale": 1000.0, "theta": 10_000.0, "patch": PATCH}.items():
        if f[name] != served:
            raise UserError(f"{CLS} has no {name}={f[name]!r}: only {served!r} can be written.")
    if scalars not in ((), ("guidance",)):
        raise UserError(f"{CLS} has no scalars={scalars}: only ('guidance',) or none.")
    out_channels = f["out_channels"] or f["in_channels"]
    return {
        "patch_size": 1,
        "in_channels": PATCH**2 * f["in_channels"],
        "out_channels": None if out_channels == f["in_channels"] else PATCH**2 * out_channels,
        "num_layers": f["depth"],
        "num_single_layers": f["single_depth"],
        "attention_head_dim": f["width"] // f["heads"],
        "num_attention_heads": f["heads"],
        "joint_attention_dim": f["text_width"],
        "pooled_projection_dim": f["pooled_width"],
        "guidance_embeds": scalars == ("guidance",),
        "axes_dims_rope": list(f["rope_dims"]),
    }


def _channels_last(a: np.ndarray, axis: int) -> np.ndarray:
    """A patch's (C, row, column) as our (row, column, C)."""
    shape = (*a.shape[:axis], -1, PATCH, PATCH, *a.shape[axis + 1 :])
    return np.moveaxis(a.reshape(shape), axis, axis + 2).reshape(a.shape)


def _channels_first(a: np.ndarray, axis: int) -> np.ndarray:
    """The inverse of `_channels_last`."""
    shape = (*a.shape[:axis], PATCH, PATCH, -1, *a.shape[axis + 1 :])
    return np.moveaxis(a.reshape(shape), axis + 2, axis).reshape(a.shape)


def _packed(axis: int) -> Move:
    """A linear layer's weight whose `axis` (of theirs) runs over a patch."""
    return Move(lambda a: _channels_last(a, axis).T, lambda a: _channels_first(a.T, axis))


_bias = Move(functools.partial(_channels_last, axis=0), functools.partial(_channels_first, axis=0))
#: Linear layers from and to the pixels of a patch.
patch_in = Kind(linear.leaves | {"kernel": ("weight", _packed(1))})
patch_out = Kind({"kernel": ("weight", _packed(0)), "bias": ("bias", _bias)})

_five = Move(lambda a: a.T.reshape(5, -1, len(a)), lambda a: a.reshape(-1, a.shape[-1]).T)
#: A linear layer from what attention and MLP give, side by side, to ours from [..., 5, width].
from_five = Kind(linear.leaves | {"kernel": ("weight", _five)})

SINGLE = {
    "modulation": ("norm.linear", linear),
    "qkv/q": ("attn.to_q", linear),
    "qkv/k": ("attn.to_k", linear),
    "qkv/v": ("attn.to_v", linear),
    "qkv/norm_q": ("attn.norm_q", norm),
    "qkv/norm_k": ("attn.norm_k", norm),
    "mlp": ("proj_mlp", linears(4)),
    "out": ("proj_out", from_five),
}
FAMILY = Family(
    cls=CLS,
    build=fields_from_config,
    config=config_from_fields,
    table=(
        Rule("embed_patches", "x_embedder", patch_in),
        Rule("embed_text", "context_embedder", linear),
        Rule("conditions/time{j}", "time_text_embed.timestep_embedder.linear_{j}", linear),
        Rule("conditions/pooled{j}", "time_text_embed.text_embedder.linear_{j}", linear),
        Rule(
            "conditions/scalars/layers/0/{j}",
            "time_text_embed.guidance_embedder.linear_{j}",
            linear,
            first=1,
        ),
        *image_rules("blocks/{i}", "transformer_blocks.{i}"),
        *text_rules("blocks/{i}", "transformer_blocks.{i}"),
        *(
            Rule(f"singles/{{i}}/{ours}", f"single_transformer_blocks.{{i}}.{theirs}", kind)
            for ours, (theirs, kind) in SINGLE.items()
        ),
        Rule("modulation", "norm_out.linear", linear),
        Rule("out", "proj_out", patch_out),
    ),
)
