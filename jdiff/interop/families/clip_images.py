"""CLIP with both its towers, CLIPModel of transformers."""

import math
from collections.abc import Mapping
from typing import Any

from jdiff.errors import UserError
from jdiff.interop.families import clip
from jdiff.interop.tables import Family, Rule, leaf, linear, norm, patch
from jdiff.texts.clip import ClipText
from jdiff.texts.clip_images import Clip, ClipVision

CLS = "CLIPModel"

#: What a vision tower's config that does not say otherwise means.
DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
VISION: Mapping[str, str] = clip.TOWER | {"image_size": "image_size", "patch": "patch_size"}


def fields_from_config(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`Clip` and its fields. The first files have the towers' configs under an older name too."""
    text, vision = (
        config.get(f"{name}_config_dict") or config.get(f"{name}_config") or {}
        for name in ("text", "vision")
    )
    vision = DEFAULTS | vision
    for name in ("image_size", "patch_size"):
        if not isinstance(vision[name], int):
            raise UserError(f"{CLS}: {name}={vision[name]!r} is not served, only one number.")
    if vision["num_channels"] != 3:
        raise UserError(f"{CLS}: num_channels={vision['num_channels']} is not served, only 3.")
    return Clip, {
        "text": clip.fields_from_config(text)[1],
        "vision": {ours: vision[theirs] for ours, theirs in VISION.items()},
        "projection": config.get("projection_dim", 512),
    }


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a `Clip` with these fields."""
    f = clip.given(Clip, fields)
    vision = clip.given(ClipVision, f["vision"])
    common = {"projection_dim": f["projection"]}
    text = clip.config_from_fields(clip.given(ClipText, f["text"])) | common
    tower = {theirs: vision[ours] for ours, theirs in VISION.items()}
    return {
        "model_type": "clip",
        "text_config": text,
        "vision_config": {"model_type": "clip_vision_model", **tower, **common},
        "logit_scale_init_value": math.log(1 / 0.07),
        **common,
    }


def table(fields: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules for patches of this size."""
    size = clip.given(ClipVision, fields["vision"])["patch"]
    embeddings = "vision_model.embeddings"
    return (
        *clip.text("text/"),
        Rule("vision/embed_patches", f"{embeddings}.patch_embedding", patch(size)),
        Rule("vision/label", f"{embeddings}.class_embedding", leaf),
        Rule("vision/positions", f"{embeddings}.position_embedding.weight", leaf),
        Rule("vision/norm_in", "vision_model.pre_layrnorm", norm),
        *clip.tower("vision/", "vision_model"),
        Rule("vision/norm_out", "vision_model.post_layernorm", norm),
        Rule("projection", "visual_projection", linear),
        Rule("log_scale", "logit_scale", leaf),
    )


IGNORED = (*clip.IGNORED, r"vision_model\.embeddings\.position_ids")
FAMILY = Family(CLS, fields_from_config, config_from_fields, table, IGNORED, library="transformers")
