"""Configs of the U-Nets: what they cannot say, and what we cannot serve, is refused by name."""

import dataclasses

import pytest

from jdiff import models
from jdiff.errors import UserError
from jdiff.interop.families import cond_unet, unet2d
from jdiff.models.unet_blocks import STYLES

#: config.json of published checkpoints (without what is their class's default), and their sizes.
PUBLISHED = {
    "google/ddpm-cifar10-32": (
        unet2d,
        {
            "attention_head_dim": None,
            "block_out_channels": [128, 256, 256, 256],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
            "sample_size": 32,
        },
        35_746_307,
    ),
    "google/ddpm-celebahq-256": (
        unet2d,
        {
            "attention_head_dim": None,
            "block_out_channels": [128, 128, 256, 256, 512, 512],
            "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
            "sample_size": 256,
        },
        113_673_219,
    ),
    "stable-diffusion-v1-5": (cond_unet, {"cross_attention_dim": 768}, 859_520_964),
    "stable-diffusion-2-1": (
        cond_unet,
        {
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "upcast_attention": True,
            "use_linear_projection": True,
        },
        865_910_724,
    ),
    "stable-diffusion-xl-base-1.0": (
        cond_unet,
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "projection_class_embeddings_input_dim": 2816,
            "transformer_layers_per_block": [1, 2, 10],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "use_linear_projection": True,
        },
        2_567_463_684,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_build_networks_of_the_published_size(name):
    family, config, size = PUBLISHED[name]
    model, fields = family.FAMILY.build(config)
    _, shapes = models.abstract(lambda rngs: model(**fields, rngs=rngs))
    assert models.count(shapes) == size
    assert family.FAMILY.build(family.FAMILY.config(fields)) == (model, fields)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        (cond_unet, {"mid_block_type": None}, "mid_block_type=None is not served"),
        (cond_unet, {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        (cond_unet, {"addition_embed_type": "text"}, "only None and 'text_time'"),
        (
            cond_unet,
            {"down_block_types": ["KDownBlock2D"] * 4},
            "down_block_types has 'KDownBlock2D'; served are DownBlock2D, CrossAttnDownBlock2D",
        ),
        (cond_unet, {"up_block_types": ["UpBlock2D"] * 4}, "do not mirror down_block_types"),
        (cond_unet, {"transformer_layers_per_block": [1, [1, 2], 1, 1]}, "only a number a level"),
        (cond_unet, {"cross_attention_dim": [8, 8, 16, 8]}, "only one for all levels"),
        (unet2d, {"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        (unet2d, {"flip_sin_to_cos": False}, r"flip_sin_to_cos, freq_shift = \(False, 0\)"),
        (unet2d, {"upsample_type": "resnet"}, "only both 'conv' or both 'resnet'"),
        (unet2d, {"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups=None"),
        (unet2d, {"down_block_types": ["SkipDownBlock2D"] * 4}, "'SkipDownBlock2D'; served are"),
        (unet2d, {"up_block_types": ["UpBlock2D"] * 4}, "do not mirror down_block_types"),
    ],
)
def test_configs_that_are_not_served(family, config, message):
    with pytest.raises(UserError, match=message):
        family.FAMILY.build(config)


SPELLED = dataclasses.replace(STYLES["ddpm"], label="after")


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (cond_unet, models.sd15(scalars=("t-s",)), r"has no scalars=\('t-s',\)"),
        (cond_unet, models.sd15(time_scale=1000.0), "has no time_scale=1000.0"),
        (
            cond_unet,
            models.sd15(depths=(0, 0, 0, 2)),
            "one depth for the last level and the middle",
        ),
        (unet2d, models.ddpmpp_cifar10(augment_dim=0), "has no .*skip_scale"),
        (unet2d, models.ddpm_cifar10(num_classes=10), "has no label='before'"),
        (unet2d, models.ddpm_cifar10(channels=64), "has no groups that differ"),
        (unet2d, models.ddpm_cifar10(multipliers=(2, 2)), "has no multipliers"),
        (unet2d, models.ddpm_cifar10(style=SPELLED, scalars=("s",)), "has no scalars"),
    ],
)
def test_networks_that_their_config_cannot_say(family, fields, message):
    with pytest.raises(UserError, match=message):
        family.FAMILY.config(fields)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (cond_unet, models.sd15()),
        (cond_unet, models.sdxl(out_channels=8)),
        (cond_unet, models.sd_upscaler(out_channels=8)),  # 7 channels in, 8 out
        (cond_unet, models.sd2(in_channels=4, low_res_channels=5, guidance_channels=256)),
        (unet2d, models.ddpm_cifar10(style=SPELLED, num_classes=10)),
        (unet2d, models.ddpm_cifar10(in_channels=1, out_channels=2, low_res_channels=4)),
        (cond_unet, models.sd_upscaler(low_res_method="nearest")),
        (unet2d, models.ddpm_cifar10(in_channels=3, low_res_channels=3, low_res_method="bicubic")),
    ],
)
def test_the_network_written_is_the_network_read(family, changes):
    _, again = family.FAMILY.build(family.FAMILY.config(changes))
    kept = {name: value for name, value in again.items() if name in changes and name != "style"}
    assert kept == {name: value for name, value in changes.items() if name != "style"}
    assert again["low_res_channels"] == changes.get("low_res_channels", 0)
