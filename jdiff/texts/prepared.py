"""The text encoder that `jdiff prepare` makes ready: MiniLM."""

import pathlib
from typing import Any

from jdiff.errors import UserError
from jdiff.texts.encoder import TextEncoder
from jdiff.texts.vocabularies import tokenizer

#: config.json of all-MiniLM-L6-v2 (Wang et al. 2020, trained further by sentence-transformers).
MINILM = {
    "architectures": ["BertModel"],
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "model_type": "bert",
}


def minilm(
    path: str | pathlib.Path | None = None, *, length: int = 128, batch: int = 64, **fields: Any
) -> TextEncoder:
    """all-MiniLM-L6-v2: a small encoder of sentences, 22.7 million weights, width 384.

    "text" are the states of its last layer; "pooled" their mean over the tokens, of norm 1: its
    product with another text's is how alike they are in meaning, -1 to 1.

    Args:
      path: of the weights that `jdiff prepare minilm` writes, with the tokenizer beside them; where
        that command puts them unless given.
      length: tokens of a text; 128 as it was trained, 512 at most. For captions of a few words a
        smaller one is proportionally quicker.
      batch: texts at a time.
      **fields: of the `TextEncoder`, or of `interop.assemble` (dtype, sharding, compute).

    Raises:
      UserError: the weights are not prepared.

    >>> told = texts.minilm(length=32).encode(["a red heart", "grinning face"])
    """
    from jdiff.interop import files, text_encoders
    from jdiff.interop.families import BY_CLASS
    from jdiff.interop.loading import assemble

    path = _location() if path is None else pathlib.Path(path)
    vocabulary = path.with_suffix(".tokenizer.json")
    for wanted in (path, vocabulary):
        if not wanted.is_file():
            raise UserError(f"no MiniLM at {wanted}: run `jdiff prepare minilm`.")
    own = {name: fields.pop(name) for name in list(fields) if name in text_encoders.FIELDS}
    options = {"scan": True} | fields  # compiles sooner
    component = assemble(BY_CLASS["BertModel"], MINILM, files.tensors(path), path, **options)
    return text_encoders.text_encoder(
        component, tokenizer(vocabulary), **{"pool": "mean", "length": length, "batch": batch} | own
    )


def _location() -> pathlib.Path:
    from jdiff.data import prepare

    return prepare.location("minilm")
