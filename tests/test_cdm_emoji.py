"""configs/cdm_emoji.py: three stages that fit each other, each guided in its own way."""

import importlib
import pathlib

import numpy as np
import pytest

from jdiff import config, experiment, guidance, models, staged
from jdiff.data import ArraySource, Info, sources

FILE = pathlib.Path(__file__).parent.parent / "configs" / "cdm_emoji.py"
EMOJI = Info("emoji", "train", (128, 128, 3), 10, (), 19_874)


def stages(size):
    """(config, experiment) of each."""
    parts = staged.parts(config.load(f"{FILE}:{size}"))
    return [(c, experiment.build(c, experiment.prepared(EMOJI, c.data))) for c in parts]


def test_the_stages_fit_each_other_up_to_whole_images(monkeypatch):
    """As `jdiff train` checks them: networks traced on patches, the cascade on 128 x 128."""
    empty = ArraySource(EMOJI, {"image": np.zeros((0, 128, 128, 3), np.uint8)})
    monkeypatch.setattr(sources, "source", lambda *args, **options: empty)
    made = []
    module = importlib.import_module("jdiff.cascades.cascade")  # a function has its name, too
    cascade = module.cascade
    keep = lambda *stages: (made.extend(stages), cascade(*stages))
    monkeypatch.setattr(module, "cascade", keep)
    staged.check(config.load(f"{FILE}:small"))
    assert [stage.shape for stage in made] == [(16, 16, 3), (64, 64, 3), (128, 128, 3)]


@pytest.mark.parametrize("size", ["small", "full"])
def test_images_are_areas_of_those_of_128_pixels(size):
    base, middle, last = (c for c, _ in stages(size))
    assert {c.data.resample for c in (base, middle, last)} == {"box"}
    assert {c.low_res.down for c in (middle, last)} == {"area"}
    assert (base.data.size, middle.data.size / middle.low_res.factor) == (16, 16)
    assert (last.data.crop, last.data.size, last.low_res.factor) == ("patch", 64, 2)
    assert not any(c.data.flip for c in (base, middle, last))  # flags and letters


def test_every_stage_is_told_the_group_and_guided_in_its_own_way():
    made = [experiment.sampler(c, exp.denoiser(None), exp.null) for c, exp in stages("small")]
    assert all(exp.null == {"label": 10} for _, exp in stages("small"))
    (base, _, _), (middle, _, _), (last, _, _) = made
    assert (base.scale.scale, base.scale.low, base.scale.high) == (2.0, -3.0, 3.0)
    assert isinstance(middle, guidance.thresholding.Threshold) and middle.quantile == 0.995
    inside = middle.denoiser
    assert (inside.scale.scale, inside.scale.low, inside.scale.high) == (1.5, -1.0, 4.0)
    assert isinstance(last, guidance.thresholding.Threshold)
    assert not isinstance(last.denoiser, guidance.base.Guided)  # a patch does not tell its group


def test_the_networks_are_as_large_as_the_header_says():
    counts = [models.count(models.abstract(exp.build)[1]) for _, exp in stages("full")]
    assert [round(n / 1e6) for n in counts] == [41, 57, 23]
