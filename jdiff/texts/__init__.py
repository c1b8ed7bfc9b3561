"""Text encoders: strings to arrays that networks are conditioned on.

    encoder = interop.text_encoder("stable-diffusion-v1-5/text_encoder")
    told = encoder.encode(["a cat", "two cats"])       # {"text", "mask", "pooled"}

Who may live here: text networks (clip, t5, qwen, bert: `base` says what one is), tokenizers
(`tokens`, and `vocabularies`, which opens them), and what stands on both: `encoder`, the `weights`
of prompts, encoders that `combine`.
"""

from jdiff.texts import combine, weights
from jdiff.texts.combine import Combined, sd3, sdxl
from jdiff.texts.encoder import TextEncoder, Unweighted
from jdiff.texts.prepared import minilm
from jdiff.texts.tokens import Tokenizer, Tokens, Truncated
from jdiff.texts.vocabularies import tokenizer

__all__ = [
    "Combined",
    "TextEncoder",
    "Tokenizer",
    "Tokens",
    "Truncated",
    "Unweighted",
    "combine",
    "minilm",
    "sd3",
    "sdxl",
    "tokenizer",
    "weights",
]
