"""Texts for runs whose data were encoded (`jdiff encode --text`): what read the captions, again."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jdiff import encoding
from jdiff.errors import UserError


def reader(info: Any, given: str | None = None) -> Any:
    """The `texts.TextEncoder` of a set, which gives texts the length that they have there.

    Args:
      info: `data.Info` of the set.
      given: "minilm" or a folder, in place of what the set says of itself.

    Raises:
      UserError: neither says what it was, or it is not there.
    """
    where = given or (info.encoded and info.encoded.text)
    if not where:
        raise UserError(f"the data {info.name} do not say what their texts were encoded by")
    shapes = {field.name: field.shape for field in info.fields}
    opened = encoding.open_reader(where)
    return opened.replace(length=shapes["text"][0]) if "text" in shapes else opened


def conditions(info: Any, names: Sequence[str], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """What a network that is told `names` (config.data.conditions) is told of prompts, `[N, ...]`.

    The floats are float32, rounded as those of the set are.

    Raises:
      UserError: as `reader`, an empty prompt list, or conditions that are no texts.
    """
    read = encoding.read(reader(info), list(prompts))
    if others := [name for name in names if name not in read]:
        raise UserError(
            f"the network is told {', '.join(others)} too, which no prompt says; give all that it "
            "is told in a file: --cond=FILE.npz."
        )
    arrays = {name: np.asarray(read[name]) for name in names}
    return {k: a if a.dtype == bool else a.astype(np.float32) for k, a in arrays.items()}
