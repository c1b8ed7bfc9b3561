"""The condition that means none, as parameters of a network: guidance learns what it leaves."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from jdiff.conditioning import LEARNED
from jdiff.models.initializers import normal, param
from jdiff.models.module import Module


class NullCondition(Module):
    """A parameter for each condition, which stands in its place where there is none.

    Args:
      shapes: of the conditions of one sample, by name, e.g. {"text": (32, 384), "pooled": (384,)}.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], rngs: nnx.Rngs):
        for name, shape in shapes.items():
            # Of norm about 1 a token, as the states of text encoders are.
            setattr(self, name, param(rngs, shape, normal(shape[-1] ** -0.5 if shape else 1.0)))


def with_null(
    build: Callable[[nnx.Rngs], Any], shapes: Mapping[str, tuple[int, ...]]
) -> Callable[[nnx.Rngs], Any]:
    """`build`, of a network that holds such parameters beside its own; it does not read them.

    Who drops conditions, in training and in guidance, puts them in the conditions' place.
    """

    def made(rngs: nnx.Rngs) -> Any:
        model = build(rngs)
        setattr(model, LEARNED, NullCondition(shapes, rngs))
        return model

    return made
