"""The command line through `main(argv)`; nothing here trains."""

import json
import pathlib
import shlex
import subprocess
import sys
import types

import numpy as np
import pytest

from jdiff import cli, generate, runs
from jdiff.commands import labels, options, sample, timing
from jdiff.config import to_json
from jdiff.errors import UserError
from jdiff.experiment import defaults


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    """A run directory without a checkpoint."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(to_json(defaults()))
    return folder


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def one_line(capsys, code: int, *words: str) -> str:
    """Runs a command that fails; returns its one line on stderr."""
    assert cli.main(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "words,message",
    [
        (["trian"], "command 'trian' is not known. Did you mean 'train'?"),
        (["train", "--wrkdir=x", "--config=y"], "--workdir"),
        (
            ["sample", "--workdir=x", "--stpes=3"],
            "option --stpes is not known. Did you mean --step",
        ),
        (["sample", "--workdir=x", "more"], "argument more is not known"),
        (["sample"], "--workdir"),
        (["sample", "--workdir=x", "--steps=0"], "--steps: 0 given; at least 1 is needed"),
        (["sample", "--workdir=x", "--steps=ten"], "'ten' given; a whole number is needed"),
        (["sample", "--workdir=x", "--num", "-1"], "--num: -1 given; at least 1"),
        (["sample", "--workdir=x", "--rescale=2"], "a finite number from 0 to 1 is needed"),
        (["sample", "--workdir=x", "--guidance_scale=nan"], "a finite number is needed"),
        (["sample", "--workdir=x", "--interval=3,-3"], "the first number must be the smaller"),
        (["sample", "--workdir=x", "--interval=3"], "two numbers are needed"),
        (["sample", "--workdir=x", "--solver_args=eta"], "name=number is needed, as eta=0.5"),
        (["sample", "--workdir=x", "--config.seed=1"], "`jdiff sample` takes no config fields"),
        (["sample", "--workdir=nowhere"], "nowhere is not a run directory"),
        (["evaluate", "--workdir=nowhere"], "nowhere is not a run directory"),
        (["report", "--workdir=nowhere"], "nowhere does not exist"),
        (["train", "--config=configs/digts.py", "--workdir=x"], "configs/digts.py does not exist"),
        (["prepare"], "name what to prepare"),
        (["prepare", "cifar"], "'cifar' is not known. Did you mean 'cifar10'?"),
        (["prepare", "mnist", "--via=magic"], "via 'magic' is not known"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in one_line(capsys, 2, *words)
    assert not contents(tmp_path)


@pytest.mark.parametrize(
    "words,message",
    [
        (["--solver=huen"], "--solver 'huen' is not known. Did you mean 'heun'?"),
        (["--grid=karas"], "--grid 'karas' is not known. Did you mean 'karras'?"),
        (["--ema=emma"], "ema 'emma' is not known. Did you mean 'ema'?"),
        (["--out=missing/x.png"], "the folder missing does not exist"),
        (["--out=x.jpg"], "the name must end in .png"),
        (["--npz=x.zip"], "the name must end in .npz"),
    ],
)
def test_mistakes_of_sample_leave_the_run_alone(capsys, monkeypatch, run, words, message):
    monkeypatch.chdir(run.parent)
    before = contents(run)
    assert message in one_line(capsys, 2, "sample", f"--workdir={run}", *words)
    assert contents(run) == before


def test_a_run_without_a_checkpoint(capsys, run):
    data = {"name": "digits", "split": "train", "shape": [8, 8, 1], "num_classes": 10,
            "label_names": list("0123456789"), "size": 1437}  # fmt: skip
    (run / "run.json").write_text(json.dumps({"data": data}))
    assert "no complete checkpoint" in one_line(capsys, 2, "sample", f"--workdir={run}")


def test_a_damaged_config(capsys, run):
    (run / "config.json").write_text('{"seed": 0')
    assert "config.json cannot be read" in one_line(capsys, 2, "report", f"--workdir={run}")


def test_a_run_that_never_began(capsys, run):
    assert "training never began" in one_line(capsys, 2, "sample", f"--workdir={run}")


def test_the_traceback_is_shown_on_request(run):
    with pytest.raises(UserError, match="training never began"):
        cli.main(["sample", f"--workdir={run}", "--traceback"])


def test_what_should_not_happen_has_code_1(capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("lost")

    monkeypatch.setattr("jdiff.report.write", broken)
    assert cli.main(["report", "--workdir=x"]) == 1
    err = capsys.readouterr().err
    assert "KeyError: 'lost'" in err and "--traceback" in err and "Traceback" not in err


def test_ctrl_c_is_one_line(capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("jdiff.report.write", interrupted)
    assert cli.main(["report", "--workdir=x"]) == 130
    assert capsys.readouterr().err == "interrupted.\n"


def test_the_report_command(capsys, run, tmp_path):
    assert cli.main(["report", f"--workdir={run}"]) == 0
    assert (run / "report.html").is_file()
    assert str(run / "report.html") in capsys.readouterr().out
    assert cli.main(["report", "--workdir", str(run), "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").is_file()


NAMED = ["train", "sample", "generate", "evaluate", "report", "prepare", "sweep", "encode"]


@pytest.mark.parametrize("name", NAMED)
def test_every_command_explains_itself(capsys, name):
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "examples:" in text and f"jdiff {name}" in text
    parser = cli.build().commands.choices[name]
    for action in parser._actions:
        assert action.help, action.option_strings
    # The examples are commands that parse.
    joined = text[text.index("examples:") :].replace("\\\n", " ")
    for line in joined.splitlines():
        if line.split()[:2] == ["jdiff", name]:
            words = shlex.split(line, comments=True)
            rest, _ = cli.split_overrides(words[1:])
            assert cli.build().parse_known_args(rest)[1] == [], line


def test_help_and_version_of_the_program(capsys):
    assert cli.main(["--help"]) == 0
    help_text = capsys.readouterr().out
    for code in ("0 ", "1 ", "2 ", "130"):
        assert f"\n  {code}" in help_text
    assert cli.main([]) == 0
    assert capsys.readouterr().out == help_text
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jdiff 0")


def test_as_a_process():
    """Exit codes reach the shell, and help loads nothing beyond the ground floor."""
    code = (
        "import sys; from jdiff.cli import main; code = main(['sample', '--help']); "
        "heavy = {'flax', 'optax', 'orbax', 'matplotlib', 'sklearn', 'tensorflow_datasets', "
        "'grain', 'tensorboardX', 'PIL', 'ml_collections', 'rich'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    wrong = subprocess.run(
        [sys.executable, "-m", "jdiff.cli", "smaple"], capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert wrong.stdout == "" and "Did you mean 'sample'?" in wrong.stderr


def test_overrides_are_told_from_options():
    words = ["train", "--config=a.py", "--config.x=1", "--config.y", "-2", "--workdir", "w",
             "--noconfig.z", "--config.q", "--no-evaluate"]  # fmt: skip
    rest, overrides = cli.split_overrides(words)
    assert rest == ["train", "--config=a.py", "--workdir", "w", "--no-evaluate"]
    assert overrides == ["--config.x=1", "--config.y", "-2", "--noconfig.z", "--config.q"]


def test_spelling_of_options():
    parser = cli.build()
    words = parser.spell(
        ["sample", "--guidance-scale=2", "--interval", "-3,5", "--npz", "a.npz", "--no_evaluate"]
    )
    assert words == ["sample", "--guidance_scale=2", "--interval=-3,5", "--npz", "a.npz",
                     "--no-evaluate"]  # fmt: skip


NAMES = ("airplane", "automobile", "bird", "cat")


@pytest.mark.parametrize(
    "text,expected",
    [
        ("all", [0, 1, 2, 3]),
        ("0", [0]),
        ("2,0", [2, 0]),
        ("1-3", [1, 2, 3]),
        ("cat, 0-1,BIRD", [3, 0, 1, 2]),
        ("1,1", [1, 1]),
    ],
)
def test_labels(text, expected):
    assert labels.parse(text, 4, NAMES) == expected


@pytest.mark.parametrize(
    "text,message",
    [
        ("4", "4 is out of range; labels are 0 to 3"),
        ("-1", "-1 is out of range"),
        ("0-9", "9 is out of range"),
        ("3-1", "the range 3-1 is empty; write 1-3"),
        ("cot", "'cot' is no label. Did you mean 'cat'?"),
        ("", "'' is no label"),
    ],
)
def test_labels_that_are_none(text, message):
    with pytest.raises(UserError) as caught:
        labels.parse(text, 4, NAMES)
    assert message in str(caught.value)


def test_labels_of_a_model_without_labels():
    with pytest.raises(UserError, match="trained without labels"):
        labels.parse("0", 0)


def chosen(*words: str, threshold=None) -> dict:
    parser = cli.build()
    args = parser.parse_args(parser.spell(["sample", "--workdir=x", *words]))
    config = defaults()
    config.sampling.solver = {"name": "ddim", "eta": 0.5}
    config.sampling.grid = {"name": "karras", "steps": 18, "rho": 5.0}
    config.sampling.threshold = threshold
    return options.choices(args, config)


def test_choices_replace_what_is_named_and_keep_the_rest():
    assert chosen() == {"grid": {"name": "karras", "steps": 18, "rho": 5.0}}
    assert chosen("--steps=9")["grid"] == {"name": "karras", "steps": 9, "rho": 5.0}
    assert chosen("--grid=uniform")["grid"] == {"name": "uniform", "steps": 18}
    assert chosen("--solver=heun")["solver"] == {"name": "heun"}
    assert chosen("--solver=ddim")["solver"] == {"name": "ddim", "eta": 0.5}
    assert chosen("--solver_args=eta=1")["solver"] == {"name": "ddim", "eta": 1}
    assert chosen("--guidance_scale=3", "--interval", "-3,5", "--rescale")["guidance"] == {
        "scale": 3.0, "interval": (-3.0, 5.0), "rescale": 0.7
    }  # fmt: skip
    assert chosen("--interval=none")["guidance"] == {"interval": None}


def test_thresholds_by_name_and_numbers():
    of = lambda *words, before: chosen(*words, threshold=before)["threshold"]
    section = {"name": "dynamic", "quantile": 0.9}
    assert "threshold" not in chosen(threshold="static")
    assert of("--threshold=dynamic", before=None) == {"name": "dynamic"}
    assert of("--threshold=none", before="static") is None
    assert of("--threshold_args=limit=2", before="static") == {"name": "static", "limit": 2}
    assert of("--threshold_args=limit=2", before=section) == section | {"limit": 2}
    assert of("--threshold=static", before=section) == {"name": "static"}
    with pytest.raises(UserError, match="there is no threshold"):
        of("--threshold_args=limit=2", before=None)


def test_help_names_every_solver_grid_and_metric():
    import re

    from jdiff import grids, solvers
    from jdiff.commands import evaluate
    from jdiff.evaluation.evaluate import METRICS

    words = lambda text: set(re.findall(r"[a-z_0-9]+", text))
    assert set(solvers.BY_NAME) <= words(options.SOLVERS)
    assert set(grids.BY_NAME) <= words(options.GRIDS)
    assert set(METRICS) <= words(evaluate.EXAMPLES)


def test_the_npz_file(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
    given = np.asarray([0, 1, 0, 1], np.int32)
    sample.write_npz(tmp_path / "x.npz", images, given, 7, {"solver": {"name": "heun"}})
    assert [f.name for f in tmp_path.iterdir()] == ["x.npz"]
    with np.load(tmp_path / "x.npz") as file:
        np.testing.assert_array_equal(file["images"], images)
        np.testing.assert_array_equal(file["labels"], given)
        np.testing.assert_array_equal(file["ids"], np.arange(4))
        assert file["seed"] == 7
        assert json.loads(str(file["settings"])) == {"solver": {"name": "heun"}}


def test_compilation_inside_compilation_counts_once():
    clock = timing.Clock([(0.0, 3.0), (1.0, 2.0), (2.5, 4.0), (10.0, 11.0)])
    assert clock.seconds == 5.0


def test_the_clock_sees_compilation_and_nothing_else():
    import jax

    with timing.compile_clock() as clock:
        fresh = jax.jit(lambda x: x * 3.25 + 1.0)
        fresh(np.ones(3, np.float32))
        compiled = clock.seconds
        fresh(np.ones(3, np.float32))
    assert compiled > 0 and clock.seconds == compiled
    jax.jit(lambda x: x * 4.25)(np.ones(3, np.float32))
    assert clock.seconds == compiled


def test_settings_are_those_in_force(run):
    opened = types.SimpleNamespace(config=runs.read_config(run), step=3, ema="ema")
    settings = generate.settings(opened, {"solver": {"name": "ddim"}, "guidance": {"scale": 3.0}})
    assert settings["solver"] == {"name": "ddim"}
    assert settings["guidance"] == {"scale": 3.0, "interval": None, "rescale": None}
    assert settings["grid"] == {"name": "karras", "steps": 18}
    assert (settings["step"], settings["ema"]) == (3, "ema")
