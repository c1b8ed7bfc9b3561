"""From a config to the parts of an experiment."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import denoisers, experiment, guidance, losses, schedules, solvers
from jdiff.data.sources import Info
from jdiff.errors import UserError
from jdiff.training import step

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
        ("digits_meanflow", DIGITS, None),
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


def test_a_threshold_takes_its_numbers_from_a_section():
    c = tiny()
    c.sampling.threshold = {"name": "dynamic", "quantile": 0.9, "limit": 2.0}
    exact = denoisers.exact(jnp.zeros((2, 8, 8, 1)), schedules.edm())
    denoise, _, _ = experiment.sampler(c, exact, {"label": 10})
    assert (denoise.quantile, denoise.limit) == (0.9, 2.0)
    c.sampling.threshold.quantil = 0.8
    with pytest.raises(UserError, match="threshold dynamic: argument 'quantil' .*'quantile'"):
        experiment.sampler(c, exact, {"label": 10})


@pytest.mark.parametrize("name", ["static", "dynamic"])
def test_what_one_image_has_beyond_another_is_kept_whole(name):
    """White beyond black is 2, which clipping to 1, as of images, would make gray."""
    c = tiny()
    c.sampling.threshold = name
    exact = denoisers.exact(jnp.full((1, 8, 8, 1), 2.0), schedules.edm())
    for residual, found in ((True, 2.0), (False, 1.0)):
        c.low_res.residual = residual
        denoise, _, _ = experiment.sampler(c, exact, {"label": 10})
        x0 = denoise(jnp.ones((1, 8, 8, 1)), jnp.array([3.0])).x0
        np.testing.assert_allclose(x0, found, rtol=1e-6)


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
        (broken("mesh.fsdp", 3), "fsdp=3 given for 4 devices.*divisors .1, 2, 4."),
        (broken("mesh.rules", {"embed": "fspd"}), "mesh.rules.embed: axis 'fspd' .*'fsdp'"),
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
        exp = experiment.build(config, DIGITS, layout=experiment.layout(config))
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


def flow_map(**loss):
    """A config whose network is told the target time."""
    c = tiny()
    c.model.scalars = ("t-s",)
    c.schedule = {"name": "rectified_flow"}
    c.parameterization.update({"target": "velocity", "time": "t"})
    c.loss.name = "meanflow"
    c.loss.distribution = {"name": "uniform"}
    c.loss.update(loss)
    c.sampling.solver = {"name": "flow_map"}
    c.sampling.grid = {"name": "uniform", "steps": 1}
    return c


def edited(c, **fields):
    """A config with some of its fields (model__scalars is model.scalars) changed."""
    for name, value in fields.items():
        section, _, field = name.rpartition("__")
        (c[section] if section else c)[field] = value
    return c


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (broken("loss.name", "meanflo"), "config.loss.name 'meanflo' .*'meanflow'"),
        (broken("loss.arguments", {"shar": 1.0}), r"arguments \(denoising\) entry 'shar'"),
        (broken("loss.name", "reflow"), "config.loss.teacher: reflow learns from a run"),
        (broken("loss.teacher", "runs/a"), "config.loss.teacher='runs/a': denoising has no teach"),
        (broken("loss.target", "emma"), "config.loss.target 'emma' is not known"),
        (broken("loss.coupling", {"name": "otto"}), "config.loss.coupling 'otto' .*'ot'"),
        (broken("loss.name", "meanflow"), r"config.model.scalars=\[\]: meanflow trains a flow map"),
        (edited(tiny(), loss__name="progressive", loss__teacher="a"), "progressive needs steps"),
        (flow_map(weighting={"name": "eps"}), "config.loss.weighting: meanflow has its own"),
        (edited(flow_map(), parameterization__time="t1000"), "time='t1000': a flow map is told t"),
        (edited(flow_map(), schedule__name="cosine"), "name='cosine': flow_map: Cosine given"),
        (edited(flow_map(), sampling__solver={"name": "heun"}), "solver='heun': a flow map"),
        (broken("sampling.solver", {"name": "flow_map"}), "solver='flow_map': .* no other network"),
        (edited(flow_map(), schedule={"name": "cosine"}), "flow_map: Cosine given"),
    ],
)  # fmt: skip
def test_a_loss_that_does_not_fit_is_refused_by_its_field(config, words):
    with pytest.raises(UserError, match=words):
        exp = experiment.build(config, DIGITS)
        experiment.check(exp, DIGITS)
        experiment.sampler(config, exp.denoiser(None), exp.null)


def uint8(n):
    image = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 1), np.uint8)
    return {"image": jnp.asarray(image), "label": jnp.arange(n) % 10}


def test_a_loss_gets_what_it_asks_for_by_name(monkeypatch):
    """The step, the averages' targets, the teacher and its sampler; couplings before all."""
    seen = {}

    def spy(key, denoiser, x0, cond, *, step, total, target, teacher, sampler, eps, null, huber=3):
        seen.update(locals())
        return jnp.zeros(len(x0))

    monkeypatch.setitem(losses.BY_NAME, "spy", spy)
    c = tiny()
    c.loss.update({"name": "spy", "target": "ema", "teacher": "a run", "arguments": {"huber": 7},
                   "coupling": {"name": "ot"}, "null_rate": 0.0})  # fmt: skip
    c.train.steps = 50
    teacher = lambda weights: (("denoiser", weights), "solver", "times")
    exp = experiment.build(c, DIGITS, teacher)
    state = step.State(
        params=None, opt=None, averages={"ema": 5.0}, step=jnp.asarray(4), key=None, bad_step=None,
        frozen="weights",
    )  # fmt: skip
    assert exp.loss(1.0, jax.random.key(0), uint8(16), state).shape == (16,)
    assert (seen["denoiser"].params, seen["target"].params) == (1.0, 5.0)
    assert (int(seen["step"]), seen["total"], seen["huber"]) == (4, 50, 7)
    assert seen["teacher"] == ("denoiser", "weights")
    assert seen["sampler"] == (("denoiser", "weights"), "solver", "times")
    assert seen["null"] == {"label": 10}
    cost = ((seen["x0"][:, None] - seen["eps"][None]) ** 2).sum((2, 3, 4))
    others = [cost[np.arange(16), np.roll(np.arange(16), k)].sum() for k in range(1, 16)]
    assert jnp.trace(cost) < min(others)  # eps was matched to x0
    np.testing.assert_array_equal(seen["cond"]["label"], np.arange(16) % 10)


def test_a_loss_without_a_name_is_the_denoising_loss_with_the_same_draws():
    """Runs of earlier versions go on bit for bit."""
    from jdiff import distributions
    from jdiff.conditioning import drop

    exp, key, batch = experiment.build(tiny(), DIGITS), jax.random.key(3), uint8(8)
    params = exp.init(jax.random.key(0))
    key_loss, key_drop, key_dropout = jax.random.split(key, 3)
    cond = drop(key_drop, {"label": batch["label"]}, {"label": 10}, 0.1)
    expected = losses.denoising(
        key_loss, exp.denoiser(params), experiment.to_float(batch["image"]), cond,
        distribution=distributions.lognormal(), dropout_key=key_dropout,
    )  # fmt: skip
    np.testing.assert_array_equal(exp.loss(params, key, batch), expected)


def test_meanflow_trains_a_scanned_and_rematerialised_dit_through_its_jvp():
    c = flow_map(arguments={"guidance": 2.0, "share": 1.0})
    c.model.update({"scan": True, "remat": True})
    exp = experiment.build(c, DIGITS)
    experiment.check(exp, DIGITS)
    state = step.start(exp.init(jax.random.key(0)), jax.random.key(1), exp.optimizer, exp.averages)
    run = jax.jit(step.make_step(exp.loss, exp.optimizer, exp.averages))
    for _ in range(2):  # at the start the output is zero, whatever the blocks
        state, values = run(state, uint8(8))
    assert np.isfinite(values["loss"])
    assert values["grad_norm"] > 0


def test_a_network_of_unit_weights_keeps_them_so():
    """EDM2's: after a step every column has length 1, whatever the optimiser did."""
    from jdiff import models

    c = experiment.defaults()
    c.model.update({"name": "edm2", "channels": 8, "multipliers": (1,), "blocks": 1})
    c.optimizer.update({"learning_rate": 0.1, "warmup": 0})
    exp = experiment.build(c, DIGITS)
    _, shapes = models.abstract(exp.build)
    random = np.random.default_rng(0)
    params, grads = (
        jax.tree.map(lambda s: jnp.asarray(random.normal(size=s.shape), jnp.float32), shapes)
        for _ in range(2)
    )
    updates, _ = exp.optimizer.update(grads, exp.optimizer.init(params), params)
    kernel = (params["stem"]["kernel"] + updates["stem"]["kernel"]).reshape(-1, 8)
    np.testing.assert_allclose(jnp.square(kernel).mean(0), 1.0, atol=1e-3)


def learning(name, **arguments):
    """A config that trains with this loss, on a schedule and network that it can serve."""
    if name in losses.FLOW_MAPS:
        c = flow_map(name=name)
    else:
        c = edited(tiny(), loss__name=name)
    if name == "conditional_flow":
        c = edited(c, schedule={"name": "rectified_flow"}, loss__distribution={"name": "uniform"})
        c.parameterization.target = "velocity"
    if name == "hybrid":
        c = edited(c, schedule={"name": "ddpm_linear"}, loss__distribution={"name": "uniform"})
        c.parameterization.update({"target": "eps", "variance": "learned_range"})
        c.model.out_channels = 2
    if name in ("consistency_distillation", "progressive", "reflow"):
        c.loss.teacher = "a run"
    c.loss.arguments = arguments
    return c


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("denoising", {}), ("flow_matching", {}), ("consistency", {"most": 20}),
        ("consistency_distillation", {"levels": 4}), ("progressive", {"steps": 2}), ("reflow", {}),
        ("shortcut", {"every": 2}), ("meanflow", {"guidance": 2.0}), ("conditional_flow", {}),
        ("hybrid", {}),
    ],
)  # fmt: skip
def test_every_loss_trains_a_network_by_its_name(name, arguments):
    """Traced, not run: what it computes is proven in tests/losses."""
    assert name in losses.BY_NAME
    c = learning(name, **arguments)
    plain = experiment.build(tiny(), DIGITS)
    teacher = lambda weights: experiment.sampler(tiny(), plain.denoiser(weights), plain.null)
    exp = experiment.build(c, DIGITS, teacher if c.loss.teacher else None)
    experiment.check(exp, DIGITS)

    def trained(batch):
        frozen = plain.init(jax.random.key(0)) if c.loss.teacher else None
        params = exp.init(jax.random.key(0))
        state = step.start(params, jax.random.key(1), exp.optimizer, exp.averages, frozen)
        assert exp.loss(params, state.key, batch, state).shape == (8,)
        return step.make_step(exp.loss, exp.optimizer, exp.averages, 2)(state, batch)

    state, values = jax.eval_shape(trained, uint8(8))
    assert values["loss"].shape == ()
