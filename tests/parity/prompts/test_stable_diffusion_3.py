"""SD3 as a whole: two CLIPs and T5, with T5 and without."""

import json

import numpy as np
import tiny_pipelines as tiny
from tiny_pipelines import diffusers

from jdiff import interop

ASKED = {"steps": tiny.STEPS, "guidance_scale": 4.0}


def pipeline():
    """diffusers' own, tiny: shifted times, latents that are shifted too."""
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=20,
        pos_embed_max_size=6, num_layers=1,
    )  # fmt: skip
    clip = lambda width: tiny.clip("CLIPTextModelWithProjection", width=width)
    return diffusers.StableDiffusion3Pipeline(
        tiny.randomise(network, std=0.15), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        tiny.autoencoder(scaling_factor=1.5, shift_factor=0.06), clip(12), tiny.clip_tokenizer(),
        clip(10), tiny.clip_tokenizer(), tiny.t5(), tiny.t5_tokenizer(),
    )  # fmt: skip


def test_with_t5_and_without(tmp_path):
    theirs, noise = pipeline(), tiny.noise()
    asked = {"prompt": tiny.PROMPTS, "negative_prompt": tiny.NEGATIVES, "guidance_scale": 4.0}
    asked |= {"height": 16, "width": 16}
    wanted = tiny.drawn(theirs, noise, **asked)
    folder = tiny.saved(theirs, tmp_path)
    pipe = interop.load(folder)
    ours = pipe(tiny.KEY, tiny.PROMPTS, tiny.NEGATIVES, noise=noise, **ASKED)
    tiny.assert_same(ours, wanted)

    # A folder whose T5 was left out: zeros stand for its tokens.
    theirs.text_encoder_3 = theirs.tokenizer_3 = None
    wanted = tiny.drawn(theirs, noise, **asked)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    short = interop.load(folder)(tiny.KEY, tiny.PROMPTS, tiny.NEGATIVES, noise=noise, **ASKED)
    tiny.assert_same(short, wanted)
    assert np.abs(np.asarray(short) - np.asarray(ours)).max() > 8 / 255


def test_in_half_precision(tmp_path):
    noise = tiny.noise()
    asked = {"prompt": tiny.PROMPTS, "guidance_scale": 4.0, "height": 16, "width": 16}
    tiny.assert_as_near_in_half(
        pipeline(), tmp_path, noise, tiny.channels_first(noise), asked, ASKED
    )
