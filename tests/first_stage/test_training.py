"""A small autoencoder on real digits: trained, resumed, opened, measured and reported."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

import jdiff
from jdiff import cli, kinds, real, report, runs, train
from jdiff.autoencoders import autoencoder
from jdiff.data import sources
from jdiff.errors import UserError
from jdiff.first_stage import trained
from jdiff.first_stage.defaults import defaults
from jdiff.training import checkpoints

QUIET = Console(quiet=True)


def tiny(**changes):
    c = defaults()
    c.model.update({"name": "vq", "codes": 16, "channels": 2, "decay": 0.9, "revive": 0.0})
    c.model.update({"widths": (8,), "blocks": 1, "groups": None, "attention": False})
    c.loss.perceptual = 0.0  # digits of 8 x 8 pixels are too small
    c.loss.start = 2
    c.discriminator.update({"channels": 4, "layers": 1})
    c.ema = {"ema": {"kind": "constant", "decay": 0.5}}
    c.train.update({"batch_size": 16, "steps": 4, "log_every": 1, "checkpoint_every": 2})
    c.train.update(changes)
    c.sampling.batch = 100
    c.evaluation.num = 120
    return c


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run that was cut in two."""
    folder = tmp_path_factory.mktemp("autoencoder") / "run"
    train.train(tiny(steps=2), folder, QUIET)
    train.train(tiny(), folder, QUIET)
    return folder


@pytest.fixture(scope="module")
def opened(workdir):
    return trained.load(workdir)


def state(workdir) -> dict:
    with checkpoints.opened(workdir, write=False) as saved:
        import orbax.checkpoint as ocp

        found = saved._manager.restore(
            saved.latest, args=ocp.args.Composite(state=ocp.args.StandardRestore())
        )
    return found.state


def test_both_players_and_the_codebook_move_and_figures_are_logged(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [2, 3, 4] or len(lines) >= 2
    names = {"pixels", "commitment", "perplexity", "generator", "discriminator"}
    assert names <= lines[-1].keys() and 1 <= lines[-1]["perplexity"] <= 16
    assert lines[0]["adversarial_weight"] == 0 < lines[-1]["adversarial_weight"]
    params = state(workdir)["params"]
    fresh = (
        kinds.of(tiny())
        .build(tiny(), sources.source("digits", "train").info)
        .init(jax.random.split(jax.random.key(0), 3)[0])
    )
    moved = lambda *path: float(np.abs(_at(params, path) - np.asarray(_at(fresh, path))).max())
    assert moved("autoencoder", "encoder", "stem", "kernel") > 1e-4
    assert moved("discriminator", "stem", "kernel") > 1e-4
    # Of plain descent with rate 1: 0.9 of it is kept a step, and the mean use is 1.
    count = np.asarray(params["autoencoder"]["quantizer"]["count"])
    np.testing.assert_allclose(count.sum(), 16, rtol=1e-4)
    assert count.min() >= 0.9**4 - 1e-5 and count.max() > 1


def test_latents_have_the_deviation_1_of_the_training_split(workdir, opened):
    """Measured on images of the data, kept with the run, and undone in decoding."""
    kept = json.loads((workdir / trained.FILE).read_text())
    assert (kept["step"], kept["ema"], kept["images"]) == (4, "ema", 1437)
    coder = jdiff.load_autoencoder(workdir)
    np.testing.assert_allclose(coder.scale, kept["scale"], rtol=1e-6)
    rows = real.rows(opened, real.source(opened, "training"), batch=100)
    # Of a codebook, whose latents have no spread.
    latents = np.concatenate([trained.moments(coder, row["image"]).mean for row in rows])
    assert latents.shape == (1437, 8, 8, 2)
    np.testing.assert_allclose(latents.std(), 1.0, rtol=1e-4)
    plain = autoencoder(coder.apply, coder.params)
    z = latents[:1] / coder.scale
    np.testing.assert_allclose(coder.decode(latents[:1]), plain.decode(z), atol=1e-5)


def test_the_spread_of_a_distribution_counts():
    """The variance of draws is the mean variance and the variance of the means."""
    mean, std = np.asarray([[1.0, 3.0]]), np.asarray([[2.0, 4.0]])
    parts = [trained.Moments(mean[:, :1], std[:, :1]), trained.Moments(mean[:, 1:], std[:, 1:])]
    np.testing.assert_allclose(trained.spread(iter(parts)), np.sqrt(1 + (4 + 16) / 2))


def test_evaluation_measures_reconstructions_and_the_report_shows_it(workdir, capsys):
    assert cli.main(["evaluate", f"--workdir={workdir}", "--num=120"]) == 0
    assert "reconstructions" in capsys.readouterr().out
    found = json.loads((workdir / "evaluation.json").read_text())
    rows = {row["key"]: row for row in found["metrics"]}
    assert {"frechet", "psnr", "ssim", "codes", "perplexity"} <= rows.keys()
    assert rows["codes"]["value"] * 16 == round(rows["codes"]["value"] * 16)
    assert 1 <= rows["perplexity"]["value"] <= 16 * rows["codes"]["value"] + 1e-4
    page = report.write(workdir).read_text()
    for words in ("<h2>Reconstructions</h2>", "PSNR", "Code perplexity", "jdiff.load_autoencoder"):
        assert words in page


def test_figures_are_those_of_the_images(opened):
    """PSNR by hand, on the images that the autoencoder gives."""
    from jdiff.first_stage import assessment

    collected = assessment._Collected(opened, 100)
    images = next(iter(real.rows(opened, real.source(opened, "held-out"), batch=30)))["image"]
    made = collected.add(images)  # fewer than a batch
    assert made.shape == images.shape and made.dtype == np.uint8
    squares = np.square(made / 255.0 - images / 255.0).mean((1, 2, 3))
    rows = {row["key"]: row["value"] for row in collected.rows()}
    np.testing.assert_allclose(rows["psnr"], (-10 * np.log10(squares)).mean(), rtol=1e-4)


def test_it_does_not_sample(workdir, capsys):
    with pytest.raises(UserError, match="jdiff.load_autoencoder opens it"):
        runs.load_run(workdir)
    assert cli.main(["evaluate", f"--workdir={workdir}", "--steps=4"]) == 2
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ("model", {"name": "vqq"}, "Did you mean 'vq'"),
        ("model", {"code": 3}, "Did you mean 'codes'"),
        ("loss", {"pixels": "l3"}, "Allowed: l1, l2, logit_laplace"),
        ("loss", {"kl": -1.0}, "must not be negative"),
        ("loss", {"perceptual": 1.0}, "takes images of 16 pixels"),
        ("discriminator", {"layers": 3}, "a patch needs images of 24"),
        ("model", {"widths": (4,) * 5}, "not divisible by the factor 16"),
    ],
)
def test_mistakes_are_told_before_training(section, changes, said):
    c = tiny()
    with c.unlocked():
        c[section].update(changes)
    info = sources.source("digits", "train").info
    with pytest.raises(UserError, match=said):
        kind = kinds.of(c)
        kind.check(kind.build(c, info), info)


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return np.asarray(tree)
