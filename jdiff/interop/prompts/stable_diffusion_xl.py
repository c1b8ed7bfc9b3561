"""SDXL and its refiner: the states before the last layer of two CLIPs, sizes and crops.

The hand-over to the refiner:

    latents = base.latents(key, prompts, steps=40, end=0.8)
    images = refiner(key, prompts, latents=latents, steps=40, start=0.8)
"""

from collections.abc import Sequence

import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.interop.prompts.base import Entries, Parts, Prompts, full
from jdiff.pytree import Array

Size = tuple[int, int]


class StableDiffusionXL(Prompts):
    """StableDiffusionXLPipeline, and StableDiffusionXLImg2ImgPipeline: the refiner.

    Without a negative prompt the null is zeros where model_index.json says so
    (force_zeros_for_empty_prompt), else the empty prompt.
    """

    classes = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
    options = (
        "original_size", "crop", "target_size", "negative_original_size", "negative_crop",
        "negative_target_size", "aesthetic_score", "negative_aesthetic_score",
    )  # fmt: skip

    @classmethod
    def open(cls, parts: Parts) -> "StableDiffusionXL":
        """text_encoder, which the refiner has not, and text_encoder_2."""
        names = [name for name in ("text_encoder", "text_encoder_2") if parts.has(name)]
        encoders = {name: parts.encoder(name, layer=-2, masked=False) for name in names}
        return cls(encoders, parts.index, parts.network.config)

    @property
    def guidance_scale(self) -> float:
        """diffusers' own."""
        return 5.0

    @property
    def scored(self) -> bool:
        """Whether the network is told an aesthetic score: the refiner."""
        return bool(self.index.get("requires_aesthetics_score"))

    def encode(self, texts: Sequence[str]) -> Entries:
        """text `[N, 77, D1 + D2]`, and pooled `[N, P]` of the last encoder."""
        read = [encoder.encode(texts) for encoder in self.encoders.values()]
        text = jnp.concatenate([entries["text"] for entries in read], axis=-1)
        return {"text": text, "pooled": read[-1]["pooled"]}

    def told(
        self, prompts: Sequence[str], negative: Sequence[str] | None, size: Size,
        guidance_scale: float, guided: bool, *, original_size: Size | None = None,
        crop: Size = (0, 0), target_size: Size | None = None,
        negative_original_size: Size | None = None, negative_crop: Size | None = None,
        negative_target_size: Size | None = None, aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
    ) -> tuple[Entries, Entries]:  # fmt: skip
        """The texts and six numbers, five of the refiner (SDXL, Podell et al. 2023, section 2.2).

        Args:
          original_size: (H, W) of the picture before it was cropped; the images' own unless given.
          crop: (top, left) of the crop.
          target_size: (H, W) after cropping; the refiner is told aesthetic_score in its place.
          negative_*: of what is guided away from; the same unless given.
        """
        original, target = original_size or size, target_size or size
        away_original = negative_original_size or original
        away_crop = negative_crop or crop
        away_target = negative_target_size or target
        last = [aesthetic_score] if self.scored else target
        away_last = [negative_aesthetic_score] if self.scored else away_target
        number = len(prompts)
        zeros = negative is None and bool(self.index.get("force_zeros_for_empty_prompt"))
        cond, null = self.pair(prompts, negative, guided and not zeros)
        if guided and zeros:
            null = {name: jnp.zeros_like(value) for name, value in cond.items()}
        cond["time_ids"] = self._numbers(cond, number, [*original, *crop, *last])
        if guided:
            ids = [*away_original, *away_crop, *away_last]
            null["time_ids"] = self._numbers(cond, number, ids)
        return cond, null

    def _numbers(self, cond: Entries, number: int, values: list[float]) -> Array:
        """time_ids `[N, 6 or 5]`, if the network takes as many."""
        width = self.config["projection_class_embeddings_input_dim"]
        left = width - cond["pooled"].shape[-1]
        each = self.config["addition_time_embed_dim"]
        if left != each * len(values):
            raise UserError(
                f"SDXL: the network takes {left / each:g} numbers of size and crop, not "
                f"{len(values)}: requires_aesthetics_score in model_index.json is "
                f"{self.scored}, or text_encoder_2 is another model's."
            )
        return full(number, values)
