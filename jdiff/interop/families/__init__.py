"""The classes of networks in checkpoints, each a table in a file of its own.

Who may live here: `FAMILY`, which says how a config becomes a network of `jdiff.models` and which
tensor is which; data rather than code.
"""

from collections.abc import Mapping

from jdiff.interop.families import (
    adm,
    autoencoder_dc,
    autoencoder_kl,
    autoencoder_qwen,
    autoencoder_tiny,
    bert,
    clip,
    clip_images,
    cond_unet,
    dit,
    edm,
    edm2,
    flux,
    pixart,
    qwen_image,
    qwen_text,
    sd3,
    t5,
    unet2d,
    z_image,
)
from jdiff.interop.tables import Family

_FAMILIES: tuple[Family, ...] = (
    cond_unet.FAMILY,
    unet2d.FAMILY,
    dit.FAMILY,
    dit.ORIGINAL,
    pixart.FAMILY,
    pixart.OLD_FAMILY,
    flux.FAMILY,
    sd3.FAMILY,
    qwen_image.FAMILY,
    z_image.FAMILY,
    adm.FAMILY,
    *edm.FAMILIES,
    edm2.FAMILY,
    autoencoder_kl.FAMILY,
    autoencoder_tiny.FAMILY,
    autoencoder_qwen.FAMILY,
    autoencoder_dc.FAMILY,
    clip.FAMILY,
    clip.FAMILY_PROJECTED,
    clip_images.FAMILY,
    t5.FAMILY,
    bert.FAMILY,
    *qwen_text.FAMILIES,
)

#: By the class that config.json names, or a layout's own name where it has none.
BY_CLASS: Mapping[str, Family] = {
    name: family for family in _FAMILIES for name in (family.cls, *family.also)
}
