"""Arrays of the data that a network is told: from a prepared set to samples of a trained run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jdiff import cli, data, experiment, losses, runs, train
from jdiff.data import conditions
from jdiff.errors import UserError

TOLD = ("text", "text_mask")
TEXT = data.Field("text", (3, 4), "float32")
MASK = data.Field("text_mask", (3,), "bool")


def tiny(folder, **model):
    """A U-Net with text on 8 x 8 pictures of the set `tiny`."""
    c = experiment.defaults()
    c.data.update({"name": "tiny", "data_dir": str(folder), "size": 8, "crop": "center"})
    c.data.conditions = TOLD
    c.model.update({"channels": 8, "multipliers": (1,), "blocks": 1, "attention_sizes": ()} | model)
    c.optimizer.learning_rate = 0.05
    c.train.update({"batch_size": 8, "steps": 3, "log_every": 1})
    c.sampling.grid.steps = 2
    c.sampling.guidance.scale = 2.0
    return c


def prepared(c):
    source = data.source("tiny", "train", c.data.data_dir, fields=c.data.conditions)
    return source, experiment.prepared(source.info, c.data)


@pytest.mark.parametrize("in_memory", [False, True])
def test_arrays_of_a_set_are_read_and_described(toy_folder, in_memory):
    source = data.source(
        "tiny", "test", toy_folder, fields=("caption", *TOLD), in_memory=in_memory,
        progress=lambda line: None,
    )  # fmt: skip
    assert source.info.fields == (TEXT, MASK)  # a caption is no array
    rows = source.gather([4, 0])
    texts = np.random.default_rng(len("test")).normal(size=(25, 3, 4)).astype(np.float32)
    np.testing.assert_array_equal(rows["text"], texts[[4, 0]])
    assert rows["text_mask"].dtype == bool
    assert rows["text_mask"].tolist() == [[True, True, False], [True, False, False]]
    described = json.loads(json.dumps(dataclasses.asdict(source.info)))
    assert data.Info.of(described) == source.info
    del described["fields"]  # of an earlier version
    assert data.Info.of(described) == dataclasses.replace(source.info, fields=())


def test_floats_are_dropped_with_the_label_and_masks_are_kept(toy_folder, monkeypatch):
    seen = {}

    def spy(key, denoiser, x0, cond):
        seen.update(cond)
        return jnp.zeros(len(x0))

    monkeypatch.setitem(losses.BY_NAME, "spy", spy)
    c = tiny(toy_folder)
    c.loss.update({"name": "spy", "null_rate": 0.5})
    source, info = prepared(c)
    exp = experiment.build(c, info)
    assert exp.null == {"label": 10, "text": 0.0}
    batch = next(data.batches(source, 20, size=8, crop="center", threads=0))
    half = batch | {"text": batch["text"].astype(np.float16)}  # stored so, told in single precision
    exp.loss(None, jax.random.key(0), {k: jnp.asarray(v) for k, v in half.items()})
    dropped = np.asarray(seen["label"] == 10)
    assert 3 < dropped.sum() < 17
    kept = np.where(dropped[:, None, None], 0, half["text"].astype(np.float32))
    np.testing.assert_array_equal(seen["text"], kept)
    np.testing.assert_array_equal(seen["text_mask"], batch["text_mask"])
    assert seen["text"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"conditions": ("txt",)}}, "'txt' .* Did you mean 'text'"),
        ({"data": {"conditions": ("caption",)}}, "'caption' of tiny is no array of floats"),
        ({"data": {"conditions": ("text_mask",)}}, "takes no 'text_mask'"),
        ({"model": {"name": "dit"}}, "'dit' of config.model takes no 'text'"),
        ({"model": {"text_width": 5}}, "text_width=5 does not fit tiny: it has 4"),
        ({"data": {"conditions": ()}, "model": {"text_width": 4}}, r"UNet needs cond\['text'\]"),
    ],
)
def test_what_the_network_cannot_be_told_is_refused(toy_folder, change, words):
    c = tiny(toy_folder)
    if change.get("model", {}).get("name") == "dit":
        c.model = {"name": "dit", "width": 16, "depth": 1, "heads": 2, "patch": 2}
    for section, fields in change.items():
        c[section].update(fields)
    with pytest.raises(UserError, match=words):
        _, info = prepared(c)
        experiment.check(experiment.build(c, info), info)


def arrays(**changes):
    made = {"text": np.ones((5, 3, 4)), "text_mask": np.ones((5, 3), bool)} | changes
    return {name: array for name, array in made.items() if array is not None}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (arrays(text_mask=None), r"there is no array 'text_mask' \[N, 3\]"),
        (arrays(texts=np.ones(5)), "'texts' is not known. Did you mean 'text'"),
        (arrays(text=np.ones((5, 3, 6))), r"'text' is \[5, 3, 6\], not \[N, 3, 4\]"),
        (arrays(text=np.ones((4, 3, 4))), "differ in length: text 4, text_mask 5"),
        (arrays(text_mask=np.ones((5, 3))), "'text_mask' holds float64; the data have bool"),
        (arrays(text=np.ones((0, 3, 4)), text_mask=np.ones((0, 3), bool)), "are empty"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, given, words):
    np.savez(tmp_path / "a.npz", **given)
    with pytest.raises(UserError, match=words):
        conditions.read(tmp_path / "a.npz", (TEXT, MASK))


def test_a_file_is_read_in_turn(tmp_path):
    with pytest.raises(UserError, match="b.npz does not exist"):
        conditions.read(tmp_path / "b.npz", (TEXT, MASK))
    (tmp_path / "b.npz").write_text("no archive")
    with pytest.raises(UserError, match=r"b.npz cannot be read as an .npz file"):
        conditions.read(tmp_path / "b.npz", (TEXT, MASK))
    np.savez(tmp_path / "a.npz", **arrays(text=np.arange(60.0).reshape(5, 3, 4)))
    found = conditions.in_turn(conditions.read(tmp_path / "a.npz", (TEXT, MASK)), 7)
    assert found["text"].dtype == np.float32
    np.testing.assert_array_equal(found["text"][:, 0, 0], [0, 12, 24, 36, 48, 0, 12])


def test_a_network_learns_to_be_told_and_samples_what_a_file_says(toy_folder, tmp_path, capsys):
    """Training, its pictures, and `jdiff sample --cond` with guidance."""
    workdir = tmp_path / "run"
    train.train(tiny(toy_folder), workdir, Console(quiet=True))
    assert (workdir / "samples" / "step_00000003.png").is_file()
    run = runs.load_run(workdir)
    assert run.info.fields == (TEXT, MASK)
    assert run.null == {"label": 10, "text": 0.0}

    def sampled(*words):
        npz = tmp_path / "out.npz"
        command = ["sample", f"--workdir={workdir}", "--labels=3", "--num=4", f"--npz={npz}"]
        assert cli.main([*command, *words]) == 0
        with np.load(npz) as file:
            return file["images"].astype(int)

    text = np.random.default_rng(0).normal(size=(4, 3, 4))
    mask = np.array([[True, True, False]] * 4)
    np.savez(tmp_path / "one.npz", text=text, text_mask=mask)
    text[2] *= -1
    text[:, 2] = 9.0  # not seen
    np.savez(tmp_path / "two.npz", text=text, text_mask=mask)
    one, two = (sampled(f"--cond={tmp_path / name}.npz") for name in ("one", "two"))
    gaps = np.abs(one - two).max((1, 2, 3))
    assert gaps[2] > 1 and gaps[[0, 1, 3]].max() == 0

    assert cli.main(["sample", f"--workdir={workdir}"]) == 2
    assert "is told text [N, 3, 4], text_mask [N, 3]; give such arrays" in capsys.readouterr().err


def test_guidance_goes_from_no_text_to_the_text(toy_folder):
    """null + w (text - null) at fixed mask; of random weights, as untrained ones answer zero."""
    c = tiny(toy_folder)
    _, info = prepared(c)
    exp = experiment.build(c, info)
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda a: jnp.asarray(random.normal(size=a.shape) / 3, jnp.float32),
        exp.init(jax.random.key(0)),
    )
    denoise = exp.denoiser(params)
    guided, _, _ = experiment.sampler(c, denoise, exp.null)
    x, t = jnp.asarray(random.normal(size=(2, 8, 8, 3)), jnp.float32), jnp.array([0.7, 3.0])
    mask = jnp.array([[True, False, True], [True, True, True]])
    cond = {
        "label": jnp.array([1, 4]), "text_mask": mask,
        "text": jnp.asarray(random.normal(size=(2, 3, 4)), jnp.float32),
    }  # fmt: skip
    null = cond | {"label": jnp.array([10, 10]), "text": jnp.zeros((2, 3, 4))}
    call = jax.jit(lambda cond: denoise(x, t, cond).x0)
    good, bad = call(cond), call(null)
    expected = bad + 2.0 * (good - bad)
    assert float(jnp.abs(good - bad).max()) > 0.01
    np.testing.assert_allclose(jax.jit(guided)(x, t, cond).x0, expected, atol=1e-4)
