"""Weights within a prompt, `a (red:1.3) hat`: what they say, and what becomes of the embedding.

The syntax is that of the stable-diffusion-webui (AUTOMATIC1111), which most user interfaces share:

    (word)        1.1 times the attention        [word]      1 / 1.1
    (word:1.3)    1.3 times; nested, the weights multiply
    \\( \\) \\[ \\] \\\\  the character itself       BREAK       the rest goes into a new chunk

What is never closed counts to the end of the text. The web interface's schedules, [from:to:when],
are not weights and are not known here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jdiff.pytree import Array

ROUND, SQUARE = 1.1, 1 / 1.1

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_MARK = re.compile(
    rf"\\(?P<escaped>[()\[\]\\])|:\s*(?P<weight>{_NUMBER})\s*\)|(?P<bracket>[()\[\]])"
    r"|(?P<pause>\s*\bBREAK\b\s*)"
)
_EXPLICIT = re.compile(rf"(?<!\\)\([^()]*:\s*{_NUMBER}\s*\)")


class Weighted(NamedTuple):
    """A prompt that was read.

    Attributes:
      text: without brackets, weights and escapes.
      weights: float64, one a character of `text`.
      breaks: the characters before which a new chunk begins.
    """

    text: str
    weights: np.ndarray
    breaks: tuple[int, ...] = ()


def parse(prompt: str) -> Weighted:
    """Reads the weights of a prompt; any string is one, and one without brackets has weights 1.

    >>> parse("a (red:1.5) hat").text
    'a red hat'
    """
    text, weights, breaks = "", [], []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def add(part: str) -> None:
        nonlocal text
        text += part
        weights.extend([1.0] * len(part))

    def multiply(start: int, factor: float) -> None:
        weights[start:] = [factor * w for w in weights[start:]]

    at = 0
    for mark in _MARK.finditer(prompt):
        add(prompt[at : mark.start()])
        at = mark.end()
        if mark["escaped"]:
            add(mark["escaped"])
        elif mark["pause"]:
            add(" ")  # or the words on its two sides would become one
            breaks.append(len(text))
        elif mark["weight"] and opened["("]:
            multiply(opened["("].pop(), float(mark["weight"]))
        elif mark["bracket"] in opened:
            opened[mark["bracket"]].append(len(text))
        elif mark["bracket"] == ")" and opened["("]:
            multiply(opened["("].pop(), ROUND)
        elif mark["bracket"] == "]" and opened["["]:
            multiply(opened["["].pop(), SQUARE)
        else:  # closes nothing
            add(mark[0])
    add(prompt[at:])
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        for start in opened[bracket]:
            multiply(start, factor)
    return Weighted(text, np.asarray(weights, float), tuple(breaks))


def explicit(prompt: str) -> str | None:
    """The first weight that is written out with its number, as "(red:1.5)"; None without any."""
    found = _EXPLICIT.search(prompt)
    return found and found[0]


def of_tokens(weighted: Weighted, spans: Sequence[tuple[int, int]]) -> list[float]:
    """Each token's weight: that of its last character (a token may begin with the space before).

    The text is cut into tokens as a whole, so weights never change which tokens there are.
    """
    last = len(weighted.text) - 1
    return [weighted.weights[min(max(end - 1, start), last)] for start, end in spans]


def interpolate(states: Array, factors: Array, empty: Array) -> Array:
    """The states moved away from those of the empty prompt: empty + weight (states - empty).

    As ComfyUI does, and compel for weights above 1. Weight 0 puts the empty prompt's state there;
    a weight of 1 changes no bit.

    Args:
      states: `[B, S, D]`.
      factors: weights `[B, S]`.
      empty: what the encoder makes of "", `[S, D]`.
    """
    moved = empty + factors[..., None] * (states - empty)
    return jnp.where(factors[..., None] == 1, states, moved)


def scale(states: Array, factors: Array, empty: Array | None = None) -> Array:
    """The states times their weights, and all of a text scaled so that their mean stays.

    As the stable-diffusion-webui does (its emphasis "Original"), but for each text by itself, so
    that a text's states do not depend on its neighbours in the batch. The mean over tokens and
    channels may be near 0, where its ratio is erratic: why `interpolate` is offered first.
    """
    scaled = states * factors[..., None]
    before, after = (jnp.mean(a, (1, 2), keepdims=True) for a in (states, scaled))
    ratio = before / jnp.where(after == 0, 1, after)
    return scaled * jnp.where((factors == 1).all(1)[:, None, None] | (after == 0), 1, ratio)


#: How weighted states are formed: (states [B, S, D], factors [B, S], empty [S, D]) -> [B, S, D].
BY_NAME: Mapping[str, Callable[[Array, Array, Array], Array]] = {
    "interpolate": interpolate,
    "scale": scale,
}
