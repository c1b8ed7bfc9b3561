"""Qwen-Image: a description asked of Qwen2.5-VL, and guidance that keeps each patch's norm."""

from collections.abc import Mapping, Sequence
from typing import Any

from jdiff.errors import UserError
from jdiff.interop.prompts.base import Entries, Parts, Prompts
from jdiff.interop.prompts.norms import renormed

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity"
    ", text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}"
    "<|im_end|>\n<|im_start|>assistant\n"
)
DROP = 34  # tokens of the template ahead of the text


class QwenImage(Prompts):
    """QwenImagePipeline; guidance_scale is diffusers' true_cfg_scale.

    diffusers does not guide without a negative prompt; here it is then " ", as the model's card has
    it. With guidance_scale=1 there is none. Attention never sees padding, so
    `texts={"length": 128}` draws the same images of short prompts at less cost.
    """

    classes = ("QwenImagePipeline",)
    long = ("text_encoder",)
    empty = " "

    @classmethod
    def open(cls, parts: Parts) -> "QwenImage":
        """text_encoder: the text in a template, whose first tokens are dropped; 512 are left."""
        encoder = parts.encoder(layer="last", masked=True, length=512, template=TEMPLATE, drop=DROP)
        return cls({"text_encoder": encoder}, parts.index, parts.network.config)

    @property
    def guidance_scale(self) -> float:
        """diffusers' own."""
        return 4.0

    def encode(self, texts: Sequence[str]) -> Entries:
        """text `[N, 512, D]` and text_mask `[N, 512]`."""
        read = self.encoders["text_encoder"].encode(texts)
        return {"text": read["text"], "text_mask": read["mask"]}

    def guide(self, denoise: Any, **options: Any) -> Any:
        """With the norm of each patch of the velocity that of the conditional one."""
        return renormed(denoise, self.config.get("patch_size", 2))

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuses options, which the family has not; diffusers' scale has another name here.

        Raises:
          UserError: any.
        """
        if "true_cfg_scale" in options:
            raise UserError("pipe: QwenImagePipeline's true_cfg_scale is guidance_scale= here.")
        super().check(options)
