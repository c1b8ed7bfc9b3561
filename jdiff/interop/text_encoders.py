"""A text encoder out of a pipeline's folder: its network and its tokenizer as one."""

import dataclasses
import pathlib
from typing import Any

from jdiff.errors import UserError
from jdiff.interop.loading import Component, load_component
from jdiff.texts.encoder import TextEncoder
from jdiff.texts.tokens import Tokenizer
from jdiff.texts.vocabularies import tokenizer as open_tokenizer

#: The fields of a `TextEncoder` that are given by name.
FIELDS = tuple(
    field.name
    for field in dataclasses.fields(TextEncoder)
    if field.name not in ("tokenizer", "apply", "params")
)
_LENGTH = 512  # of tokenizers that name no limit, or one for whole books
_KINDS = ("clip", "t5", "qwen", "bert")


def text_encoder(
    network: str | pathlib.Path | Component,
    tokenizer: str | pathlib.Path | Tokenizer | None = None,
    *, length: int | None = None, masked: bool | None = None, **options: Any,
) -> TextEncoder:  # fmt: skip
    """Opens a text encoder: CLIP, T5, Qwen, BERT.

    Args:
      network: its folder, e.g. stable-diffusion/text_encoder; or what `load_component` gave.
      tokenizer: its folder or what `texts.tokenizer` gave; unless given, the network's own folder
        or the one beside it: tokenizer_2 for text_encoder_2.
      length: tokens of a text; the tokenizer's model_max_length unless given, at most 512.
      masked: whether the network is told which tokens are padding; unless given, False for CLIP,
        True for all others. T5 in SD3 and FLUX is not told.
      **options: the other fields of `texts.TextEncoder` (layer, norm, pool, weights, chunks,
        template, drop, batch), or of `load_component` (variant, dtype, sharding, compute, ...).

    Raises:
      UserError: a folder that lacks a part, a tokenizer that does not fit the network, and what
        `load_component`, `texts.tokenizer` and `texts.TextEncoder` refuse.

    >>> interop.text_encoder("sdxl/text_encoder_2", layer=-2).encode(["a cat"])
    """
    fields = {name: options.pop(name) for name in list(options) if name in FIELDS}
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = open_tokenizer(_beside(network) if tokenizer is None else tokenizer)
    if not isinstance(network, Component):
        network = load_component(network, **options)
    elif options:
        raise UserError(
            f"text_encoder: {', '.join(options)} given, for a network that is loaded already."
        )
    kind = _kind(network)
    if tokenizer.family and kind and tokenizer.family != kind:
        raise UserError(
            f"{tokenizer.name} does not fit its encoder: it is made for "
            f"{tokenizer.family.upper()}, and the network is {network.model.__name__}."
        )
    most = network.apply.skeleton().length or _LENGTH
    if length is None:
        length = min(most, tokenizer.length or most, _LENGTH)
    return TextEncoder(
        tokenizer, network.apply, network.params, length,
        masked=kind != "clip" if masked is None else masked, **fields,
    )  # fmt: skip


def _kind(network: Component) -> str:
    """The family of the network, by its class's name: "clip" of CLIPText; "" for others."""
    name = network.model.__name__.lower()
    return next((kind for kind in _KINDS if name.startswith(kind)), "")


def _beside(network: str | pathlib.Path | Component) -> pathlib.Path:
    """Where the tokenizer of a network's folder lies."""
    if isinstance(network, Component):
        raise UserError("text_encoder: give tokenizer=, the tokenizer's folder.")
    folder = pathlib.Path(network)
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return folder
    found = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    if found == folder or not found.is_dir():
        raise UserError(
            f"{folder} holds no tokenizer, nor does a folder beside it: give tokenizer=."
        )
    return found
