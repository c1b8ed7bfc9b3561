"""What the families of text-to-image pipelines make of prompts, one file a family.

Who may live here: subclasses of `base.Prompts`: which encoders a folder has and which of their
layers the network reads, lengths and templates, what a missing negative prompt means, and what the
guidance scale does. Nothing here samples or decodes: that is `interop.pipeline`.
"""

from collections.abc import Mapping

from jdiff.interop.prompts.base import Parts, Prompts, listed, paired, taken
from jdiff.interop.prompts.flux import Flux
from jdiff.interop.prompts.pixart import PixArt
from jdiff.interop.prompts.qwen_image import QwenImage
from jdiff.interop.prompts.stable_diffusion import StableDiffusion
from jdiff.interop.prompts.stable_diffusion_3 import StableDiffusion3
from jdiff.interop.prompts.stable_diffusion_xl import StableDiffusionXL
from jdiff.interop.prompts.z_image import ZImage

_FAMILIES: tuple[type[Prompts], ...] = (
    StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, PixArt, QwenImage, ZImage,
)  # fmt: skip

#: By `_class_name` of model_index.json.
BY_CLASS: Mapping[str, type[Prompts]] = {
    name: family for family in _FAMILIES for name in family.classes
}

__all__ = ["BY_CLASS", "Parts", "Prompts", "listed", "paired", "taken"]
