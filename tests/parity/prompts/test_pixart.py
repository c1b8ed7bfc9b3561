"""PixArt as a whole: masked T5, and the size and shape of the picture."""

import pytest
import tiny_pipelines as tiny
from tiny_pipelines import diffusers

from jdiff import interop


def pipeline():
    """diffusers' own, tiny, as of alpha at 1024 px; a learned variance."""
    network = diffusers.PixArtTransformer2DModel(
        sample_size=128, in_channels=4, out_channels=8, num_layers=1, num_attention_heads=2,
        attention_head_dim=12, cross_attention_dim=24, caption_channels=24,
        use_additional_conditions=True,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return diffusers.PixArtAlphaPipeline(
        tiny.t5_tokenizer(), tiny.t5(), tiny.autoencoder(), tiny.randomise(network, std=0.2),
        scheduler,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # theirs
def test_alpha_with_its_size_and_shape(tmp_path):
    theirs, noise = pipeline(), tiny.noise()
    wanted = tiny.drawn(
        theirs, noise, prompt=tiny.PROMPTS, negative_prompt=tiny.NEGATIVES, guidance_scale=4.0,
        height=16, width=16, use_resolution_binning=False, clean_caption=False,
    )  # fmt: skip
    pipe = interop.load(tiny.saved(theirs, tmp_path))
    ours = pipe(
        tiny.KEY, tiny.PROMPTS, tiny.NEGATIVES, steps=tiny.STEPS, guidance_scale=4.0, size=16,
        noise=noise,
    )  # fmt: skip
    tiny.assert_same(ours, wanted)
    cond, _ = pipe.prompts.told(["a"], None, (16, 8), 1.0, False)
    assert cond["resolution"].tolist() == [[16, 8]] and cond["aspect_ratio"].tolist() == [2]
    assert pipe.prompts.encode([" A Fox"])["text"].shape == (1, 120, 24)
