"""FLUX.1 as a whole: guidance that the network is told, and that of a second call beside it."""

import pytest
import tiny_pipelines as tiny
from tiny_pipelines import diffusers

from jdiff import interop
from jdiff.errors import UserError


def pipeline(told: bool = True):
    """diffusers' own, tiny: of dev, or of schnell, which is not told the scale."""
    network = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=12,
        guidance_embeds=told, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=told)
    return diffusers.FluxPipeline(
        scheduler, tiny.autoencoder(scaling_factor=0.8, shift_factor=0.1), tiny.clip(),
        tiny.clip_tokenizer(), tiny.t5(), tiny.t5_tokenizer(), tiny.randomise(network, std=0.15),
    )  # fmt: skip


def test_guidance_told_and_guidance_from_negative_prompts(tmp_path):
    theirs, noise = pipeline(), tiny.noise()
    wanted = tiny.drawn(
        theirs, tiny.packed(noise), prompt=tiny.PROMPTS, negative_prompt=tiny.NEGATIVES,
        guidance_scale=2.5, true_cfg_scale=3.0, height=16, width=16,
    )  # fmt: skip
    pipe = interop.load(tiny.saved(theirs, tmp_path))
    ours = pipe(
        tiny.KEY, tiny.PROMPTS, tiny.NEGATIVES, steps=tiny.STEPS, guidance_scale=2.5,
        true_cfg_scale=3.0, size=16, noise=noise,
    )  # fmt: skip
    tiny.assert_same(ours, wanted)

    assert pipe.prompts.steps == 28 and pipe.prompts.side == 128
    cond, null, weight = pipe.prompts.asked(tiny.PROMPTS, None, (16, 16))
    assert (null, weight) == ({}, None) and cond["guidance"].tolist() == [3.5, 3.5]
    with pytest.raises(UserError, match="negative prompts need true_cfg_scale="):
        pipe(tiny.KEY, "a fox", "a dog", size=16)


def test_schnell_is_told_no_scale(tmp_path):
    theirs, noise = pipeline(told=False), tiny.noise()
    pipe = interop.load(tiny.saved(theirs, tmp_path))
    cond, null, weight = pipe.prompts.asked(["a fox"], None, (16, 16), 3.5)
    assert sorted(cond) == ["pooled", "text"] and weight is None and pipe.prompts.steps == 4
    wanted = tiny.drawn(theirs, tiny.packed(noise), prompt=tiny.PROMPTS, height=16, width=16)
    ours = pipe(tiny.KEY, tiny.PROMPTS, steps=tiny.STEPS, size=16, noise=noise)
    tiny.assert_same(ours, wanted)


def test_in_half_precision(tmp_path):
    noise, ours = tiny.noise(), {"guidance_scale": 2.5, "steps": tiny.STEPS, "size": 16}
    asked = {"prompt": tiny.PROMPTS, "guidance_scale": 2.5, "height": 16, "width": 16}
    tiny.assert_as_near_in_half(pipeline(), tmp_path, noise, tiny.packed(noise), asked, ours)
