"""BERT as transformers has it, BertModel; sentence encoders are stored as one."""

from collections.abc import Mapping
from typing import Any

from jdiff.interop.families import clip, dit
from jdiff.interop.tables import Family, Rule, leaf, linear, linears, norm
from jdiff.texts.bert import Bert

CLS = "BertModel"

#: What a config that does not say otherwise means.
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
NAMES: Mapping[str, str] = clip.TOWER | {
    "vocab": "vocab_size",
    "length": "max_position_embeddings",
    "types": "type_vocab_size",
}

#: What `Bert` computes, of options that it does not have.
SERVED: Mapping[str, Any] = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


def fields_from_config(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`Bert` and its fields; a file without the map of the first token needs `pooling=False`."""
    dit.check_served(CLS, config, SERVED)
    c = DEFAULTS | config
    return Bert, {ours: c[theirs] for ours, theirs in NAMES.items()}


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a `Bert` with these fields."""
    f = clip.given(Bert, fields)
    return {theirs: f[ours] for ours, theirs in NAMES.items()} | {"model_type": "bert"}


_LAYER = "encoder.layer.{i}"
_ATTENTION = f"{_LAYER}.attention"

FAMILY = Family(
    CLS,
    fields_from_config,
    config_from_fields,
    (
        Rule("tokens", "embeddings.word_embeddings.weight", leaf),
        Rule("positions", "embeddings.position_embeddings.weight", leaf),
        Rule("types", "embeddings.token_type_embeddings.weight", leaf),
        Rule("norm", "embeddings.LayerNorm", norm),
        Rule(
            "blocks/{i}/qkv",
            tuple(f"{_ATTENTION}.self.{part}" for part in ("query", "key", "value")),
            linears(1),
        ),
        Rule("blocks/{i}/project", f"{_ATTENTION}.output.dense", linear),
        Rule("blocks/{i}/norm1", f"{_ATTENTION}.output.LayerNorm", norm),
        Rule("blocks/{i}/mlp1", f"{_LAYER}.intermediate.dense", linear),
        Rule("blocks/{i}/mlp2", f"{_LAYER}.output.dense", linear),
        Rule("blocks/{i}/norm2", f"{_LAYER}.output.LayerNorm", norm),
        Rule("pool", "pooler.dense", linear),
    ),
    # Positions are counted; the heads of pre-training; a map that was asked to be left out.
    (r"embeddings\.position_ids", r"cls\..*", r"pooler\..*"),
    # Files with a head on top, and the first files.
    ((r"^bert\.", ""), (r"LayerNorm\.gamma$", "LayerNorm.weight"),
     (r"LayerNorm\.beta$", "LayerNorm.bias")),
    also=("BertForMaskedLM", "BertForPreTraining"),
    library="transformers",
)  # fmt: skip
