"""The published networks of iDDPM, ADM, CDM and Imagen's base, as fields of `UNet`.

Nichol and Dhariwal 2021 (iDDPM) and Dhariwal and Nichol 2021 (ADM, with the upsamplers of its
section 5): t is the step, 0..999, and all learn the reverse variance, in six channels for images
of three. Ho et al. 2022 (CDM) build on iDDPM, and Saharia et al. 2022 (Imagen) on ADM at 64 pixels,
with text.
"""

import dataclasses

from jdiff.errors import choose
from jdiff.models.unet_blocks import STYLES

_ADM = {"out_channels": 6, "num_classes": 1000, "style": "adm"}
_FOUR_HEADS = dataclasses.replace(STYLES["adm"], heads=4)


def iddpm_cifar10(**changes) -> dict:
    """Fields of iDDPM's CIFAR-10 network (52.5 M parameters)."""
    fields = {"image_size": 32, "channels": 128, "multipliers": (1, 2, 2, 2), "blocks": 3}
    fields |= {"attention_sizes": (16, 8), "out_channels": 6, "dropout": 0.3, "style": "iddpm"}
    return fields | changes


def adm_imagenet(image_size: int = 256, **changes) -> dict:
    """Fields of ADM's class-conditional networks for ImageNet at 64, 128, 256 or 512 pixels.

    295.9, 421.5, 553.8 and 559.0 M parameters. The published unconditional one at 256 pixels is
    `adm_imagenet(256, num_classes=0)`; `adm_imagenet64` is EDM's, without learned variance.

    Raises:
        UserError: for another size.
    """
    sizes = {
        64: {"channels": 192, "multipliers": (1, 2, 3, 4), "blocks": 3, "dropout": 0.1},
        128: {"multipliers": (1, 1, 2, 3, 4), "style": _FOUR_HEADS},
        256: {"multipliers": (1, 1, 2, 2, 4, 4)},
        512: {"multipliers": (0.5, 1, 1, 2, 2, 4, 4)},
    }
    by_name = {str(size): fields for size, fields in sizes.items()}
    size = by_name[choose("adm_imagenet: image_size", str(image_size), by_name)]
    fields = {
        "image_size": image_size,
        "channels": 256,
        "blocks": 2,
        "attention_sizes": (32, 16, 8),
    }
    return _ADM | fields | size | changes


def adm_upsampler(image_size: int = 256, **changes) -> dict:
    """Fields of ADM's upsamplers to 256 (from 64) or 512 pixels (from 128): 311.8 and 308.8 M.

    `cond` holds the small image as "low_res" `[B, h, w, 3]`, in the range of x.

    Raises:
        UserError: for another size.
    """
    sizes = {
        "256": {"attention_sizes": (32, 16, 8), "style": _FOUR_HEADS},
        "512": {"attention_sizes": (32, 16)},
    }
    size = sizes[choose("adm_upsampler: image_size", str(image_size), sizes)]
    fields = {"image_size": image_size, "low_res_channels": 3, "channels": 192, "blocks": 2}
    return _ADM | fields | {"multipliers": (1, 1, 2, 2, 4, 4)} | size | changes


def imagen_base(**changes) -> dict:
    """Fields of Imagen's network for 64 pixels (appendix F.1): ADM with text of T5-XXL.

    The widths of the embedding and of the pooling are not given; with those here it has 2.4 B
    parameters, in the paper 2 B. `t` lies in [0, 1].
    """
    fields = {"image_size": 64, "channels": 512, "multipliers": (1, 2, 3, 4), "blocks": 3}
    fields |= {"attention_sizes": (32, 16, 8), "text_width": 4096, "style": "adm"}
    return fields | {"time_scale": 1000.0} | changes


def cdm_imagenet(image_size: int = 32, **changes) -> dict:
    """Fields of CDM's class-conditional networks for ImageNet (Ho et al. 2022, appendix B).

    The base for 32 pixels, and super-resolution to 64 (from 32), 128 and 256 (both from 64). The
    first two learn their variance; the last two are SR3's networks (Saharia et al. 2021), of which
    that paper counts 550 and 625 M parameters, these 579 and 638 M. CDM gives no counts (the first
    two have 792 and 717 M), and says of the blocks of the first two only that they are those of
    DDPM and its relatives: here they are improved DDPM's, whose losses they share.

    Raises:
        UserError: for another size.
    """
    small = {"channels": 256, "multipliers": (1, 2, 3, 4), "attention_sizes": (16, 8)}
    small |= {"out_channels": 6, "dropout": 0.1}
    large = {"channels": 128, "blocks": 3, "attention_sizes": (16,), "style": "sr3"}
    sizes = {
        "32": small | {"blocks": 6},
        "64": small | {"blocks": 5, "low_res_channels": 3},
        "128": large | {"multipliers": (1, 2, 4, 8, 8), "low_res_channels": 3},
        "256": large | {"multipliers": (1, 2, 4, 4, 8, 8), "low_res_channels": 3},
    }
    size = sizes[choose("cdm_imagenet: image_size", str(image_size), sizes)]
    return {"image_size": image_size, "num_classes": 1000, "style": "iddpm"} | size | changes
