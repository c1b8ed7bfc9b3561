"""configs/emoji_t2i.py and configs/emoji_clip.py: they fit each other and what `encode` writes."""

import pathlib
import re

import pytest

from jdiff import config, experiment, kinds, models
from jdiff.contrastive.retrieval import same
from jdiff.data import Info
from jdiff.data.encoded import Encoded
from jdiff.data.prepare import emoji
from jdiff.data.sources import Field

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
TEXTS = (Field("text", (32, 384), "float16"), Field("text_mask", (32,), "bool"),
         Field("pooled", (384,), "float16"))  # fmt: skip


def encoded(c, latent=None):
    """What the set of a config is: images of its size with texts, or their latents."""
    size = int(re.search(r"\d+", c.data.name).group())
    origin = Encoded(
        source="emoji", shape=(size, size, 3), size=size, crop=None, resample="box",
        autoencoder=latent and "runs/autoencoder", factor=latent[0] if latent else 1,
        text="minilm", caption="caption",
    )  # fmt: skip
    shape = (size // latent[0], size // latent[0], latent[1]) if latent else (size, size, 3)
    fields = tuple(field for field in TEXTS if field.name in c.data.conditions)
    return Info(c.data.name, "train", shape, 10, emoji.GROUPS, 19_874, fields, origin)


@pytest.mark.parametrize(
    ("size", "latent", "millions"), [("full", (8, 4), 63), ("64", (4, 3), 63), ("small", None, 3)]
)
def test_the_networks_fit_the_sets_and_are_told_the_texts(size, latent, millions):
    c = config.load(f"{CONFIGS / 'emoji_t2i.py'}:{size}")
    info = encoded(c, latent)
    exp = experiment.build(c, experiment.prepared(info, c.data))
    experiment.check(exp, info)
    experiment.sampler(c, exp.denoiser(None), exp.null)
    assert {"text"} <= set(exp.null)
    assert round(models.count(exp.shapes()) / 1e6) == millions
    assert c.evaluation.reference == "train"  # samples are of held-out captions


@pytest.mark.parametrize(("size", "millions"), [("full", 9), ("small", 1)])
def test_the_towers_fit_the_sets(size, millions):
    c = config.load(f"{CONFIGS / 'emoji_clip.py'}:{size}")
    kind, info = kinds.of(c), encoded(c)
    exp = kind.build(c, info)
    kind.check(exp, info)
    kind.check_later(exp)
    assert round(models.count(exp.shapes()) / 1e6) == millions
    assert not c.data.flip  # captions say "facing right"


def test_the_small_forms_are_of_one_set_and_one_rule():
    drawn, judge = (config.load(f"{CONFIGS / name}:small")
                    for name in ("emoji_t2i.py", "emoji_clip.py"))  # fmt: skip
    assert drawn.data.name == judge.data.name == "emoji32_minilm"
    assert drawn.evaluation.same == judge.evaluation.same


def test_captions_that_differ_in_style_and_tone_alone_are_of_the_same_thing():
    rule = config.load(str(CONFIGS / "emoji_clip.py")).evaluation.same
    tones = ("", *(f"-{tone}-skin-tone" for tone in
                   ("light", "medium-light", "medium", "medium-dark", "dark")))  # fmt: skip
    biking = [emoji.caption(style, f"man-biking{tone}") for style in emoji.STYLES for tone in tones]
    apples = [emoji.caption(style, "apple") for style in emoji.STYLES]
    couple = "women-holding-hands-light-skin-tone-dark-skin-tone"
    others = [emoji.caption("noto", "man-walking"), emoji.caption("noto", couple),
              emoji.caption("fluent 3d", "women-holding-hands")]  # fmt: skip
    found = same(biking + apples + others, rule)
    assert len(biking) == 36 and set(found[:36]) == {0} and set(found[36:42]) == {1}
    assert found[42:].tolist() == [2, 3, 3]
