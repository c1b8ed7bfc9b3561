"""Stages of a cascade: what a network is told of its small input, and the folder of their runs."""

import json
import pathlib
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import jdiff
from jdiff import cli, experiment, losses, runs, staged, train
from jdiff import config as configs
from jdiff.cascades import augmentations, low_res
from jdiff.data.sources import Info
from jdiff.errors import UserError
from jdiff.models.low_res import enlarge
from jdiff.training import checkpoints

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
CIFAR = Info("cifar10", "train", (32, 32, 3), 10, tuple("abcdefghij"), 50_000)
DIGITS = Info("digits", "train", (8, 8, 1), 10, tuple("0123456789"), 1437)


def stage(name, size, **fields):
    """A tiny network for digits of `size` pixels; `low_res__factor=2` is c.low_res.factor."""
    c = experiment.defaults()
    c.name = name
    c.data.update({"size": size, "resample": "box"})
    c.model.update({"name": "dit", "width": 16, "depth": 1, "heads": 2})
    c.sampling.solver = {"name": "euler"}
    c.sampling.grid.steps = 2
    c.sampling.batch = 8
    c.train.update(
        {"batch_size": 8, "steps": 4, "log_every": 2, "sample_every": 4, "checkpoint_every": 2}
    )
    for field, value in fields.items():
        section, _, last = field.rpartition("__")
        (c[section] if section else c)[last] = value
    return c


def upper(**fields):
    given = {"low_res__factor": 2, "low_res__augmentation": {"name": "gaussian"},
             "sampling__aug_level": 0.25}  # fmt: skip
    return stage("upper", 8, **(given | fields))


#: Of convolutions, whose weights fit images of every size.
UNET = {"name": "unet", "channels": 8, "multipliers": (1,), "blocks": 1, "attention_sizes": ()}


def two(**fields):
    return staged.config("tiny", stage("base", 4), upper(**fields))


def go(config, workdir):
    return train.train(config, workdir, Console(quiet=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a cascade of two stages, each of four steps."""
    workdir = tmp_path_factory.mktemp("cascade") / "run"
    staged.claim(workdir, two())
    for k, part in enumerate(staged.parts(two())):
        go(part, staged.folder(workdir, k))
    return workdir


def weights(workdir):
    """All that the newest checkpoint holds."""
    import orbax.checkpoint as ocp

    with checkpoints.opened(workdir, write=False) as saved:
        only = ocp.args.Composite(state=ocp.args.StandardRestore())
        state = saved._manager.restore(saved.latest, args=only).state
    plain = lambda a: jax.random.key_data(a) if jnp.issubdtype(
        getattr(a, "dtype", np.float32), jax.dtypes.prng_key) else a  # fmt: skip
    return {
        jax.tree_util.keystr(path): np.asarray(plain(a))
        for path, a in jax.tree_util.tree_leaves_with_path(state)
    }


# What training tells the network.


def told(config, monkeypatch, key):
    """(x0, cond) that the loss gets of a batch of digits, and the images themselves."""
    seen = {}

    def spy(key, denoiser, x0, cond, *, null):
        seen.update(x0=x0, cond=cond)
        return jnp.zeros(len(x0))

    monkeypatch.setitem(losses.BY_NAME, "spy", spy)
    config.loss.name = "spy"
    exp = experiment.build(config, DIGITS)
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), np.uint8)
    exp.loss(None, key, {"image": jnp.asarray(image), "label": jnp.arange(6)})
    return seen["x0"], seen["cond"], experiment.to_float(jnp.asarray(image))


def test_training_tells_the_network_the_augmented_small_image_and_its_level(monkeypatch):
    key = jax.random.key(5)
    x0, cond, images = told(upper(loss__null_rate=0.0), monkeypatch, key)
    np.testing.assert_array_equal(x0, images)
    assert sorted(cond) == ["aug_level", "label", "low_res"]
    small = images.reshape(6, 4, 2, 4, 2, 1).mean((2, 4))
    s = cond["aug_level"][:, None, None, None]
    assert len(np.unique(cond["aug_level"])) == 6  # each image has its own
    noise = (cond["low_res"] - np.cos(np.pi / 2 * s) * small) / np.sin(np.pi / 2 * s)
    assert 0.7 < float(noise.std()) < 1.3 and abs(float(noise.mean())) < 0.3
    _, other, _ = told(upper(loss__null_rate=0.0), monkeypatch, jax.random.key(6))
    assert not np.intersect1d(cond["aug_level"], other["aug_level"]).size  # drawn at each step


def test_a_residual_stage_learns_what_the_enlarged_input_lacks(monkeypatch):
    config = upper(low_res__residual=True, low_res__up="bicubic")
    x0, cond, images = told(config, monkeypatch, jax.random.key(5))
    base = enlarge(cond["low_res"], (8, 8), "bicubic")
    np.testing.assert_allclose(x0 + base, images, atol=1e-6)


def test_without_a_factor_nothing_is_told_and_the_draws_are_as_ever(monkeypatch):
    plain = stage("plain", 8, loss__null_rate=0.0)
    x0, cond, images = told(plain, monkeypatch, jax.random.key(5))
    np.testing.assert_array_equal(x0, images)
    assert sorted(cond) == ["label"]
    assert experiment.build(plain, DIGITS).low_res is None


def test_the_network_gets_its_fields_from_low_res():
    from jdiff import models

    of = lambda config: models.abstract(experiment.build(config, DIGITS).build)[1]
    made, plain = of(upper(low_res__up="nearest", model=UNET)), of(stage("plain", 8, model=UNET))
    assert made["stem"]["kernel"].shape[-2:] == (2, 8)  # the image and the enlarged small one
    assert plain["stem"]["kernel"].shape[-2:] == (1, 8)
    assert models.count(made) > models.count(plain) + 9 * 8  # the level is embedded too
    silent = upper(low_res__augmentation={"name": "none"}, sampling__aug_level=None)
    experiment.check(experiment.build(silent, DIGITS), DIGITS)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"low_res__factor": 3}, r"low_res.factor=3 does not divide .*8 x 8 .*nearest .* is 2"),
        ({"low_res__factor": 1}, "low_res.factor=1 .*nearest that does is 2"),
        ({"low_res__up": "bilinera"}, "config.low_res: .*'bilinera' .*'bilinear'"),
        ({"low_res__down": "aera"}, "config.low_res: .*'aera' .*'area'"),
        ({"low_res__augmentation": {"name": "gausian"}}, "augmentation 'gausian' .*'gaussian'"),
        ({"low_res__augmentation": {"name": "gaussian", "hihg": 1.0}}, "'hihg' .*'high'"),
        ({"model": {"name": "flux"}}, "low-resolution input 'flux' is not .*unet"),
        ({"sampling__aug_level": None}, "config.sampling.aug_level=None: .* needs one"),
        ({"sampling__aug_level": 1.5}, "config.sampling.aug_level=1.5: .*from 0 to 1"),
        ({"low_res__augmentation": {"name": "none"}, "model__scalars": ("aug_level",)},
         r"config.model.scalars=.*no level that a network is told"),
        ({"model__low_res_channels": 3}, "low_res_channels=3 does not fit config.low_res.*1"),
        ({"model__low_res_method": "nearest"}, "low_res_method='nearest' does not fit.*'bilinear'"),
        ({"low_res__factor": None}, "config.sampling.aug_level=0.25 is of a low-resolution input"),
        ({"low_res__factor": None, "model__low_res_channels": 1}, "config.low_res.factor says"),
        ({"low_res__factor": None, "model__scalars": ("aug_level",)}, "config.low_res.factor says"),
    ],
)  # fmt: skip
def test_a_field_of_the_input_that_does_not_fit_is_named(fields, words, tmp_path):
    with pytest.raises(UserError, match=words):
        go(upper(**fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Training a stage.


def test_a_stage_trains_and_shows_input_sample_and_truth(trained):
    metrics = (trained / "stage1" / "metrics.jsonl").read_text().splitlines()
    assert [m["step"] for m in map(json.loads, metrics) if m["kind"] == "train"] == [2, 4]
    picture = np.asarray(Image.open(trained / "stage1" / "samples" / "step_00000004.png"))
    assert picture.shape[:2] == (8 * 50 + 2, 3 * 50 + 2)  # cells of 48 pixels, gaps of 2
    cells = picture[:400, :150].reshape(8, 50, 3, 50, -1)[:, 2:, :, 2:, 0].swapaxes(1, 2)
    pixels = cells.reshape(8, 3, 8, 6, 8, 6)[:, :, :, 0, :, 0]
    from jdiff.data import source

    real = np.stack([source("digits", "test")[i]["image"][..., 0] for i in range(8)])
    np.testing.assert_array_equal(pixels[:, 2], real)
    closeness = np.corrcoef(pixels[:, 0].ravel(), real.ravel())[0, 1]
    assert 0.5 < closeness < 0.99  # small, augmented and enlarged, but the same digits


def test_a_stage_that_was_cut_in_two_ends_with_the_same_bits(trained, tmp_path):
    shutil.copytree(trained / "stage1", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")  # as if killed after step 2
    go(upper(), tmp_path / "run")
    mine, theirs = weights(tmp_path / "run"), weights(trained / "stage1")
    assert mine.keys() == theirs.keys()
    assert not [k for k in mine if not np.array_equal(mine[k], theirs[k])]


def test_the_loaded_network_hears_of_the_small_image_and_of_its_level(trained):
    run = jdiff.load_run(trained / "stage1")
    assert str(run.low_res) == str(low_res(2, augmentations.gaussian()))
    x = jnp.zeros((2, 8, 8, 1))
    small = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    cond = {"label": jnp.array([3, 4]), "low_res": small, "aug_level": jnp.array([0.1, 0.2])}
    look = jax.jit(lambda cond: run.denoiser(x, jnp.ones(2), cond).x0)
    right = look(cond)
    level = look(cond | {"aug_level": jnp.array([0.1, 0.9])})
    np.testing.assert_array_equal(level[0], right[0])
    assert not np.array_equal(level[1], right[1])
    image = look(cond | {"low_res": small.at[1].add(0.5)})
    np.testing.assert_array_equal(image[0], right[0])
    assert not np.array_equal(image[1], right[1])


def test_a_stage_trained_on_crops_enlarges_whole_images(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained / "stage0", folder / "stage0")
    crops = upper(data__crop="patch", data__size=4, train__steps=1, model=UNET)
    config = staged.config("crops", stage("base", 4), crops)
    (folder / "cascade.json").write_text(configs.to_json(config))
    staged.check(config)
    staged.claim(folder, config)
    go(crops, folder / "stage1")
    opened = jdiff.load_cascade(folder)
    assert opened.runs[1].info.shape == (4, 4, 1)
    small = jnp.zeros((3, 4, 4, 1))
    made = opened.cascade.upsample(jax.random.key(0), 1, small, {"label": jnp.arange(3)})
    assert made.shape == (3, 8, 8, 1)


# The folder.


def test_a_cascade_opens_and_samples_as_one(trained):
    opened = jdiff.load_cascade(trained)
    assert [run.config.name for run in opened.runs] == ["base", "upper"]
    assert opened.config.name == "tiny"
    first, last = opened.cascade.stages
    assert (first.shape, last.shape, last.level) == ((4, 4, 1), (8, 8, 1), 0.25)
    images = opened.cascade.sample(jax.random.key(0), {"label": jnp.arange(3)})
    assert images.shape == (3, 8, 8, 1) and np.isfinite(images).all()


def test_each_stage_takes_choices_of_its_own(trained):
    both = jdiff.load_cascade(trained, ema="params", sampling={"aug_level": 0.5})
    assert [run.ema for run in both.runs] == ["params"] * 2
    assert both.cascade.stages[1].level == 0.5
    one = jdiff.load_cascade(trained, sampling=[None, {"grid": {"steps": 5}}])
    assert [len(s.times) for s in one.cascade.stages] == [3, 6]
    with pytest.raises(UserError, match="sampling: 3 entries given for 2 stages"):
        jdiff.load_cascade(trained, sampling=[None] * 3)
    with pytest.raises(UserError, match="config.sampling.aug_level=7"):
        jdiff.load_cascade(trained, sampling={"aug_level": 7.0})


def test_a_folder_that_is_no_run_says_what_it_is(trained, tmp_path):
    with pytest.raises(UserError, match=r"is a cascade.*--workdir=.*stage0.*stage0, stage1"):
        runs.load_run(trained)
    with pytest.raises(UserError, match="is not a cascade"):
        jdiff.load_cascade(trained / "stage0")
    staged.claim(tmp_path / "new", two())
    with pytest.raises(UserError, match=r"stage 0 \(base\) is not trained yet.*config.stage=0"):
        jdiff.load_cascade(tmp_path / "new")


def test_a_folder_of_another_cascade_is_refused_with_the_differences(trained):
    before = (trained / "cascade.json").read_bytes()
    with pytest.raises(UserError, match="another cascade: stages.1.low_res.factor: 2.0 -> 4"):
        staged.claim(trained, two(low_res__factor=4))
    with pytest.raises(UserError, match="2 stages -> 1"):
        staged.claim(trained, staged.config("tiny", stage("base", 4)))
    with pytest.raises(UserError, match="directory of a run"):
        staged.claim(trained / "stage0", two())
    assert (trained / "cascade.json").read_bytes() == before
    staged.claim(trained, two(train__log_every=1, sampling__aug_level=0.5))  # these may change
    staged.claim(trained, two())
    assert (trained / "cascade.json").read_bytes() == before


def test_the_command_passes_over_what_is_finished(trained, capsys):
    words = ["train", f"--config={trained / 'cascade.json'}", f"--workdir={trained}"]
    before = weights(trained / "stage0")
    assert cli.main([*words, "--no-evaluate"]) == 0
    out = capsys.readouterr().out
    assert "stage 0 of 2, base: finished before" in out
    assert "stage 1 of 2, upper: finished before" in out
    assert not [k for k, v in weights(trained / "stage0").items() if (v != before[k]).any()]
    assert runs.read_config(trained / "stage1").sampling.aug_level == 0.25
    assert cli.main([*words, "--no-evaluate", "--config.stages.1.sampling.aug_level=0.5"]) == 0
    assert runs.read_config(trained / "stage1").sampling.aug_level == 0.5  # and nothing is trained
    assert "upper: finished before" in capsys.readouterr().out
    assert cli.main([*words, "--no-evaluate", "--config.stages.1.sampling.aug_level=0.25"]) == 0
    assert cli.main([*words, "--config.stage=uper"]) == 2
    assert "config.stage 'uper' is not known. Did you mean 'upper'" in capsys.readouterr().err


def test_a_stage_is_finished_when_it_is_evaluated_as_it_samples(tmp_path):
    config = upper()
    runs.claim(tmp_path, config)
    done = lambda config=config, **k: staged.finished(tmp_path, config, **k)
    assert not done(evaluate=False)
    runs.describe(tmp_path, state="finished")
    assert done(evaluate=False) and not done(evaluate=True)
    (tmp_path / "evaluation.json").write_text('{"settings": {"step": 4}}')
    assert done(evaluate=True)
    assert not done(upper(sampling__aug_level=0.5), evaluate=True)
    assert not done(upper(train__steps=5), evaluate=False)


def test_a_stage_that_is_stopped_ends_the_command(tmp_path, monkeypatch, capsys):
    begun = []

    def stopped(config, workdir, console, profile):
        begun.append(workdir)
        raise train.Stopped(2, signal.SIGTERM)

    monkeypatch.setattr(train, "train", stopped)
    (tmp_path / "c.json").write_text(configs.to_json(two()))
    words = [f"--config={tmp_path / 'c.json'}", f"--workdir={tmp_path / 'run'}"]
    assert cli.main(["train", *words]) == 75
    assert "SIGTERM at step 2, saved" in capsys.readouterr().err
    assert cli.main(["train", *words, "--config.stage=upper"]) == 75
    assert begun == [tmp_path / "run" / "stage0", tmp_path / "run" / "stage1"]
    assert staged.read(tmp_path / "run").stage is None  # whichever was asked for


def test_stages_that_do_not_fit_are_told_before_any_is_trained(tmp_path, capsys):
    (tmp_path / "c.json").write_text(configs.to_json(two(data__size=4)))
    words = [f"--config={tmp_path / 'c.json'}", f"--workdir={tmp_path / 'run'}"]
    assert cli.main(["train", *words]) == 2
    assert "stage 1 (4 x 4): low_res.factor=2 makes its input 2 x 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    wrong = staged.config("wrong", upper(), upper())
    with pytest.raises(UserError, match=r"stage 0 .upper.: config.low_res.factor=2.0: the base"):
        staged.check(wrong)


# The config.


@pytest.mark.parametrize(("name", "info", "small"), [("cdm_digits", DIGITS, (4,)),
                                                     ("cdm_cifar10", CIFAR, (8, 16))])  # fmt: skip
def test_the_configs_build_and_their_stages_fit(name, info, small):
    config = configs.load(str(CONFIGS / f"{name}.py"))
    base, *upper = staged.built(config, [info] * len(config.stages))
    assert base.low_res is None
    inputs = [exp.low_res.small((exp.config.data.size,) * 2 + (1,))[0] for exp in upper]
    assert inputs == [exp.config.data.size for exp in (base, *upper[:-1])] == list(small)


def test_fields_of_each_stage_are_set_by_its_number():
    path = str(CONFIGS / "cdm_digits.py")
    words = ["--config.stages.1.train.steps=7", "--config.stages.1.low_res.augmentation.low=0.5",
             "--config.stages.0.sampling.solver.eta=0.1", "--config.stage=1"]  # fmt: skip
    config = configs.load(path, words)
    base, up = staged.parts(config)
    assert (base.train.steps, up.train.steps, up.low_res.augmentation.low) == (2000, 7, 0.5)
    assert staged.chosen(config) == 1
    assert staged.one(config, "plan") is up
    named = configs.load(path, ["--config.stage=digits 4 x 4"])
    assert staged.chosen(named) == 0
    with pytest.raises(UserError, match="Did you mean config.stages.1.train.steps"):
        configs.load(path, ["--config.stages.1.train.step=7"])


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "--devices=8xA100"],
        ["sweep", "--workdir=runs/none", "--list"],
        ["launch", "--platform=slurm", "--workdir=runs/none", "--dry_run"],
    ],
)
def test_a_command_for_one_run_asks_for_the_stage(words, tmp_path, monkeypatch, capsys):
    config = tmp_path / "cascade.py"
    config.write_text((CONFIGS / "cdm_digits.py").read_text() + SWEEP)
    monkeypatch.chdir(tmp_path)
    assert cli.main([*words, f"--config={config}"]) == 2
    said = capsys.readouterr().err
    assert "--config.stage=K, one of 0 (digits 4 x 4), 1 (digits 4 -> 8)" in said


SWEEP = """

def sweep():
    return [{"stages.1.train.steps": n} for n in (1000, 3000)]
"""


def test_a_stage_is_planned_swept_and_launched_as_a_run_is(tmp_path, monkeypatch, capsys):
    config = tmp_path / "cascade.py"
    config.write_text((CONFIGS / "cdm_digits.py").read_text() + SWEEP)
    monkeypatch.chdir(tmp_path)
    from jdiff.launching import points

    found = points.resolve(str(config), ["--config.stage=1"])
    assert [(p.name, p.config.train.steps, p.config.low_res.factor) for p in found] == [
        ("00_steps=1000", 1000, 2.0), ("01_steps=3000", 3000, 2.0)
    ]  # fmt: skip
    chosen = [f"--config={config}", "--config.stage=1"]
    assert cli.main(["plan", *chosen, "--devices=8xA100", "--json", "--no-hints"]) == 0
    assert json.loads(capsys.readouterr().out)["batch_size"] == 64
    launch = ["launch", *chosen, "--platform=slurm", "--workdir=runs/cdm", "--dry_run"]
    assert cli.main(launch) == 0
    printed = capsys.readouterr().out
    assert "cdm-stage1" in printed and str(tmp_path / "runs/cdm/stage1/launch") in printed
    assert not (tmp_path / "runs").exists()
