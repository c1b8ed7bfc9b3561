"""SDXL as a whole: two encoders, sizes and crops, and the hand-over to the refiner."""

import numpy as np
import pytest
import tiny_pipelines as tiny
from tiny_pipelines import diffusers, torch

from jdiff import interop
from jdiff.errors import UserError

WIDTHS = (12, 10)  # of the two encoders
SIZES = {"original_size": (40, 24), "target_size": (16, 16)}


def unet(numbers: int, text_width: int):
    """With `numbers` of size and crop."""
    network = diffusers.UNet2DConditionModel(
        block_out_channels=(16,), layers_per_block=1, norm_num_groups=4, sample_size=8,
        attention_head_dim=2, cross_attention_dim=text_width, use_linear_projection=True,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * numbers + 10,
    )  # fmt: skip
    return tiny.randomise(network, std=0.1)


def scheduler():
    """SDXL's."""
    return diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        timestep_spacing="leading",
    )  # fmt: skip


def base():
    """Two encoders of widths 12 and 10."""
    parts = {
        "vae": tiny.autoencoder(), "text_encoder": tiny.clip(width=WIDTHS[0]),
        "text_encoder_2": tiny.clip("CLIPTextModelWithProjection", width=WIDTHS[1]),
        "tokenizer": tiny.clip_tokenizer(), "tokenizer_2": tiny.clip_tokenizer(),
        "unet": unet(6, sum(WIDTHS)), "scheduler": scheduler(),
    }  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)


def refiner():
    """The second encoder alone, and an aesthetic score."""
    parts = {
        "vae": tiny.autoencoder(), "text_encoder": None, "tokenizer": None,
        "text_encoder_2": tiny.clip("CLIPTextModelWithProjection", width=WIDTHS[1]),
        "tokenizer_2": tiny.clip_tokenizer(), "unet": unet(5, WIDTHS[1]), "scheduler": scheduler(),
    }  # fmt: skip
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        **parts, requires_aesthetics_score=True, add_watermarker=False
    )


@pytest.mark.filterwarnings("ignore")  # theirs
def test_sizes_crops_and_the_hand_over_to_the_refiner(tmp_path):
    noise = tiny.noise()
    first, second = base(), refiner()
    asked = {"prompt": tiny.PROMPTS, "negative_prompt": tiny.NEGATIVES, "guidance_scale": 4.0}
    latents = tiny.drawn(
        first, noise, **asked, **SIZES, crops_coords_top_left=(3, 5), denoising_end=0.6,
        output_type="latent",
    )  # fmt: skip
    second.set_progress_bar_config(disable=True)
    with torch.no_grad():
        images = second(
            **asked, image=latents, num_inference_steps=tiny.STEPS, denoising_start=0.6,
            aesthetic_score=7.0, negative_aesthetic_score=2.0, output_type="np",
        ).images  # fmt: skip

    one = interop.load(tiny.saved(first, tmp_path / "base"))
    ours = {"steps": tiny.STEPS, "guidance_scale": 4.0}
    between = one.latents(
        tiny.KEY, tiny.PROMPTS, tiny.NEGATIVES, noise=noise, end=0.6, **SIZES, crop=(3, 5), **ours
    )
    other = interop.load(tiny.saved(second, tmp_path / "refiner"))
    drawn = other(
        tiny.KEY, tiny.PROMPTS, tiny.NEGATIVES, latents=between, start=0.6, aesthetic_score=7.0,
        negative_aesthetic_score=2.0, **ours,
    )  # fmt: skip
    tiny.assert_same(drawn, images)

    # Without a negative prompt the null is zeros, as the folder says.
    assert one.index["force_zeros_for_empty_prompt"]
    wanted = tiny.drawn(first, noise, prompt=tiny.PROMPTS, guidance_scale=4.0)
    tiny.assert_same(one(tiny.KEY, tiny.PROMPTS, noise=noise, **ours), wanted)

    # What is guided away from has sizes of its own. diffusers gives those of several prompts to the
    # wrong rows: it repeats (null, cond) as a pair, where its batch has all nulls first.
    away = {"negative_original_size": (64, 32), "negative_crop": (1, 2)}
    cond, null = one.prompts.told(tiny.PROMPTS, None, (16, 16), 4.0, True, **SIZES, **away)
    np.testing.assert_array_equal(cond["time_ids"], [[40, 24, 0, 0, 16, 16]] * 2)
    np.testing.assert_array_equal(null["time_ids"], [[64, 32, 1, 2, 16, 16]] * 2)

    with pytest.raises(UserError, match="Did you mean 'aesthetic_score'"):
        other(tiny.KEY, "a", aestetic_score=7.0)
