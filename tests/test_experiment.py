"""From a config to the parts of an experiment."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import denoisers, experiment, guidance, schedules, solvers
from jdiff.data.sources import Info
from jdiff.errors import UserError

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
DIGITS = Info("digits", "train", (8, 8, 1), 10, tuple("0123456789"), 1437)
CIFAR = Info("cifar10", "train", (32, 32, 3), 10, tuple("abcdefghij"), 50_000)
IMAGENET = Info("imagenet2012", "train", (None, None, 3), 1000, (), 1_281_167)


def read(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def tiny(**changes):
    c = experiment.defaults()
    c.model.update({"name": "dit", "width": 16, "depth": 1, "heads": 2})
    c.update(changes)
    return c


@pytest.mark.parametrize(
    ("name", "info", "parameters"),
    [
        ("digits", DIGITS, None),
        ("digits_dit_flow", DIGITS, None),
        ("cifar10_ddpm", CIFAR, 35_746_307),
        ("cifar10_edm", CIFAR, 55_734_147),  # 55,732,739 + the label embedding's 128 * 10 + 128
        ("imagenet64_edm", IMAGENET, 295_899_267),
    ],
)
def test_every_config_builds_and_has_the_published_size(name, info, parameters):
    from jdiff import models

    config = read(name)
    exp = experiment.build(config, experiment.prepared(info, config.data))
    experiment.sampler(config, exp.denoiser(None), exp.null)
    if info is DIGITS:  # tracing the large ones takes seconds
        experiment.check(exp, info)
    if parameters:
        assert models.count(models.abstract(exp.build)[1]) == parameters


def test_the_default_schedule_and_row_are_edm():
    exp = experiment.build(tiny(), DIGITS)
    assert isinstance(exp.schedule, schedules.EDM)
    assert exp.parameterization.target == "edm"
    assert exp.null == {"label": 10}


def test_the_loss_is_the_denoising_loss_of_the_scaled_images():
    # A network that always answers 0 has the loss E F^2 = 1 for unit-variance targets: EDM's row.
    c = tiny()
    c.parameterization.sigma_data = 1.0
    exp = experiment.build(c, DIGITS)
    params = jax.tree.map(jnp.zeros_like, exp.init(jax.random.key(0)))
    image = np.random.default_rng(0).choice([0, 255], (4096, 8, 8, 1)).astype(np.uint8)
    batch = {"image": jnp.asarray(image), "label": jnp.zeros(4096, jnp.int32)}
    loss = jax.jit(exp.loss)(params, jax.random.key(1), batch)
    assert loss.shape == (4096,)
    assert float(loss.mean()) == pytest.approx(1.0, abs=0.01)  # pixels are -1 or 1


def test_scaling_maps_0_to_minus_one_and_255_to_one():
    np.testing.assert_allclose(
        experiment.to_float(jnp.array([0, 255, 51], jnp.uint8)), [-1.0, 1.0, -0.6], rtol=1e-6
    )


def test_the_sampler_is_the_configs():
    c = tiny()
    c.sampling.solver.update({"name": "ddim", "eta": 0.5})
    c.sampling.grid.update({"name": "karras", "steps": 5, "rho": 3.0})
    c.sampling.guidance.scale = 1.5
    c.sampling.threshold = "dynamic"
    denoise, solver, times = experiment.sampler(
        c, denoisers.exact(jnp.zeros((2, 8, 8, 1)), schedules.edm()), {"label": 10}
    )
    assert isinstance(solver, solvers.exponential.DDIM)
    assert solver.eta == 0.5
    assert isinstance(denoise, guidance.thresholding.Threshold)
    assert denoise.denoiser.scale == 1.5
    middle = ((80 ** (1 / 3) + 0.002 ** (1 / 3)) / 2) ** 3
    np.testing.assert_allclose(times[jnp.array([0, 2, 5])], [80.0, middle, 0.0], rtol=1e-5)


def broken(path, value):
    c = tiny()
    *sections, field = path.split(".")
    node = c
    for section in sections:
        node = node[section]
    node[field] = value
    return c


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (broken("schedule.name", "edn"), "config.schedule 'edn' is not known. Did you mean 'edm'"),
        (broken("schedule.sigma_mx", 1.0), "argument 'sigma_mx' is not .* mean 'sigma_max'"),
        (broken("model.name", "unett"), "config.model.name 'unett' .*'unet'"),
        (broken("model.widht", 3), "config.model .DiT. field 'widht' .*'width'"),
        (broken("model.patch", 3), "config.model does not fit the data digits"),
        (broken("model.in_channels", 3), "config.model.in_channels=3 does not fit digits"),
        (broken("train.batch_size", 30), "train.batch_size=30 is not a multiple of 4"),
        (broken("sampling.solver", {"name": "huen"}), "config.sampling.solver 'huen' .*'heun'"),
        (broken("sampling.grid", {"name": "karras", "steps": 0}), "n=0 steps given"),
        (broken("sampling.grid", {"name": "karras", "steps": 5, "row": 7}), "'row' .*'rho'"),
        (broken("sampling.threshold", "dynamik"), "'dynamik' is not known. Did you mean 'dynamic'"),
        (broken("loss.weighting", {"name": "snr"}), "config.loss.weighting 'snr' is not known"),
        (broken("parameterization.target", "noise"), "parameterization target 'noise'"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(config, words):
    with pytest.raises(UserError, match=words):
        exp = experiment.build(config, DIGITS)
        experiment.check(exp, DIGITS)
        experiment.sampler(config, exp.denoiser(None), exp.null)


def test_images_of_many_sizes_need_a_size():
    c = tiny()
    with pytest.raises(UserError, match="config.data.size: the images of imagenet2012 differ"):
        experiment.prepared(IMAGENET, c.data)
    c.data.size = 64
    assert experiment.prepared(IMAGENET, c.data).shape == (64, 64, 3)


def test_a_model_without_labels_cannot_be_guided():
    c = tiny()
    c.model.num_classes = 0
    c.sampling.guidance.scale = 2.0
    exp = experiment.build(c, DIGITS)
    with pytest.raises(UserError, match="trained without labels"):
        experiment.sampler(c, exp.denoiser(None), exp.null)
