"""FLUX.1: T5's tokens, CLIP's pooled vector, and guidance that the network is told."""

from collections.abc import Sequence

from jdiff.errors import UserError
from jdiff.interop.prompts.base import Entries, Parts, Prompts, full


class Flux(Prompts):
    """FluxPipeline: dev (guidance_embeds), which is told guidance_scale, and schnell, which is not.

    Guidance by a second call of the network is true_cfg_scale=, with negative prompts or the empty
    one. T5 is not told which tokens are padding.
    """

    classes = ("FluxPipeline",)
    long = ("text_encoder_2",)
    options = ("true_cfg_scale",)

    @classmethod
    def open(cls, parts: Parts) -> "Flux":
        """text_encoder (CLIP) and text_encoder_2 (T5, 512 tokens)."""
        encoders = {
            "text_encoder": parts.encoder(masked=False),
            "text_encoder_2": parts.encoder("text_encoder_2", length=512, masked=False),
        }
        return cls(encoders, parts.index, parts.network.config)

    @property
    def distilled(self) -> bool:
        """Whether the network is told the guidance scale."""
        return bool(self.config.get("guidance_embeds"))

    @property
    def steps(self) -> int:
        """28 of dev; schnell was distilled to 4."""
        return 28 if self.distilled else 4

    @property
    def guidance_scale(self) -> float:
        """diffusers' own."""
        return 3.5

    def encode(self, texts: Sequence[str]) -> Entries:
        """text `[N, 512, D]` and pooled `[N, P]`."""
        pooled, text = (encoder.encode(texts) for encoder in self.encoders.values())
        return {"text": text["text"], "pooled": pooled["pooled"]}

    def asked(
        self, prompts: Sequence[str], negative: Sequence[str] | None, size: tuple[int, int],
        guidance_scale: float | None = None, *, true_cfg_scale: float | None = None,
    ) -> tuple[Entries, Entries, float | None]:  # fmt: skip
        """The texts, and the scale that the network is told.

        Args:
          true_cfg_scale: w of null + w (conditional - null), on top of what the network is told;
            with negative prompts it is needed.

        Raises:
          UserError: negative prompts without it.
        """
        if negative is not None and true_cfg_scale is None:
            raise UserError(
                "FluxPipeline is told its guidance and has no null: negative prompts need "
                "true_cfg_scale=, e.g. 4.0, a second call of the network at every step."
            )
        weight = self.weight(1.0 if true_cfg_scale is None else true_cfg_scale)
        cond, null = self.pair(prompts, negative, weight is not None)
        if self.distilled:
            scale = self.guidance_scale if guidance_scale is None else guidance_scale
            cond["guidance"] = full(len(prompts), scale)
        return cond, null, weight
