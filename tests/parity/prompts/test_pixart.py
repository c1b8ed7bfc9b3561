"""PixArt as a whole: masked T5, and, of alpha, the size and shape of the picture."""

import numpy as np
import pytest
import tiny_pipelines as tiny
from checkpoints import images
from tiny_pipelines import diffusers, torch

from jdiff import interop

SIZE = (16, 24)  # not square: rows and columns, height / width are told apart
CLEAN = {"clean_caption": False, "use_resolution_binning": False}


def pipeline(name: str):
    """diffusers' own, tiny, as at 1024 px, where alpha is told sizes; a learned variance."""
    network = diffusers.PixArtTransformer2DModel(
        sample_size=128, in_channels=4, out_channels=8, num_layers=1, num_attention_heads=2,
        attention_head_dim=12, cross_attention_dim=24, caption_channels=24,
        use_additional_conditions=name == "PixArtAlphaPipeline",
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler()
    parts = tiny.t5_tokenizer(), tiny.t5(), tiny.autoencoder()
    network = tiny.randomise(network, std=0.2)
    return getattr(diffusers, name)(*parts, network, scheduler)


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(
    "name, length", [("PixArtAlphaPipeline", 120), ("PixArtSigmaPipeline", 300)]
)
def test_images_agree(name, length, tmp_path):
    theirs, noise = pipeline(name), np.repeat(images(1, 8, 12, 4, seed=7), 2, 0)
    asked = {"prompt": tiny.PROMPTS, "negative_prompt": tiny.NEGATIVES, "guidance_scale": 4.0}
    wanted = tiny.drawn(theirs, noise, **asked, height=SIZE[0], width=SIZE[1], **CLEAN)
    pipe = interop.load(tiny.saved(theirs, tmp_path))
    ours = pipe(
        tiny.KEY, tiny.PROMPTS, tiny.NEGATIVES, steps=tiny.STEPS, guidance_scale=4.0, size=SIZE,
        noise=noise,
    )  # fmt: skip
    tiny.assert_same(ours, wanted)

    cond, null = pipe.prompts.told([" A Fox "], None, SIZE, 4.0, True)
    with torch.no_grad():
        text, mask, away, away_mask = theirs.encode_prompt(" A Fox ")
    np.testing.assert_allclose(cond["text"][0, :4], text[0, :4], atol=1e-4)
    assert cond["text"].shape == (1, length, 24)
    assert int(cond["text_mask"].sum()) == int(mask.sum()) == 6
    np.testing.assert_allclose(null["text"][0, :1], away[0, :1], atol=1e-4)
    assert int(null["text_mask"].sum()) == int(away_mask.sum()) == 1
    sizes = {k: v.tolist() for k, v in cond.items() if not k.startswith("text")}
    alpha = {"resolution": [[16, 24]], "aspect_ratio": [np.float32(16 / 24)]}
    assert sizes == (alpha if name == "PixArtAlphaPipeline" else {})
