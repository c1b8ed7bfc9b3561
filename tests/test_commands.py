"""The commands on a run whose denoiser is exact: what they write is what they drew."""

import json
import pathlib

import exact_run
import numpy as np
import pytest
from PIL import Image

from jdiff import assess, cli, pictures, runs
from jdiff.data import sources
from jdiff.report.figures import number


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def one_line(capsys, *words: str) -> str:
    """Runs a command with a mistake; returns its one line on stderr."""
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.fixture
def trained(tmp_path, monkeypatch) -> pathlib.Path:
    """A run directory that `load_run` opens with an exact denoiser instead of a checkpoint."""
    folder = tmp_path / "exact"
    folder.mkdir()
    opened = exact_run.make(folder)
    monkeypatch.setattr(runs, "load_run", lambda workdir, **options: opened)
    return folder


def test_sample_writes_the_picture_of_its_images(capsys, trained, tmp_path):
    out, npz = tmp_path / "s.png", tmp_path / "s.npz"
    words = ["sample", f"--workdir={trained}", "--labels=7,0-2", "--num=10", "--seed=3",
             f"--out={out}", f"--npz={npz}"]  # fmt: skip
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert str(out) in said and str(npz) in said
    assert "10 images in " in said and "of compilation" in said
    with np.load(npz) as file:
        images, given = file["images"], file["labels"]
        assert json.loads(str(file["settings"]))["grid"] == {"name": "karras", "steps": 4}
    assert given.tolist() == [7, 0, 1, 2, 7, 0, 1, 2, 7, 0]
    assert images.shape == (10, 8, 8, 1)
    with Image.open(out) as picture:
        shown = np.asarray(picture)
    np.testing.assert_array_equal(shown, pictures.grid(images, columns=4))
    # The same seed gives the same images, whatever the batch; one bit of rounding apart at most.
    assert cli.main([*words, "--batch=5"]) == 0
    with np.load(npz) as file:
        assert np.abs(file["images"].astype(int) - images).max() <= 1


def test_sample_draws_what_the_labels_say(trained, tmp_path):
    npz = tmp_path / "s.npz"
    assert cli.main(["sample", f"--workdir={trained}", "--labels=4", "--num=6", "--steps=12",
                     "--guidance_scale=1", f"--npz={npz}"]) == 0  # fmt: skip
    train = sources.source("digits", "train").gather(range(300))
    with np.load(npz) as file:
        gaps = (file["images"][:, None].astype(int) - train["image"]) ** 2
    nearest = gaps.sum((2, 3, 4)).argmin(1)
    assert train["label"][nearest].tolist() == [4] * 6
    assert (trained / "samples.png").is_file()


@pytest.mark.parametrize(
    "words,message",
    [
        (["--labels=10"], "10 is out of range; labels are 0 to 9"),
        (["--labels=sevn"], "'sevn' is no label"),
        (["--grid=leading"], "discrete table"),
        (["--solver=ddim", "--solver_args=eta=3"], "eta=3"),
        (["--solver_args=eta=1"], "argument 'eta' is not known"),
    ],
)
def test_mistakes_that_only_the_model_can_tell(capsys, trained, words, message):
    before = contents(trained)
    assert message in one_line(capsys, "sample", f"--workdir={trained}", *words)
    assert contents(trained) == before


def test_evaluate_prints_and_writes_its_figures(capsys, trained):
    words = ["evaluate", f"--workdir={trained}", "--num=20", "--metrics=frechet", "--seed=1"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    result = json.loads((trained / "evaluation.json").read_text())
    row = result["metrics"][0]
    assert [number(row[place]) in said for place in ("value", "floor", "ceiling")] == [True] * 3
    assert (result["settings"]["num"], result["settings"]["seed"]) == (20, 1)
    assert str(trained / "evaluation.json") in said


def test_prepare_lists_sizes_and_licences(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["prepare", "--list", f"--data_dir={tmp_path}", f"--cache={tmp_path}"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    for name in ("cifar10", "mnist", "fashion_mnist", "emoji", "fid", "lpips", "resnet50"):
        assert any(line.split()[:1] == [name] for line in said.splitlines()), name
    assert "139" in said and "MIT" in said and not contents(tmp_path)


def test_train_trains_then_evaluates_then_reports(capsys, trained, monkeypatch, tmp_path):
    from jdiff import train

    (tmp_path / "c.py").write_text(
        "from jdiff.experiment import defaults\n\n\ndef get_config():\n    return defaults()\n"
    )
    seen = []

    def pretend(config, workdir, console, profile):
        seen.append((config.seed, workdir))
        return train.Result(step=5, loss=0.25, images_per_s=10.0, seconds=2.0)

    monkeypatch.setattr(train, "train", pretend)
    words = ["train", f"--config={tmp_path / 'c.py'}", f"--workdir={trained}", "--config.seed=9"]
    assert cli.main([*words, "--no-evaluate"]) == 0
    assert "trained 5 steps in 2 s, loss 0.2500" in capsys.readouterr().out
    assert not (trained / "evaluation.json").exists()
    assert seen == [(9, trained)]

    monkeypatch.setattr(assess, "wanted_metrics", lambda *_: ["frechet"])
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "Fréchet distance" in said
    assert said.rstrip().endswith(str(trained / "report.html"))
    value = json.loads((trained / "evaluation.json").read_text())["metrics"][0]["value"]
    assert number(value) in (trained / "report.html").read_text()


@pytest.mark.parametrize("signum,code", [(2, 130), (15, 75)])
def test_a_stopped_training_has_the_code_of_its_signal(capsys, trained, monkeypatch, signum, code):
    from jdiff import train

    def stopped(*args):
        raise train.Stopped(7, signum)

    monkeypatch.setattr(train, "train", stopped)
    config = trained.parent / "c.py"
    config.write_text("from jdiff.experiment import defaults as get_config\n")
    assert cli.main(["train", f"--config={config}", f"--workdir={trained}"]) == code
    out, err = capsys.readouterr()
    assert out == "" and "step 7" in err and "the same command resumes" in err
