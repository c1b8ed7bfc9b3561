"""Qwen-Image: a description asked of Qwen2.5-VL, and guidance that keeps each patch's norm."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.guidance.base import Pair, Refinement, from_target, refinable, to_target
from jdiff.interop.prompts.base import Entries, Parts, Prompts
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, static, struct
from jdiff.solvers.base import safe_ratio

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity"
    ", text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}"
    "<|im_end|>\n<|im_start|>assistant\n"
)
DROP = 34  # tokens of the template ahead of the text


class QwenImage(Prompts):
    """QwenImagePipeline; guidance_scale is diffusers' true_cfg_scale.

    diffusers does not guide without a negative prompt; here it is then " ", as the model's card has
    it. With guidance_scale=1 there is none.
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

    def guide(self, denoise: Any) -> Any:
        """With the norm of each patch of the velocity that of the conditional one."""
        return renormed(denoise, self.config.get("patch_size", 2))


@struct
class Renormed(Refinement):
    """The guided denoiser that `renormed` makes."""

    denoiser: Any
    patch: int = static(2)

    def guide(self, x: PyTree, t: Array, pair: Pair) -> Prediction:
        """The inner result, its velocity rescaled patch by patch."""
        guided = self.denoiser.guide(x, t, pair)
        made, good = (to_target("velocity", self.schedule, p, t) for p in (guided, pair.good))
        value = jax.tree.map(self._rescaled, made, good)
        return from_target("velocity", self.schedule, value, x, t, guided)

    def _rescaled(self, made: Array, good: Array) -> Array:
        batch, height, width, channels = made.shape
        cut = (batch, height // self.patch, self.patch, width // self.patch, self.patch, channels)
        norm = lambda a: jnp.linalg.norm(
            a.reshape(cut).transpose(0, 1, 3, 2, 4, 5).reshape(batch, cut[1], cut[3], -1), axis=-1
        )
        ratio = safe_ratio(norm(good), norm(made))[..., None]
        return made * jnp.repeat(jnp.repeat(ratio, self.patch, 1), self.patch, 2)


def renormed(denoise: Any, patch: int = 2) -> Renormed:
    """Gives each patch of the guided velocity the norm of the conditional one (Qwen-Image).

    Args:
      denoise: a guidance that extrapolates (cfg, ...).
      patch: side of a patch in latent pixels.

    Raises:
      UserError: nothing to refine.
    """
    return Renormed(refinable("renormed", denoise), patch)
