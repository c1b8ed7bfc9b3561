"""Z-Image: a chat's turn read by Qwen3, one layer before its last."""

from collections.abc import Sequence

from jdiff.interop.prompts.base import Entries, Parts, Prompts

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


class ZImage(Prompts):
    """ZImagePipeline. Its guidance_scale counts from 0: conditional + g (conditional - null).

    Z-Image-Turbo is used with guidance_scale=0.
    """

    classes = ("ZImagePipeline",)
    long = ("text_encoder",)

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
