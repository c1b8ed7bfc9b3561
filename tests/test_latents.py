"""Training, sampling and evaluation on encoded sets: the same as on latents encoded on the fly."""

import dataclasses
import json
import shutil

import encoded_sets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from jdiff import assess, encoding, experiment, generate, kinds, latents, real, runs, staged, train
from jdiff.data import encoded, pipeline, sources
from jdiff.errors import UserError
from jdiff.evaluation.features import to_uint8
from jdiff.losses.denoising import denoising
from jdiff.sampling import sample
from jdiff.training import step as steps

BATCH, DRAWN = 7, 4  # drawn at a time everywhere: one program


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The set `pics`, and its latents with texts."""
    root = encoded_sets.prepare(tmp_path_factory.mktemp("tfds"))
    coder = encoded_sets.save_autoencoder(root.parent / f"{root.name}-vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "open_reader", lambda *_: encoded_sets.Reader())
        encoding.encode(
            encoding.Wanted(
                "pics", "pics_latents", autoencoder=str(coder), text="words", mirrored=True,
                batch=BATCH, data_dir=root,
            )
        )  # fmt: skip
    return root


def config(root, **data):
    c = experiment.defaults()
    c.model.update({"name": "mmdit", "width": 8, "depth": 1, "heads": 2})
    c.data.update({"name": "pics_latents", "data_dir": str(root), "threads": 0} | data)
    c.data.conditions = ("text", "text_mask", "pooled")
    c.ema = {"ema": {"kind": "constant", "decay": 0.5}}
    c.sampling.grid.steps = 2
    c.sampling.batch = DRAWN
    c.sampling.guidance.scale = 1.5
    c.evaluation.num = 12
    c.train.update({"batch_size": 8, "steps": 2, "sample_every": 2, "checkpoint_every": 2})
    return c


def built(c):
    source = sources.source(
        c.data.name, "train", c.data.data_dir, fields=c.data.conditions, mirrored=c.data.flip,
        progress=lambda _: None,
    )  # fmt: skip
    info = experiment.prepared(source.info, c.data)
    return experiment.build(c, info), source


def coder_of(source):
    return latents.open_autoencoder(source.info.encoded.autoencoder)


def linear(params, x, t, cond, key=None):
    """A network that is told the label."""
    label = params["label"][cond["label"]][:, None, None, :]
    return x @ params["x"] + label * t[:, None, None, None]


def test_training_on_cached_latents_is_training_on_latents_encoded_on_the_fly(root):
    c = config(root)
    c.data.conditions = ()
    c.model = {"name": "dit", "width": 8, "depth": 1, "heads": 1}
    exp, source = built(c)
    exp = exp._replace(apply=linear)
    images = sources.source("pics", "train", root, progress=lambda _: None)
    coder = coder_of(source)

    def on_the_fly(params, key, batch, state):
        """Images through the encoder inside the step, by formulas of its own."""
        batch = dict(batch)
        mean, std = coder.moments(batch.pop("image").astype(jnp.float32) / 127.5 - 1)
        x0 = mean + std * jax.random.normal(jax.random.fold_in(key, 3), mean.shape)
        key_loss, key_drop, _ = jax.random.split(key, 3)
        gone = jax.random.bernoulli(key_drop, exp.config.loss.null_rate, (len(x0),))
        cond = {"label": jnp.where(gone, 3, batch["label"])}
        distribution = exp.objective.keywords["distribution"]
        return denoising(key_loss, exp.denoiser(params), x0, cond, distribution=distribution)

    states = {}
    params = {"x": jnp.eye(3), "label": jnp.ones((4, 3))}
    for name, loss, feed in (
        ("cached", exp.loss, source),
        ("on the fly", on_the_fly, images),
    ):
        step = jax.jit(steps.make_step(loss, exp.optimizer, exp.averages))
        state = steps.start(params, jax.random.key(1), exp.optimizer, exp.averages)
        kept = {"seed": 3, "threads": 0, "shard_index": 0, "shard_count": 1}
        batches = pipeline.batches(feed, BATCH, **kept)
        for _ in range(4):
            batch = next(batches)
            del batch["id"]
            state, values = step(state, batch)
        states[name] = state.params, values["loss"]
    np.testing.assert_allclose(states["cached"][1], states["on the fly"][1], rtol=1e-5)
    for ours, theirs in zip(*(jax.tree.leaves(states[name][0]) for name in states)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6)


def test_every_epoch_draws_other_latents_around_the_same_mean(root):
    exp, source = built(config(root))
    found = source.gather(range(5))
    draw = jax.jit(jax.vmap(latents.draw, (0, None)))
    batch = {name: jnp.asarray(found[name]) for name in (encoded.MEAN, encoded.STD)}
    drawn = draw(jax.random.split(jax.random.key(0), 4096), batch)
    assert (drawn[0] != drawn[1]).all()
    within = 6 / 64  # six standard errors
    z = (drawn.mean(0) - found[encoded.MEAN]) / found[encoded.STD]
    assert np.abs(z).max() < within
    np.testing.assert_allclose(drawn.std(0) / found[encoded.STD], 1, atol=within)
    # An autoencoder without deviations: the latents themselves.
    np.testing.assert_array_equal(
        latents.draw(jax.random.key(0), {encoded.MEAN: batch[encoded.MEAN]}), found[encoded.MEAN]
    )


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """A run of two steps on latents, guided away from the empty text."""
    c = config(root, null="empty", flip=True)
    workdir = tmp_path_factory.mktemp("runs") / "latent"
    train.train(c, workdir, Console(quiet=True))
    return workdir


def test_pictures_of_training_show_images(trained):
    with Image.open(trained / "samples" / "step_00000002.png") as picture:
        size = picture.size
    # Eight of each of the six held-out texts, of 8 pixels, enlarged six times.
    assert size == (8 * (8 * 6 + 2) + 2, 6 * (8 * 6 + 2) + 2)


def test_samples_are_decoded(trained):
    run = runs.load_run(trained)
    assert run.info.shape == (4, 4, 3) and run.autoencoder.factor == 2
    cond = {f.name: np.asarray(jnp.ones((5, *f.shape), f.dtype)) for f in run.info.fields}
    cond = {k: v if v.dtype == bool else v.astype(np.float32) for k, v in cond.items()}
    images = np.concatenate([*generate.images(run, num=5, cond=cond)])
    assert images.shape == (5, 8, 8, 3) and images.dtype == np.uint8
    denoise, solver, times = runs.sampler(run)
    z = sample(
        jax.random.key(0), denoise, shape=run.info.shape, num=5, cond=cond, solver=solver,
        times=times, batch=DRAWN, sharding=run.layout and run.layout.batch,
    )  # fmt: skip
    expected = np.asarray(to_uint8(run.autoencoder.decode(z)))
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert expected.std() > 10  # and no gray


def test_real_images_of_an_evaluation_are_those_that_were_encoded(trained):
    run = runs.load_run(trained)
    for side, split in (("held-out", "test"), ("training", "train")):
        source = real.source(run, side)
        rows = encoded_sets.rows(split)
        found = np.concatenate([x for x, _ in real.images(run, source, lambda *_: None)])
        np.testing.assert_array_equal(found, np.stack([row["image"] for row in rows]))
        told = real.all_conditions(run, source, len(rows))
        expected = encoded_sets.Reader().encode([row["caption"] for row in rows])
        np.testing.assert_allclose(told["pooled"], expected["pooled"], atol=1e-3)
        np.testing.assert_array_equal(told["text_mask"], expected["mask"])
    result = assess.assess(run, features="pixels", metrics=["frechet", "sliced"])
    assert all(np.isfinite(row["value"]) for row in result["metrics"])
    assert json.loads((trained / "evaluation.json").read_text())["settings"]["num"] == 12


def test_a_run_needs_the_autoencoder_that_encoded_its_data(trained, root, tmp_path):
    vae = root.parent / f"{root.name}-vae"
    moved, other = tmp_path / "moved", encoded_sets.save_autoencoder(tmp_path / "other", seed=1)
    shutil.copytree(vae, moved)
    with pytest.raises(UserError, match="is not the autoencoder that encoded pics_latents"):
        runs.load_run(trained, autoencoder=str(other))
    hidden = vae.with_name("hidden")
    vae.rename(hidden)
    try:
        with pytest.raises(UserError, match="holds latents, .*--autoencoder.* where it lies"):
            runs.load_run(trained)
        assert runs.load_run(trained, autoencoder=str(moved)).autoencoder.factor == 2
        c = config(root, autoencoder=str(moved), null="empty", flip=True)
        c.train.steps = 2
        assert train.train(c, trained, Console(quiet=True)).step == 2  # may be named anew
    finally:
        hidden.rename(vae)


def test_what_is_for_pixels_is_refused(root):
    for path, value, words in (
        ("sampling.threshold", "static", "threshold='static': pics_latents holds latents"),
        ("low_res.factor", 2.0, "low_res.factor=2.0: pics_latents holds latents"),
        ("data.size", 4, "size=4: the latents of pics_latents"),
    ):
        c = config(root)
        section, field = path.split(".")
        c[section][field] = value
        with pytest.raises(UserError, match=words):
            built(c)
    c = config(root, name="pics", autoencoder="somewhere")
    c.data.conditions = ()
    with pytest.raises(UserError, match="config.data.autoencoder: pics holds images"):
        built(c)


@pytest.mark.parametrize("kind", ["autoencoder", "contrastive"])
def test_what_is_trained_on_pixels_alone_refuses_latents(root, kind):
    info = built(config(root))[1].info
    with pytest.raises(UserError, match="holds latents; name the set of their images, 'pics'"):
        kinds.named(kind).build(kinds.named(kind).defaults(), info)


def test_the_set_of_a_cascade_holds_images(root):
    exp, source = built(config(root))
    with pytest.raises(UserError, match="the stages of a cascade make images"):
        staged._size(exp.config, None, source.info, None)


# What no condition is.


def seen(exp, params, batch, **changes):
    """What the network is told in training, of all conditions dropped (or as `changes` say)."""
    told = {}

    def objective(key, denoiser, x0, cond, *, null):
        told.update(cond=cond, null=null)
        return jnp.zeros(len(x0))

    exp = exp._replace(objective=objective, **{"null_rate": 1.0} | changes)
    exp.loss(params, jax.random.key(0), batch)
    return told["cond"], told["null"]


def batch_of(source, count=6):
    return {k: jnp.asarray(v) for k, v in source.gather(range(count)).items()}


def test_the_empty_text_replaces_states_mask_and_pooled_vector(root, trained):
    exp, source = built(config(root, null="empty"))
    batch = batch_of(source)
    cond, null = seen(exp, {}, batch)
    empty = encoded_sets.Reader().encode([""])
    for ours, theirs in (("text", "text"), ("text_mask", "mask"), ("pooled", "pooled")):
        for row in cond[ours]:
            np.testing.assert_allclose(row, empty[theirs][0], atol=1e-3)
        assert np.abs(np.asarray(batch[ours], float) - cond[ours]).max() > 0.5
    # Guidance knows the same, from the run alone.
    run = runs.load_run(trained)
    assert run.null.keys() == {"text", "text_mask", "pooled"}
    for name in run.null:
        np.testing.assert_array_equal(run.null[name], null[name])


def test_a_run_is_guided_where_its_data_are_not(trained, root, tmp_path, monkeypatch):
    monkeypatch.setattr("jdiff.data.conditions.empty", lambda data: {})
    assert runs.load_run(trained).null["text"].shape == (4, 5)
    exp, _ = built(config(root, null="empty"))
    with pytest.raises(UserError, match="'empty': pics_latents does not hold 'text' of the empty"):
        exp.nulls({})


def test_a_learned_null_is_a_parameter_that_both_training_and_guidance_use(root):
    exp, source = built(config(root, null="learned"))
    plain, _ = built(config(root))
    params = exp.init(jax.random.key(0))
    learned = params["null_condition"]
    assert jax.tree.map(jnp.shape, learned) == {"text": (4, 5), "pooled": (5,)}
    rest = {k: v for k, v in params.items() if k != "null_condition"}
    assert jax.tree.structure(rest) == jax.tree.structure(plain.shapes())
    batch = batch_of(source)
    cond, null = seen(exp, params, batch)
    for row in range(6):
        np.testing.assert_array_equal(cond["text"][row], learned["text"])
        np.testing.assert_array_equal(cond["pooled"][row], learned["pooled"])
    assert cond["text_mask"].all() and not batch["text_mask"].all()
    np.testing.assert_array_equal(null["text"], learned["text"])

    def gradient(rate):
        """Of a loss that is the sum of what the network is told."""
        told = lambda key, denoiser, x0, cond: sum(cond[k].sum() for k in ("text", "pooled"))
        one = exp._replace(null_rate=rate, objective=told)
        loss = lambda null: one.loss({"null_condition": null}, jax.random.key(0), batch)
        return jax.tree.leaves(jax.grad(loss)(learned))

    assert all((g == 6).all() for g in gradient(1.0))  # once an example
    assert all((g == 0).all() for g in gradient(1e-12))


def test_conditions_are_dropped_one_by_one(root):
    def kept(rates):
        c = config(root)
        c.model = {"name": "dit", "width": 8, "depth": 1, "heads": 1}
        c.loss.null_rate = rates
        c.data.null = "learned"
        exp, source = built(c)
        batch = batch_of(source, 21)
        params = {"null_condition": {"text": jnp.full((4, 5), 9.0), "pooled": jnp.full(5, 9.0)}}
        cond, _ = seen(exp, params, batch, null_rate=exp.null_rate)
        same = lambda k: (jnp.asarray(cond[k], float) == batch[k]).reshape(21, -1).all(1)
        return {name: np.asarray(same(name)) for name in ("label", "text", "pooled")} | {
            "shown": np.asarray(cond["text_mask"].all(1))
        }

    found = kept({"text": 1.0, "label": 0.0})  # pooled goes with the text
    assert found["label"].all() and not found["text"].any() and not found["pooled"].any()
    assert found["shown"].all()  # and so does the mask
    found = kept({"text": 0.0, "label": 1.0})
    assert not found["label"].any() and found["text"].all() and found["pooled"].all()
    found = kept({"text": 0.5, "pooled": 0.5, "label": 0.5})
    pairs = [(a, b) for a in found for b in found if a < b and "shown" not in (a, b)]
    assert all((found[a] != found[b]).any() for a, b in pairs)  # each by its own coin
    found = kept({"text": 0.5, "label": 0.5})
    np.testing.assert_array_equal(found["text"], found["pooled"])
    assert found["text"].any() and not found["text"].all()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("data.null", "emtpy", "'emtpy' is not known. Did you mean 'empty'"),
        ("loss.null_rate", {"txet": 0.1}, "condition 'txet' is not known. Did you mean 'text'"),
        ("loss.null_rate", {"pooled": 0.1}, "has no rate for 'text'; give 0"),
        ("loss.null_rate", {"text": 1.5}, "null_rate.text=1.5 given; it is a share"),
        ("loss.null_rate", -0.1, "null_rate=-0.1 given; it is a share"),
    ],
)
def test_bad_nulls_are_one_line(root, field, value, words):
    c = config(root)
    section, name = field.split(".")
    c[section][name] = value
    with pytest.raises(UserError, match=words):
        built(c)


def test_two_latents_of_one_image_differ_in_training_too(root):
    """The step's key reaches the draw: the same batch, another step, another loss."""
    exp, source = built(config(root))
    batch = batch_of(source)
    drawn = []
    exp = exp._replace(
        objective=lambda key, denoiser, x0, cond: drawn.append(x0) or jnp.zeros(len(x0))
    )
    for k in range(2):
        exp.loss({}, jax.random.key(k), batch)
    assert (drawn[0] != drawn[1]).all()
    narrow = batch | {encoded.STD: jnp.zeros_like(batch[encoded.STD])}
    exp.loss({}, jax.random.key(0), narrow)
    np.testing.assert_array_equal(drawn[-1], batch[encoded.MEAN])


def test_the_set_that_was_encoded_must_be_the_same(trained, monkeypatch):
    run = runs.load_run(trained)
    fewer = dataclasses.replace(run.info.encoded, source="digits")
    run = run._replace(info=dataclasses.replace(run.info, encoded=fewer))
    with pytest.raises(UserError, match="it is another version of the set"):
        real.source(run, "training")
