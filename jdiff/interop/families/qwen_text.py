"""The text towers of transformers' Qwen2_5_VLForConditionalGeneration and Qwen3ForCausalLM.

The visual tower and the map to tokens are not read.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from jdiff.errors import UserError, choose
from jdiff.interop.tables import Family, Rule, leaf, linear, norm
from jdiff.texts.base import ACTIVATIONS
from jdiff.texts.qwen import QwenText

VL, QWEN3 = "Qwen2_5_VLTextModel", "Qwen3Model"

#: What a config that does not say otherwise means, where both agree.
COMMON: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "layer_types": None,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    VL: COMMON | {
        "vocab_size": 152_064,
        "hidden_size": 8192,
        "intermediate_size": 29_568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
    QWEN3: COMMON | {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "head_dim": 128,
    },
}  # fmt: skip


def _fields(cls: str, config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`QwenText` and its fields; the text's part of the config counts where there is one."""
    text = config | (config.get("text_config") or {})
    c = DEFAULTS[cls] | {key: value for key, value in text.items() if value is not None}
    # transformers 5 writes rope_parameters, those before it rope_theta and rope_scaling.
    turning = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = turning.get("rope_type", turning.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise UserError(f"{cls}: rope_type={kind!r} is not served, only 'default' and 'mrope'.")
    kinds = c["layer_types"] or ["full_attention"]
    if c["use_sliding_window"] or set(kinds) != {"full_attention"}:
        raise UserError(f"{cls}: windows of attention are not served: use_sliding_window=False.")
    if c["attention_bias"]:
        raise UserError(f"{cls}: attention_bias=True is not served, only False.")
    heads = c["num_attention_heads"]
    return QwenText, {
        "vocab": c["vocab_size"],
        "width": c["hidden_size"],
        "depth": c["num_hidden_layers"],
        "heads": heads,
        # A null there says as many.
        "kv_heads": (DEFAULTS[cls] | text)["num_key_value_heads"] or heads,
        "head_width": c["head_dim"] if cls == QWEN3 else c["hidden_size"] // heads,
        "hidden": c["intermediate_size"],
        "activation": choose(f"{cls}: hidden_act", c["hidden_act"], ACTIVATIONS),
        "bias": cls == VL,
        "qk_norm": cls == QWEN3,
        "theta": float(turning.get("rope_theta", c["rope_theta"])),
        "eps": c["rms_norm_eps"],
    }


def vl_fields(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """The fields of Qwen2.5-VL's text tower."""
    return _fields(VL, config)


def qwen3_fields(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """The fields of Qwen3."""
    return _fields(QWEN3, config)


def _config(fields: Mapping[str, Any], cls: str, **served: Any) -> dict[str, Any]:
    """The config of a `QwenText` with these fields, of which those that are `served` are fixed."""
    defaults = inspect.signature(QwenText.__init__).parameters.items()
    f = {name: p.default for name, p in defaults} | dict(fields)
    for name, value in served.items():
        if f[name] != value:
            raise UserError(f"{cls} has no {name}={f[name]!r}: only {value!r} can be written.")
    return {
        "vocab_size": f["vocab"],
        "hidden_size": f["width"],
        "intermediate_size": f["hidden"],
        "num_hidden_layers": f["depth"],
        "num_attention_heads": f["heads"],
        "num_key_value_heads": f["kv_heads"],
        "hidden_act": f["activation"],
        "rms_norm_eps": f["eps"],
        "rope_theta": f["theta"],
        "use_sliding_window": False,
    } | ({"head_dim": f["head_width"]} if cls == QWEN3 else {})


def vl_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of Qwen2.5-VL's text tower with these fields.

    Raises:
        UserError: for a field that it has not.
    """
    config = _config(fields, VL, bias=True, qk_norm=False)
    head = config["hidden_size"] // config["num_attention_heads"]
    _config(fields, VL, head_width=head)
    section = [head // 2 - 2 * (3 * head // 16), 3 * head // 16, 3 * head // 16]
    scaling = {"type": "mrope", "mrope_section": section}
    return config | {"model_type": "qwen2_5_vl_text", "rope_scaling": scaling}


def qwen3_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a Qwen3 with these fields.

    Raises:
        UserError: for a field that it has not.
    """
    return _config(fields, QWEN3, bias=False, qk_norm=True) | {"model_type": "qwen3"}


BLOCK = {
    "norm1": ("input_layernorm", norm),
    "norm2": ("post_attention_layernorm", norm),
    "q": ("self_attn.q_proj", linear),
    "k": ("self_attn.k_proj", linear),
    "v": ("self_attn.v_proj", linear),
    "norm_q": ("self_attn.q_norm", norm),
    "norm_k": ("self_attn.k_norm", norm),
    "project": ("self_attn.o_proj", linear),
    "gate": ("mlp.gate_proj", linear),
    "mlp1": ("mlp.up_proj", linear),
    "mlp2": ("mlp.down_proj", linear),
}
#: The names are those of the tower alone; whole models put it below others, by their age.
LAYOUT = {
    "table": (
        Rule("tokens", "embed_tokens.weight", leaf),
        *(
            Rule(f"blocks/{{i}}/{ours}", f"layers.{{i}}.{theirs}", kind)
            for ours, (theirs, kind) in BLOCK.items()
        ),
        Rule("norm", "norm", norm),
    ),
    "renamed": (
        (r"^(?:model\.)?(?:language_model\.)?(?:model\.)?(?=(?:embed_tokens|layers|norm)\.)", ""),
    ),
    "ignored": (
        r"(?:model\.)?visual\..*",
        r"(?:language_model\.)?lm_head\.weight",
        r".*rotary_emb\.inv_freq",
    ),
    "library": "transformers",
}
FAMILIES = (
    Family(
        cls=VL,
        build=vl_fields,
        config=vl_config,
        also=("Qwen2_5_VLModel", "Qwen2_5_VLForConditionalGeneration"),
        **LAYOUT,
    ),
    Family(
        cls=QWEN3, build=qwen3_fields, config=qwen3_config, also=("Qwen3ForCausalLM",), **LAYOUT
    ),
)
