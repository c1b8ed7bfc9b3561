"""sample, evaluate and report on a cascade's folder and on a stage's run."""

import json
import pathlib

import exact_cascade
import numpy as np
import pytest
from PIL import Image

from jdiff import cli, pictures, runs, staged
from jdiff.commands import stages
from jdiff.data import sources
from jdiff.experiment import defaults
from jdiff.report.figures import number


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> staged.Opened:
    return exact_cascade.make(tmp_path_factory.mktemp("cascades") / "exact")


@pytest.fixture
def trained(made, monkeypatch) -> pathlib.Path:
    """A cascade's folder whose stages open with exact denoisers instead of checkpoints."""

    def load(workdir, *, ema=None, sampling=None, mesh=None):
        return exact_cascade.opened(made.runs, made.config, sampling)

    by_folder = {run.workdir: run for run in made.runs}
    monkeypatch.setattr(staged, "load_cascade", load)
    monkeypatch.setattr(runs, "load_run", lambda workdir, **_: by_folder[workdir])
    return made.runs[0].workdir.parent


def one_line(capsys, *words: str) -> str:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def parsed(*words: str):
    parser = cli.build()
    args = parser.parse_args(parser.spell(["sample", "--workdir=x", *words]))
    config = defaults()
    return stages.of_cascade(args, [config, config, config])


def test_options_behind_a_stage_are_its_own():
    averages, chosen = parsed(
        "--steps=20", "--guidance_scale=2", "--ema=params", "--stage=1", "--steps=10",
        "--aug_level=0.2", "--truncate=yes", "--stage=2", "--solver=ddim", "--rescale",
        "--ema=ema", "--stage=1", "--interval", "-3,5",
    )  # fmt: skip
    assert averages == ["params", "params", "ema"]
    assert [c["grid"]["steps"] for c in chosen] == [20, 10, 20]
    assert [c["guidance"]["scale"] for c in chosen] == [2.0, 2.0, 2.0]
    assert [c.get("solver") for c in chosen] == [None, None, {"name": "ddim"}]
    assert chosen[1]["aug_level"] == 0.2 and chosen[1]["truncate"] is True
    assert chosen[1]["guidance"]["interval"] == (-3.0, 5.0)
    assert chosen[2]["guidance"]["rescale"] == 0.7
    assert "rescale" not in chosen[1]["guidance"] and "interval" not in chosen[2]["guidance"]
    assert "aug_level" not in chosen[0] and "aug_level" not in chosen[2]


def test_a_level_of_all_stages_is_not_for_the_base():
    _, chosen = parsed("--aug_level=0.3")
    assert ["aug_level" in c for c in chosen] == [False, True, True]


def test_the_picture_of_all_stages(capsys, trained, tmp_path):
    out, npz = tmp_path / "s.png", tmp_path / "s.npz"
    words = ["sample", f"--workdir={trained}", "--labels=3,8", "--num=20", "--all_stages",
             "--guidance_scale=2", "--stage=1", "--guidance_scale=1.2", "--aug_level=0.1",
             f"--out={out}", f"--npz={npz}"]  # fmt: skip
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "20 images in " in said and str(out) in said and str(npz) in said
    with np.load(npz) as file:
        base, last, given = file["stage0"], file["images"], file["labels"]
        used = json.loads(str(file["settings"]))["stages"]
    assert base.shape == (20, 4, 4, 1) and last.shape == (20, 8, 8, 1)
    assert given.tolist() == [3, 8] * 10
    assert [stage["guidance"]["scale"] for stage in used] == [2.0, 1.2]
    assert used[1]["aug_level"] == 0.1
    with Image.open(out) as picture:
        shown = np.asarray(picture)
    cells = np.stack([base.repeat(2, 1).repeat(2, 2), last], axis=1).reshape(-1, 8, 8, 1)
    np.testing.assert_array_equal(shown, pictures.grid(cells, columns=4, group=2))
    # Without --all_stages: the last stage alone, a column a label; the same images.
    assert cli.main([w for w in words if w != "--all_stages"]) == 0
    with np.load(npz) as file:
        np.testing.assert_array_equal(file["images"], last)
        assert "stage0" not in file
    with Image.open(out) as picture:
        np.testing.assert_array_equal(np.asarray(picture), pictures.grid(last, columns=2))


def test_a_stage_enlarges_held_out_images(capsys, trained, tmp_path):
    out, npz = tmp_path / "s.png", tmp_path / "s.npz"
    words = ["sample", f"--workdir={trained / 'stage1'}", "--num=20", f"--out={out}",
             f"--npz={npz}"]  # fmt: skip
    assert cli.main(words) == 0
    assert "input enlarged | sample | truth" in capsys.readouterr().out
    test = sources.source("digits", "test").gather(range(20))
    with np.load(npz) as file:
        sample, truth, small = file["images"], file["truth"], file["small"]
        assert file["labels"].tolist() == test["label"].tolist()
    np.testing.assert_array_equal(truth, test["image"])
    area = test["image"].reshape(20, 4, 2, 4, 2, 1).mean((2, 4))
    assert np.abs(small - area).max() <= 0.5 + 1e-3
    # What the stage makes has about the input that it was given: that of a training image.
    again = sample.reshape(20, 4, 2, 4, 2, 1).mean((2, 4))
    assert np.abs(again - area).mean() < 0.5 * np.abs(np.roll(area, 1, 0) - area).mean()
    with Image.open(out) as picture:
        shown = np.asarray(picture)
    step = 48 + pictures.GAP
    assert shown.shape[0] == 7 * step + pictures.GAP  # three to a row
    np.testing.assert_array_equal(
        shown[pictures.GAP :, pictures.GAP + 2 * step :][:48, :48:6, 0][::6], truth[0, :, :, 0]
    )


def test_evaluate_then_report(capsys, trained):
    assert cli.main(["evaluate", f"--workdir={trained}", "--num=20", "--metrics=frechet",
                     "--stage=1", "--aug_level=0.15"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "gap" in said and "Fréchet distance" in said and "PSNR" in said
    found = json.loads((trained / "evaluation.json").read_text())
    assert found["stages"][1]["settings"]["aug_level"] == 0.15
    assert cli.main(["report", f"--workdir={trained}"]) == 0
    assert str(trained / "report.html") in capsys.readouterr().out
    page = (trained / "report.html").read_text()
    for row in (found["stages"][1]["metrics"][0], found["stages"][0]["metrics"][0]):
        assert number(row["generated"]) in page
    assert page.count("data:image/png;base64,") == 5


@pytest.mark.parametrize(
    "words,message",
    [
        (["--stage=2", "--steps=3"], "--stage=2: {} has stages 0 to 1."),
        (["--stage=one"], "--stage: 'one' given; a whole number is needed"),
        (["--stage=0", "--aug_level=0.1"], "--stage=0 --aug_level: the base has no low-res"),
        (["--step=5"], "--step is for a run; of the cascade {}"),
        (["--stage=1", "--solver=huen"], "--solver 'huen' is not known. Did you mean 'heun'?"),
        (["--labels=12"], "12 is out of range"),
        (["--stage=1", "--aug_level=7"], "7"),
        (["--truncate=maybe"], "'maybe' given; yes or no is needed"),
    ],
)
def test_mistakes_with_a_cascade(capsys, trained, words, message):
    said = one_line(capsys, "sample", f"--workdir={trained}", *words)
    assert message.format(trained) in said


def test_options_of_cascades_are_not_for_runs(capsys, trained):
    base, last = (f"--workdir={trained / f'stage{k}'}" for k in (0, 1))
    assert "--stage is for a cascade's folder" in one_line(capsys, "sample", base, "--stage=0")
    assert "--stage is for a cascade's folder" in one_line(capsys, "evaluate", last, "--stage=1")
    assert "--all_stages is for a cascade" in one_line(capsys, "sample", base, "--all_stages")
    assert "has no low-resolution input" in one_line(capsys, "evaluate", base, "--aug_level=0.1")
    assert "--labels" in one_line(capsys, "sample", last, "--labels=3")


def test_a_stage_that_is_not_trained(capsys, tmp_path):
    config = staged.config("c", defaults(), defaults())
    config.stages["1"].low_res.factor = 2.0
    staged.claim(tmp_path / "c", config)
    for command in ("sample", "evaluate"):
        said = one_line(capsys, command, f"--workdir={tmp_path / 'c'}")
        assert "stage 0" in said and "not trained" in said and "--config.stage=0" in said
    assert cli.main(["report", f"--workdir={tmp_path / 'c'}"]) == 0
    assert "2 waiting" in (tmp_path / "c" / "report.html").read_text()
