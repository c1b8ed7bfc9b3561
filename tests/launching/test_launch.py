"""jdiff launch as it is typed: dry runs of all documented commands, and options that do not fit."""

import pathlib
import re
import shlex

import pytest

from jdiff import cli, exits
from jdiff.commands import launch

ROOT = pathlib.Path(__file__).parents[2]


def documented():
    """Every `jdiff launch` of the chapter and of --help that names a config."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/pods.md").read_text(), re.S)
    text = "\n".join([*blocks, launch.EXAMPLES]).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if "--config=configs/" in line]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.mark.parametrize("words", documented(), ids=lambda words: words[1])
def test_a_documented_command_can_be_run(words, capsys):
    words = words if "--dry_run" in words else [*words, "--dry_run"]
    assert cli.main(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    submits = {"local": "-m jdiff.cli train", "slurm": "sbatch --parsable ",
               "gke": "kubectl create ", "tpu-vm": "tpu-vm ssh "}  # fmt: skip
    platform = next(w for w in words if w.startswith("--platform=")).partition("=")[2]
    assert submits[platform] in said.splitlines()[-1]


@pytest.mark.parametrize("name", ["launch", "jobs"])
def test_every_option_has_help_and_every_example_parses(name, capsys):
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert all(action.help for action in cli.build().commands.choices[name]._actions)
    lines = text[text.index("examples:") :].replace("\\\n", " ").splitlines()
    examples = [shlex.split(line, comments=True)[1:] for line in lines if "  jdiff " in line]
    assert len(examples) >= 3
    for words in examples:
        assert cli.build().parse_known_args(words)[1] == [], words


def test_all_platforms_are_documented():
    assert len(documented()) >= 8
    assert {w for words in documented() for w in words if w.startswith("--platform=")} == {
        f"--platform={name}" for name in launch.PLATFORMS
    }


DIGITS = ["launch", "--config=configs/digits.py", "--workdir=/shared/run", "--dry_run"]


@pytest.mark.parametrize(
    "words, says",
    [
        (
            ["--platform=slurm", "--topology=2x2"],
            "--topology is for --platform=gke and --platform=tpu-vm",
        ),  # noqa: E501
        (["--platform=local", "--nodes=2"], "--nodes is for --platform=slurm and --platform=gke"),
        (["--platform=gke", "--processes=2"], "--processes is for --platform=local"),
        (["--platform=tpu-vm", "--mount=x"], "gs://BUCKET:/PATH"),
        (["--platform=slurm", "--mount=gs://b:/x"], "--mount is for"),
        (["--platform=aws"], "Allowed: gke, local, slurm, tpu-vm"),
        (["--platform=slurm", "--workdir=gs://b/run"], "needs a path"),
        (["--platform=gke", "--workdir=gs://b"], "gs://BUCKET/PATH"),
        (["--platform=slurm", "--name=My_Run"], "--name=My_Run"),
        (["--platform=slurm", "--config.train.stepz=3"], "steps"),  # before it waits in a queue
        (["--platform=slurm", "--notice=5"], "at least 30"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(words, says, capsys):
    assert cli.main([*DIGITS, *words]) == exits.USER
    assert says in capsys.readouterr().err


def test_a_name_comes_from_the_work_directory(capsys):
    assert cli.main([*DIGITS, "--platform=slurm", "--workdir=/shared/2024 EDM_b"]) == 0
    assert "#SBATCH --job-name=run-2024-edm-b" in capsys.readouterr().out


def test_a_work_directory_without_launches_says_so(tmp_path, capsys):
    assert cli.main(["jobs", f"--workdir={tmp_path}"]) == exits.USER
    assert "nothing was launched" in capsys.readouterr().err


def test_a_launch_of_another_config_is_refused_before_it_is_submitted(tmp_path, capsys):
    workdir = tmp_path / "run"
    (tmp_path / "other.txt").touch()
    words = ["launch", "--platform=slurm", "--config=configs/digits.py"]
    assert cli.main([*words, f"--workdir={tmp_path}"]) == exits.USER
    assert "is not empty" in capsys.readouterr().err
    assert not workdir.exists() and not (tmp_path / "launch").exists()
