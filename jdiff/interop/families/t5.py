"""T5's encoder as transformers has it, T5EncoderModel; also out of files of the whole T5."""

from collections.abc import Mapping
from typing import Any

from jdiff.errors import UserError
from jdiff.interop.families import clip
from jdiff.interop.tables import Family, Rule, leaf, linear, norm
from jdiff.texts.t5 import T5Encoder

CLS = "T5EncoderModel"

#: What a config that does not say otherwise means.
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}
NAMES: Mapping[str, str] = {
    "vocab": "vocab_size",
    "width": "d_model",
    "depth": "num_layers",
    "heads": "num_heads",
    "head_width": "d_kv",
    "hidden": "d_ff",
    "buckets": "relative_attention_num_buckets",
    "distance": "relative_attention_max_distance",
    "eps": "layer_norm_epsilon",
}


def fields_from_config(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`T5Encoder` and its fields; "gated-gelu" is the gelu of the published code, with a tanh."""
    c = DEFAULTS | config
    gate, _, activation = c["feed_forward_proj"].rpartition("-")
    if gate not in ("", "gated"):
        raise UserError(f"{CLS}: feed_forward_proj={c['feed_forward_proj']!r} is not served.")
    if gate and activation == "gelu":
        activation = "gelu_new"
    fields = {ours: c[theirs] for ours, theirs in NAMES.items()}
    return T5Encoder, fields | {"activation": activation, "gated": bool(gate)}


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a `T5Encoder` with these fields.

    Raises:
      UserError: a gated perceptron with the exact gelu, which has no name there.
    """
    f = clip.given(T5Encoder, fields)
    activation = f["activation"]
    if f["gated"]:
        if activation == "gelu":
            raise UserError(f"{CLS}: a gated 'gelu' cannot be written: that name is 'gelu_new'.")
        activation = "gated-" + ("gelu" if activation == "gelu_new" else activation)
    config = {theirs: f[ours] for ours, theirs in NAMES.items()}
    kind = {"model_type": "t5", "is_encoder_decoder": False, "use_cache": False}
    return config | kind | {"feed_forward_proj": activation}


def table(fields: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules; one map before the activation, or two."""
    block = "encoder.block.{i}.layer"
    attention, relative = f"{block}.0.SelfAttention", "SelfAttention.relative_attention_bias.weight"
    perceptron = f"{block}.1.DenseReluDense"
    first = "wi_0" if fields.get("gated", True) else "wi"
    return (
        Rule("tokens", "shared.weight", leaf),
        Rule("relative", f"encoder.block.0.layer.0.{relative}", leaf),
        Rule("blocks/{i}/norm1", f"{block}.0.layer_norm", norm),
        *(Rule(f"blocks/{{i}}/{part}", f"{attention}.{part}", linear) for part in "qkv"),
        Rule("blocks/{i}/project", f"{attention}.o", linear),
        Rule("blocks/{i}/norm2", f"{block}.1.layer_norm", norm),
        Rule("blocks/{i}/mlp1", f"{perceptron}.{first}", linear),
        Rule("blocks/{i}/gate", f"{perceptron}.wi_1", linear),
        Rule("blocks/{i}/mlp2", f"{perceptron}.wo", linear),
        Rule("norm", "encoder.final_layer_norm", norm),
    )


FAMILY = Family(
    CLS,
    fields_from_config,
    config_from_fields,
    table,
    # The decoder of the whole T5; and its table of tokens, which is one, under its other name.
    (r"decoder\..*", r"lm_head\.weight", r"encoder\.embed_tokens\.weight"),
    ((r"^encoder\.embed_tokens\.weight$", "shared.weight"),),
    also=("T5ForConditionalGeneration", "T5Model"),
    library="transformers",
)
