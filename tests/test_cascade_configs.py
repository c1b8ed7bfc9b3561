"""The published cascades: what their configs build, on shapes alone, beside the papers' figures."""

import functools
import importlib
import pathlib
import types

import jax
import pytest

from jdiff import config, experiment, models, staged
from jdiff.cascades import cascade
from jdiff.data import Field, Info, sources
from jdiff.errors import UserError

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
IMAGENET = Info("imagenet2012", "train", (None, None, 3), 1000, (), 1_281_167)
TEXTS = (Field("text", (128, 4096), "float16"), Field("text_mask", (128,), "bool"))
CAPTIONED = Info("captioned_t5xxl", "train", (None, None, 3), None, (), 0, fields=TEXTS)


@functools.cache
def stages(name, info):
    """(config, experiment) of each stage."""
    c = config.load(str(CONFIGS / name))
    assert staged.config(c.name, *c.stages.values()).keys() == c.keys()
    each = [c.stages[k] for k in sorted(c.stages, key=int)]
    return [(s, experiment.build(s, experiment.prepared(info, s.data))) for s in each]


@functools.cache
def millions(name, info, k):
    return models.count(models.abstract(stages(name, info)[k][1].build)[1]) / 1e6


cdm = functools.partial(stages, "cdm_imagenet.py:32-64-128-256", IMAGENET)
imagen = functools.partial(stages, "imagen_cascade.py", CAPTIONED)


@pytest.mark.parametrize(
    ("name", "info", "last", "changes"),
    [
        ("cdm_imagenet.py", IMAGENET, 256, ()),
        ("cdm_imagenet.py:32-64", IMAGENET, 64, ("aug_level=501", "truncate=True")),
        ("cdm_imagenet.py:32-64-128-256", IMAGENET, 256, ()),
        ("imagen_cascade.py", CAPTIONED, 1024, ()),
    ],
)
def test_the_stages_fit_each_other(name, info, last, changes, monkeypatch):
    """As before training: of one kind, sizes, levels that are set, samplers that serve."""
    source = lambda *args, **fields: types.SimpleNamespace(info=info)
    monkeypatch.setattr(sources, "source", source)
    monkeypatch.setattr(experiment, "check", lambda *args: None)  # traces the networks
    module, made = importlib.import_module("jdiff.cascades.cascade"), []
    monkeypatch.setattr(module, "cascade", lambda *stages: made.append(cascade(*stages)))
    words = [f"--config.stages.1.sampling.{change}" for change in changes]
    staged.check(config.load(str(CONFIGS / name), words))
    assert made[0].stages[-1].shape == (last, last, 3)


# CDM


def test_cdm_has_two_published_routes():
    sizes = lambda name: [c.data.size for c, _ in stages(name, IMAGENET)]
    assert sizes("cdm_imagenet.py") == [32, 64, 256]
    assert sizes("cdm_imagenet.py:32-64-128") == [32, 64, 128]
    with pytest.raises(UserError, match="route '32-128' is not known"):
        config.load(str(CONFIGS / "cdm_imagenet.py:32-128"))


def test_cdm_each_input_is_the_image_of_the_stage_before():
    (base, exp), *others = cdm()
    assert exp.low_res is None and base.data.size == 32
    for (before, _), (c, exp) in zip([(base, None), *others], others):
        assert exp.low_res.small((c.data.size,) * 2 + (3,)) == (before.data.size,) * 2 + (3,)
        assert (exp.low_res.down, c.data.resample, c.data.crop) == ("area", "box", before.data.crop)


def test_cdm_the_first_two_learn_their_variance_in_4000_steps():
    for c, exp in cdm()[:2]:
        assert exp.schedule.T == 4000 and c.loss.name == "hybrid"
        assert exp.parameterization.variance == "learned_range"
        assert c.train.batch_size == 2048
    for c, exp in cdm()[2:]:
        assert exp.parameterization.variance == "fixed" and c.sampling.grid.steps == 100
        assert c.train.batch_size == 1024
    for c, exp in cdm():
        _, _, times = experiment.sampler(c, exp.denoiser(None), exp.null)
        assert len(times) == c.sampling.grid.steps + 1


def test_cdm_augments_with_noise_at_64_and_blur_above():
    noise, *blurs = (exp.low_res.augmentation for _, exp in cdm()[1:])
    assert (noise.name, noise.tells, float(noise.high)) == ("gaussian", True, 4000.0)
    noise.check(cdm()[1][0].sampling.aug_level)
    for blur in blurs:
        assert (blur.name, blur.tells, blur.size) == ("blur", False, 3)
        assert (blur.low, blur.high, blur.share) == (0.4, 0.6, 0.5)


@pytest.mark.parametrize(("k", "published"), [(2, 550), (3, 625)])
def test_cdm_large_networks_have_the_size_of_sr3s(k, published):
    """CDM gives no counts; SR3, whose networks they are, 550 M and 625 M."""
    ours = millions("cdm_imagenet.py:32-64-128-256", IMAGENET, k) - 1000 * 4 * 128 / 1e6
    assert ours == pytest.approx(published, rel=0.06)


# Imagen


def test_imagen_takes_text_at_every_stage_and_a_level_at_two():
    for k, (c, exp) in enumerate(imagen()):
        assert set(exp.null) == {"text"} and c.loss.null_rate == 0.1
        assert ("aug_level" in exp.apply.skeleton().scalars.names) if k else exp.low_res is None
        assert dict(c.sampling.threshold) == {"name": "dynamic", "quantile": 0.995}
        experiment.sampler(c, exp.denoiser(None), exp.null)
    assert [c.sampling.guidance.scale for c, _ in imagen()] == [1.35, 8.0, 8.0]
    assert [c.sampling.aug_level for c, _ in imagen()] == [None, 0.2, 0.2]


def test_imagen_trains_its_last_stage_on_crops_of_what_it_samples():
    (c, exp) = imagen()[2]
    assert (c.data.size, c.data.crop, exp.low_res.factor) == (256, "patch", 4)
    text = {f.name: jax.ShapeDtypeStruct((1, *f.shape), f.dtype) for f in TEXTS}
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, "float32")
    for side in (256, 1024):
        given = {"low_res": shape(1, side // 4, side // 4, 3), "aug_level": shape(1)} | text
        params = models.abstract(exp.build)[1]
        out = jax.eval_shape(exp.apply, params, shape(1, side, side, 3), shape(1), given)
        assert out.shape == (1, side, side, 3)


@pytest.mark.parametrize(("k", "published"), [(0, 2000), (1, 600), (2, 400)])
def test_imagen_has_the_published_size_as_far_as_it_is_described(k, published):
    """The widths of the embeddings and of the pooled text are not; theirs is the difference."""
    assert millions("imagen_cascade.py", CAPTIONED, k) == pytest.approx(published, rel=0.3)
