"""Z-Image: a chat's turn read by Qwen3, one layer before its last."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jdiff.guidance.scales import Scale
from jdiff.interop.prompts.base import Entries, Parts, Prompts
from jdiff.interop.prompts.norms import capped
from jdiff.pytree import Array, PyTree, struct

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


class ZImage(Prompts):
    """ZImagePipeline. Its guidance_scale counts from 0: conditional + g (conditional - null).

    Z-Image-Turbo is used with guidance_scale=0. The template is Qwen3's own; diffusers writes it
    into the list of prompts that it is given, so that a second call with that list has it twice.
    """

    classes = ("ZImagePipeline",)
    long = ("text_encoder",)
    options = ("cfg_truncation", "cfg_normalization")

    @classmethod
    def open(cls, parts: Parts) -> "ZImage":
        """text_encoder: Qwen3, with the text as a user's turn; 512 tokens with the template's."""
        encoder = parts.encoder(layer=-2, masked=True, length=512, template=TEMPLATE)
        return cls({"text_encoder": encoder}, parts.index, parts.network.config)

    @property
    def guidance_scale(self) -> float:
        """diffusers' own."""
        return 5.0

    def weight(self, guidance_scale: float) -> float | None:
        """One more than the scale, from above 0 on."""
        return guidance_scale + 1.0 if guidance_scale > 0 else None

    def encode(self, texts: Sequence[str]) -> Entries:
        """text `[N, 512, D]` and text_mask `[N, 512]`."""
        read = self.encoders["text_encoder"].encode(texts)
        return {"text": read["text"], "text_mask": read["mask"]}

    def asked(
        self, prompts: Sequence[str], negative: Sequence[str] | None, size: tuple[int, int],
        guidance_scale: float | None = None, *, cfg_truncation: float | None = None,
        cfg_normalization: float | bool | None = None,
    ) -> tuple[Entries, Entries, Any]:  # fmt: skip
        """The texts, and the scale.

        Args:
          cfg_truncation: the share of the way from noise to data, in the schedule's time, behind
            which there is no guidance.
          cfg_normalization: how many norms of the conditional velocity the guided one may have;
            True is 1, False and 0 any.
        """
        cond, null, weight = super().asked(prompts, negative, size, guidance_scale)
        if weight is None or cfg_truncation is None:
            return cond, null, weight
        return cond, null, Truncated(weight, float(cfg_truncation))

    def guide(self, denoise: Any, **options: Any) -> Any:
        """With cfg_normalization."""
        most = float(options.get("cfg_normalization") or 0)
        return capped(denoise, most) if most > 0 else denoise


@struct
class Truncated(Scale):
    """Another scale up to a share of the way from noise, t = 1, to data, and 1 behind it."""

    scale: Array | float
    share: Array | float

    def at(self, schedule: PyTree, t: Array, cond: dict[str, PyTree]) -> Array:
        """The scale inside, or 1."""
        return jnp.where(1.0 - t <= self.share, self.scale, 1.0)
