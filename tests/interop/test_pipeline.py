"""A pipeline's folder, written and read without torch: what is found, drawn and written back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import denoisers, guidance, interop, models, sample
from jdiff.errors import UserError

FIELDS = models.dit_imagenet("S/4") | {"depth": 1, "width": 16, "heads": 2, "image_size": 8}
EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
KEY = jax.random.key(0)
COND, NULL = {"label": jnp.asarray([3, 7])}, {"label": 1000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A DiT of random weights, its scheduler, and an encoder that nothing reads."""
    path = tmp_path_factory.mktemp("pipeline")
    _, params = models.init(lambda r: models.UntiedDiT(**FIELDS, rngs=r), KEY)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda w: w + 0.05 * random.standard_normal(w.shape, np.float32), params)
    network = interop.component("DiTTransformer2DModel", params, **FIELDS)
    interop.save(network, path / "transformer")
    for name, config in (("scheduler", EULER), ("safety_checker", {"threshold": 0.5})):
        (path / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (path / name / file).write_text(json.dumps(config))
    index = {
        "_class_name": "DiTPipeline",
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "id2label": {"3": "a fish"},
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def test_a_folder_holds_networks_a_sampler_and_what_is_not_read(folder):
    pipeline = interop.load(folder)
    assert pipeline.name == "transformer"
    assert list(pipeline.components) == ["transformer"]
    assert pipeline.unread == {"safety_checker": folder / "safety_checker"}
    assert pipeline.index["id2label"] == {"3": "a fish"}
    assert pipeline.shape() == (8, 8, 4)  # of 8 channels out, four are the variance


def test_its_samples_are_those_of_jdiffs_sample(folder):
    """The same denoiser, noise, solver and times."""
    pipeline = interop.load(folder)
    drawn = pipeline.sample(KEY, COND, null=NULL, scale=3.0, steps=4)
    assert drawn.shape == (2, 8, 8, 4)
    s, network = pipeline.sampler, pipeline.network
    halved = lambda params, x, t, cond, key: network.apply(params, x, t, cond, key)[..., :4]
    plain = denoisers.network(halved, network.params, s.schedule, s.parameterization)
    # "trailing" starts at sigma eps, as jdiff's own start
    given = sample(
        KEY, guidance.cfg(plain, 3.0, NULL), shape=(8, 8, 4), cond=COND, times=s.times(4),
        solver=s.solver,
    )  # fmt: skip
    np.testing.assert_allclose(drawn, given, rtol=1e-4, atol=1e-5)


def test_a_guidance_of_ones_own_and_other_weights(folder):
    pipeline = interop.load(folder)
    zero = pipeline.replace(jax.tree.map(jnp.zeros_like, pipeline.network.params))
    noise = jnp.ones((2, 8, 8, 4))
    shrunk = lambda d: guidance.static_threshold(d, 0.25)
    drawn = zero.sample(KEY, COND, noise=noise, steps=2, guide=shrunk)
    # A network of zeros predicts no noise: x0 = x / alpha, which is then 0.25.
    np.testing.assert_allclose(drawn, 0.25, rtol=1e-5)
    assert pipeline.network.params is not zero.network.params


def test_what_is_saved_is_what_was_read(folder, tmp_path):
    pipeline = interop.load(folder)
    interop.save(pipeline, tmp_path / "a")
    again = interop.load(tmp_path / "a")
    same = jax.tree.map(np.array_equal, again.network.params, pipeline.network.params)
    assert jax.tree.all(same) and again.index == pipeline.index
    assert interop.schedulers.to_config(again.sampler) == EULER
    assert (tmp_path / "a" / "safety_checker" / "config.json").is_file()


def test_a_component_without_a_size_asks_for_a_shape(folder, monkeypatch):
    pipeline = interop.load(folder)
    config = {k: v for k, v in pipeline.network.config.items() if k != "sample_size"}
    object.__setattr__(pipeline.network, "config", config)
    with pytest.raises(UserError, match="transformer has no sample_size.*shape="):
        pipeline.sample(KEY, COND)
