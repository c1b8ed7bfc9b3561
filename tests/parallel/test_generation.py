"""Sampling and evaluation over a mesh: the weights stay split, and the images are the same."""

import dataclasses
import gc
import re

import jax
import numpy as np
import pytest

from jdiff import experiment, generate, runs
from jdiff.commands.options import mesh as parsed
from jdiff.data import sources
from jdiff.errors import UserError
from jdiff.evaluation.features import over_devices
from jdiff.sampling import sample
from jdiff.training import checkpoints
from jdiff.training import step as steps

NUM, BATCH = 11, 6  # neither is a multiple of the devices
MESHES = [{"data": 4}, {"data": 2, "fsdp": 2}, {"fsdp": 4}]


def settings():
    c = experiment.defaults()
    c.model.update({"name": "dit", "patch": 2, "width": 64, "depth": 2, "heads": 4, "scan": True})
    c.mesh.update({"data": 2, "fsdp": 2})
    c.sampling.grid.steps = 3
    c.sampling.guidance.scale = 1.5
    c.compile_cache = False
    return c


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """What training leaves: a checkpoint, here of random weights, saved from their parts."""
    folder, config = tmp_path_factory.mktemp("run") / "run", settings()
    info = sources.source("digits", "train").info
    exp = experiment.build(config, info, None, experiment.layout(config))
    rng = np.random.default_rng(0)
    noisy = lambda a: a + 0.1 * rng.standard_normal(a.shape).astype(np.float32)
    params = jax.tree.map(noisy, exp.init(jax.random.key(0)))
    state = steps.start(params, jax.random.key(1), exp.optimizer, exp.averages)
    runs.claim(folder, config)
    runs.describe(folder, data=dataclasses.asdict(info))
    with checkpoints.opened(folder) as saved:
        saved.save(jax.device_put(state, exp.placed(state)), {}, 1)
    return folder


def drawn(run, **more):
    labels = np.arange(NUM) % 10
    return np.concatenate(list(generate.images(run, num=NUM, labels=labels, batch=BATCH, **more)))


def on_one_device(run):
    """The same run without a mesh."""
    params = jax.device_put(run.denoiser.params, jax.devices()[0])
    apply = run.denoiser.apply.with_layout(None)
    denoiser = dataclasses.replace(run.denoiser, params=params, apply=apply)
    return run._replace(denoiser=denoiser, layout=None)


def test_the_images_are_the_same_whatever_the_mesh(workdir):
    """Uint8 to one level, where rounding tips a pixel; of so few none is."""
    alone = on_one_device(runs.load_run(workdir))
    wanted = drawn(alone)
    assert wanted.shape == (NUM, 8, 8, 1) and wanted.std() > 20
    for mesh in MESHES:
        found = drawn(runs.load_run(workdir, mesh=mesh))
        difference = np.abs(found.astype(int) - wanted)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01, mesh


def whole_and_large():
    gc.collect()
    live = [a for a in jax.live_arrays() if a.size >= 2 * 64 * 64]
    return sum(a.sharding.shard_shape(a.shape) == a.shape for a in live)


def test_weights_are_read_to_where_they_belong(workdir):
    """What is large is on each device in part, from the first moment and in nothing that lives."""
    before = whole_and_large()
    run = runs.load_run(workdir, mesh={"fsdp": 4})
    large = [a for a in jax.tree.leaves(run.denoiser.params) if a.size >= 2 * 64 * 64]
    assert len(large) >= 5
    assert all(4 * np.prod(a.sharding.shard_shape(a.shape)) == a.size for a in large)
    list(generate.images(run, num=4, labels=np.arange(4)))
    assert whole_and_large() <= before


def test_the_mesh_of_the_config_or_what_fits(workdir, monkeypatch):
    shape = lambda **more: dict(runs.load_run(workdir, **more).layout.mesh.shape)
    assert shape() == {"data": 2, "fsdp": 2, "tensor": 1, "sequence": 1}
    assert shape(mesh={"tensor": 2})["tensor"] == 2
    config = runs.read_config(workdir)
    with config.unlocked():
        config.mesh.update({"data": 1, "fsdp": 64})
    monkeypatch.setattr(runs, "read_config", lambda _: config)
    assert shape() == {"data": 1, "fsdp": 4, "tensor": 1, "sequence": 1}


@pytest.mark.parametrize(
    ("mesh", "said"), [({"fsdp": 3}, "fsdp=3 given for 4 devices"), ({"fdsp": 2}, "fsdp")]
)
def test_a_mesh_that_does_not_fit(workdir, mesh, said):
    with pytest.raises(UserError, match=said):
        runs.load_run(workdir, mesh=mesh)


def test_the_option():
    assert parsed("fsdp=4, data=-1") == {"fsdp": 4, "data": -1}
    for text in ("fsdp", "fsdp=many"):
        with pytest.raises(Exception, match=re.escape(repr(text))):
            parsed(text)


def test_a_batch_that_devices_do_not_divide_is_padded():
    """The same samples, over any number of devices."""
    from jdiff import grids, schedules, solvers
    from jdiff.predictions import Prediction

    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("d"))
    edm = schedules.edm()
    denoise = lambda x, t, cond: Prediction(0.5 * x, 0.1 * x)
    draw = lambda **more: np.asarray(
        sample(jax.random.key(0), denoise, times=grids.karras(edm, 3), shape=(2, 2, 1), num=5,
               schedule=edm, solver=solvers.euler(), **more)
    )  # fmt: skip
    np.testing.assert_allclose(draw(), draw(sharding=split), rtol=1e-6)
    np.testing.assert_allclose(draw(), draw(sharding=split, batch=3), rtol=1e-6)


def test_features_are_computed_on_all_devices():
    seen = []

    def compute(params, images):
        seen.append(images.shape)
        return images.reshape(len(images), -1)[:, :3] * params["scale"]

    extract = over_devices("mine", 3, compute, {"scale": np.float32(2)}, batch=6)
    images = np.random.default_rng(0).integers(0, 256, (13, 2, 2, 1), np.uint8)
    np.testing.assert_allclose(extract(images), 2.0 * images.reshape(13, -1)[:, :3])
    assert extract.batch == 8 and seen == [(8, 2, 2, 1)]  # rounded up; one compilation
    out = extract.function(images[:8])
    assert {s.data.shape for s in out.addressable_shards} == {(2, 3)}
