"""What several text encoders give, joined as one condition: `sdxl`, `sd3`, and `Combined`.

encoder = texts.Combined((clip_l, clip_g), texts.sdxl)
encoder.encode(["a cat"])     # {"text": [1, 77, 2048], "mask": [1, 77], "pooled": [1, 1280]}
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.pytree import Array
from jdiff.texts.tokens import strings

Told = dict[str, Array]  # "text" [B, S, D], "mask" [B, S], and "pooled" [B, P]


def sdxl(first: Told, second: Told) -> Told:
    """As SDXL reads CLIP ViT-L and OpenCLIP bigG (Podell et al. 2023, section 2.1).

    Their tokens side by side in width; pooled is the second's. Both encoders with layer=-2.

    Raises:
      UserError: another number of texts or tokens, or no pooled vector.
    """
    return {**_beside("sdxl", first, second), "pooled": _pooled("sdxl", second, "second")}


def sd3(
    first: Told, second: Told, third: Told | None = None, *, width: int = 4096, tokens: int = 256
) -> Told:
    """As SD3 reads CLIP ViT-L, OpenCLIP bigG and T5-XXL (Esser et al. 2024, section 4).

    The first two side by side in width and filled with zeros up to the third's; then the third's
    tokens behind them. pooled is that of the first and of the second, one behind the other. Both
    CLIPs with layer=-2, T5 with masked=False.

    Args:
      third: T5's; without it its tokens are zeros.
      width, tokens: of the zeros that stand for T5, where there is none.

    Raises:
      UserError: another number of texts or tokens, CLIPs wider than T5, or no pooled vector.
    """
    clip = _beside("sd3", first, second)
    texts, _, own = clip["text"].shape
    if third is None:
        third = {
            "text": jnp.zeros((texts, tokens, width)), "mask": jnp.ones((texts, tokens), bool)
        }  # fmt: skip
    width = third["text"].shape[2]
    if own > width or third["text"].shape[0] != texts:
        raise UserError(
            f"sd3: the third encoder gives {list(third['text'].shape)}, the first two "
            f"{list(clip['text'].shape)}: as many texts and no narrower are wanted."
        )
    widened = jnp.pad(clip["text"], ((0, 0), (0, 0), (0, width - own)))
    pooled = [_pooled("sd3", first, "first"), _pooled("sd3", second, "second")]
    return {
        "text": jnp.concatenate([widened, third["text"]], 1),
        "mask": jnp.concatenate([clip["mask"], third["mask"]], 1),
        "pooled": jnp.concatenate(pooled, 1),
    }


def _beside(where: str, first: Told, second: Told) -> Told:
    """Tokens of two encoders side by side in width."""
    one, two = first["text"].shape, second["text"].shape
    if one[:2] != two[:2]:
        raise UserError(
            f"{where}: the first encoder gives {list(one)}, the second {list(two)}: as many texts "
            "and tokens are wanted (their fields length and chunks)."
        )
    mask = first["mask"] | second["mask"]
    return {"text": jnp.concatenate([first["text"], second["text"]], 2), "mask": mask}


def _pooled(where: str, told: Told, which: str) -> Array:
    if "pooled" not in told:
        raise UserError(
            f"{where}: the {which} encoder gives no pooled vector; a "
            "CLIPTextModelWithProjection's folder has one."
        )
    return told["pooled"]


@dataclasses.dataclass(frozen=True, eq=False)
class Combined:
    """Several encoders behind one call.

    Attributes:
      encoders: each a `TextEncoder`.
      join: their dicts to one, e.g. `sdxl` or `sd3`.
    """

    encoders: tuple[Any, ...]
    join: Callable[..., Told]

    def encode(self, texts: Sequence[str], *others: Sequence[str] | None, **options: Any) -> Told:
        """What a network is told of these texts; see `TextEncoder.encode`.

        Args:
          texts: any number of them, for all encoders.
          *others: for the second encoder, the third, ..., other texts instead (diffusers' prompt_2,
            prompt_3); None for the same.

        Raises:
          UserError: other texts that are not as many, or for more encoders than there are, and what
            `TextEncoder.encode` and `join` refuse.
        """
        texts = strings("encode", texts)
        if len(others) >= len(self.encoders):
            raise UserError(
                f"encode: texts for {len(others) + 1} encoders given; there are "
                f"{len(self.encoders)}."
            )
        given = [texts, *(texts if other is None else strings("encode", other) for other in others)]
        given += [texts] * (len(self.encoders) - len(given))
        if len({len(one) for one in given}) > 1:
            raise UserError(
                f"encode: {', '.join(str(len(one)) for one in given)} texts given for the "
                "encoders; as many are wanted for each."
            )
        told = (enc.encode(one, **options) for enc, one in zip(self.encoders, given))
        return self.join(*told)
