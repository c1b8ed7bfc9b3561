"""Stable Diffusion 1 and 2: one CLIP text encoder, its states after the last norm."""

from collections.abc import Sequence

from jdiff.interop.prompts.base import Entries, Parts, Prompts, full


class StableDiffusion(Prompts):
    """StableDiffusionPipeline, and latent consistency models distilled from one.

    The padding is seen, as in training: the texts are not masked. A network that is told the scale
    (LCM) is not guided.
    """

    classes = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")

    @classmethod
    def open(cls, parts: Parts) -> "StableDiffusion":
        """text_encoder with tokenizer."""
        encoders = {"text_encoder": parts.encoder(layer="last", masked=False)}
        return cls(encoders, parts.index, parts.network.config)

    @property
    def distilled(self) -> bool:
        """Whether the network is told the guidance scale."""
        return self.config.get("time_cond_proj_dim") is not None

    @property
    def steps(self) -> int:
        """diffusers' own."""
        return 4 if self.distilled else 50

    @property
    def guidance_scale(self) -> float:
        """diffusers' own."""
        return 8.5 if self.distilled else 7.5

    def weight(self, guidance_scale: float) -> float | None:
        """The scale, from above 1 on."""
        return None if self.distilled else super().weight(guidance_scale)

    def encode(self, texts: Sequence[str]) -> Entries:
        """text `[N, 77, D]`."""
        return {"text": self.encoders["text_encoder"].encode(texts)["text"]}

    def told(
        self, prompts: Sequence[str], negative: Sequence[str] | None, size: tuple[int, int],
        guidance_scale: float, guided: bool,
    ) -> tuple[Entries, Entries]:  # fmt: skip
        """The texts, and the scale where the network is told of it."""
        cond, null = self.pair(prompts, negative, guided)
        if self.distilled:
            cond["guidance"] = full(len(prompts), guidance_scale)
        return cond, null
