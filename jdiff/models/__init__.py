"""Networks in Flax NNX, and the four functions that turn a module into plain pytrees.

Who may live here: network architectures (one family a file) and the layers they share. A network
is called as `model(x [B, H, W, C], t [B], cond, key=None)`, computes the raw output F of the
parameterisation, and knows nothing of schedules, losses, guidance or meshes. `t` is the noise
conditioning the parameterisation hands over, already mapped to the network's scale.
"""

from jdiff.models.adm import (
    adm_imagenet,
    adm_upsampler,
    cdm_imagenet,
    iddpm_cifar10,
    imagen_base,
)
from jdiff.models.cond_unet import CondUNet, sd2, sd15, sd_upscaler, sdxl
from jdiff.models.dit import DiT, dit_imagenet, sit_imagenet, stack_blocks, unstack_blocks
from jdiff.models.dit_untied import UntiedDiT
from jdiff.models.edm2 import EDM2, edm2_imagenet
from jdiff.models.efficient_unet import EfficientUNet, imagen_upsampler
from jdiff.models.flux import Flux, flux_dev, flux_schnell
from jdiff.models.functional import Apply, abstract, axes, count, init, split
from jdiff.models.jit import JiT, jit_imagenet
from jdiff.models.mmdit import MMDiT, mmdit, sd3_medium, sd35_large, sd35_medium
from jdiff.models.pixart import PixArt, pixart_alpha, pixart_sigma
from jdiff.models.qwen_image import QwenImage, qwen_image
from jdiff.models.unet import (
    STYLES,
    Style,
    UNet,
    adm_imagenet64,
    ddpm_cifar10,
    ddpmpp_cifar10,
    ncsnpp_cifar10,
)
from jdiff.models.uvit import UViT, uvit_imagenet, uvit_pixels
from jdiff.models.z_image import ZImage, z_image

__all__ = [
    "BY_NAME",
    "EDM2",
    "STYLES",
    "Apply",
    "CondUNet",
    "DiT",
    "EfficientUNet",
    "Flux",
    "JiT",
    "MMDiT",
    "PixArt",
    "QwenImage",
    "Style",
    "UNet",
    "UViT",
    "UntiedDiT",
    "ZImage",
    "abstract",
    "adm_imagenet",
    "adm_imagenet64",
    "adm_upsampler",
    "axes",
    "cdm_imagenet",
    "count",
    "ddpm_cifar10",
    "ddpmpp_cifar10",
    "dit_imagenet",
    "edm2_imagenet",
    "flux_dev",
    "flux_schnell",
    "iddpm_cifar10",
    "imagen_base",
    "imagen_upsampler",
    "init",
    "jit_imagenet",
    "mmdit",
    "ncsnpp_cifar10",
    "pixart_alpha",
    "pixart_sigma",
    "qwen_image",
    "sd15",
    "sd2",
    "sd35_large",
    "sd35_medium",
    "sd3_medium",
    "sd_upscaler",
    "sdxl",
    "sit_imagenet",
    "split",
    "stack_blocks",
    "unstack_blocks",
    "uvit_imagenet",
    "uvit_pixels",
    "z_image",
]

#: Networks by name, as configs give them.
BY_NAME = {
    "unet": UNet,
    "cond_unet": CondUNet,
    "dit": DiT,
    "pixart": PixArt,
    "uvit": UViT,
    "jit": JiT,
    "edm2": EDM2,
    "efficient_unet": EfficientUNet,
    "qwen_image": QwenImage,
    "z_image": ZImage,
    "mmdit": MMDiT,
    "flux": Flux,
}
