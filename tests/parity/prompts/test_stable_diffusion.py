"""Stable Diffusion 1 and 2 as a whole: texts, ten guided steps and the decoder, from one noise."""

import tiny_pipelines as tiny
from tiny_pipelines import diffusers

from jdiff import interop


def pipeline():
    """diffusers' own, tiny."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16,), layers_per_block=1, norm_num_groups=4, sample_size=8,
        attention_head_dim=2, cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1)
    return diffusers.StableDiffusionPipeline(
        tiny.autoencoder(), tiny.clip(), tiny.clip_tokenizer(), tiny.randomise(unet, std=0.1),
        scheduler, None, None, requires_safety_checker=False,
    )  # fmt: skip


def test_with_negative_prompts(tmp_path):
    theirs, noise = pipeline(), tiny.noise()
    wanted = tiny.drawn(
        theirs, noise, prompt=tiny.PROMPTS, negative_prompt=tiny.NEGATIVES, guidance_scale=4.0
    )
    pipe = interop.load(tiny.saved(theirs, tmp_path))
    assert pipe.unread == {}
    ours = pipe(
        tiny.KEY, tiny.PROMPTS, tiny.NEGATIVES, steps=tiny.STEPS, guidance_scale=4.0, noise=noise
    )
    tiny.assert_same(ours, wanted)


def test_in_half_precision(tmp_path):
    noise, asked = tiny.noise(), {"prompt": tiny.PROMPTS, "guidance_scale": 4.0}
    ours = {"guidance_scale": 4.0, "steps": tiny.STEPS}
    tiny.assert_as_near_in_half(
        pipeline(), tmp_path, noise, tiny.channels_first(noise), asked, ours
    )
