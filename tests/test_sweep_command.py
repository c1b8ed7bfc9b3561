"""jdiff sweep through `main(argv)`: a small script in the place of training, and once for real."""

import io
import json
import os
import pathlib
import re
import signal

import pytest
from made_sweeps import fake
from rich.console import Console

from jdiff import cli
from jdiff.commands import live
from jdiff.launching import attempts, folder
from jdiff.launching.folder import Status

CONFIG = """\
from jdiff.experiment import defaults
from jdiff.launching.points import product


def get_config():
    c = defaults()
    c.model.update({"name": "dit", "width": 16, "depth": 1, "heads": 2})
    c.sampling.grid.steps = 2
    c.train.update({"batch_size": 16, "steps": 10, "checkpoint_every": 2, "log_every": 2})
    return c


def sweep():
    return product({"optimizer.learning_rate": (1e-3, 2e-3), "seed": (0, 1)})
"""


@pytest.fixture
def file(tmp_path) -> pathlib.Path:
    path = tmp_path / "c.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def pretend(monkeypatch):
    """plans: {number of the point: what it does}; see fake_point.py."""
    plans: dict[int, str] = {}

    def command(workdir, name, *, evaluate=True):
        return fake(folder.read(workdir), name, plans.get(int(name[:2]), "done"))

    monkeypatch.setattr(attempts, "command", command)
    return plans


def words(file: pathlib.Path, *more: str) -> list[str]:
    return ["sweep", f"--config={file}", f"--workdir={file.parent / 's'}", *more]


def test_list_and_dry_run_start_and_write_nothing(file, capsys):
    assert cli.main(words(file, "--list")) == 0
    said = capsys.readouterr().out
    names = ["00_lr=0.001_seed=0", "01_lr=0.001_seed=1", "02_lr=0.002_seed=0", "03_lr=0.002_seed=1"]
    assert re.findall(r"^(\d\d_\S+) +waiting +0/10", said, re.M) == names
    assert "4 points: 4 waiting" in said
    assert cli.main(words(file, "--dry-run", "--only=*_seed=1", "--parallel=3")) == 0
    said = capsys.readouterr().out
    assert "2 processes, 3 at a time" in said
    lines = [line for line in said.splitlines() if "jdiff.cli train" in line]
    assert [line.rpartition("/")[2] for line in lines] == [names[1], names[3]]
    assert list(file.parent.iterdir()) == [file]


def test_a_sweep_runs_and_the_same_command_does_nothing_more(file, pretend, capsys):
    pretend[1] = "fail+done"
    assert cli.main(words(file, "--parallel=2")) == 1
    out, err = capsys.readouterr()
    assert "failed   01_lr=0.001_seed=1: OSError: the disk is on fire" in out
    assert "1 of 4 points are not finished" in err and "01_lr=0.001_seed=1" in err
    assert cli.main(words(file)) == 0
    said = capsys.readouterr().out
    assert "4 points: 4 finished" in said and "jdiff report --workdir=" in said
    before = {p: p.read_bytes() for p in (file.parent / "s").glob("*/*") if p.is_file()}
    assert cli.main(words(file, "--retries=3")) == 0
    after = {p: p.read_bytes() for p in (file.parent / "s").glob("*/*") if p.is_file()}
    assert after == before


def test_points_of_a_longer_sweep_are_added(file, pretend, capsys):
    assert cli.main(words(file, "--only=*_seed=0")) == 0
    assert "4 points: 2 waiting, 2 finished" in capsys.readouterr().out
    file.write_text(CONFIG.replace("(1e-3, 2e-3)", "(5e-4, 1e-3, 2e-3)"))
    assert cli.main(words(file)) == 0
    found = json.loads((file.parent / "s" / "sweep.json").read_text())["points"]
    assert [row["name"] for row in found[4:]] == ["04_lr=0.0005_seed=0", "05_lr=0.0005_seed=1"]
    assert {row["state"] for row in found} == {"finished"}


def test_a_changed_config_is_refused(file, pretend, capsys):
    assert cli.main(words(file, "--only=00_*")) == 0
    capsys.readouterr()
    file.write_text(CONFIG.replace('"width": 16', '"width": 32'))
    assert cli.main(words(file)) == 2
    err = capsys.readouterr().err
    assert "belongs to another config: in 00_lr=0.001_seed=0, model.width: 16 -> 32" in err
    assert cli.main(words(file, "--config.model.width=16")) == 0  # for all points, on the line


def test_what_points_are_given_is_what_the_folder_holds(file, pretend):
    """A config file that is edited while its sweep goes on changes no point of it."""
    assert cli.main(words(file, "--config.train.batch_size=32", "--only=03_*")) == 0
    text = (file.parent / "s" / "points" / "03_lr=0.002_seed=1.json").read_text()
    held = json.loads(text)
    assert (held["train"]["batch_size"], held["seed"]) == (32, 1)
    assert held["optimizer"]["learning_rate"] == 2e-3


def test_sigterm_ends_with_the_code_that_requeues(file, pretend, capsys, monkeypatch):
    pretend[0] = "wait+done"
    status, sent = folder.status, []

    def seen(sweep, name, queue=None):
        if not sent and (sweep.folder / name / "ready").exists():
            sent.append(name)
            os.kill(os.getpid(), signal.SIGTERM)
        return status(sweep, name, queue)

    monkeypatch.setattr(folder, "status", seen)
    assert cli.main(words(file)) == 75
    out, err = capsys.readouterr()
    assert "stopped by SIGTERM; the same command resumes." in err
    assert "4 points: 3 waiting, 1 stopped" in out
    assert cli.main(words(file)) == 0


@pytest.mark.parametrize(
    "more,message",
    [
        (["--only=9*"], "--only=9* means none of the points"),
        (["--sweep=large"], "no function sweep_large()"),
        (["--executor=slrum"], "'slrum' is not known. Did you mean 'slurm'?"),
        (["--parallel=0"], "at least 1 is needed"),
        (["--config.train.setps=3"], "config.train.setps is not known"),
    ],
)
def test_mistakes_write_nothing(file, capsys, more, message):
    assert cli.main(words(file, *more)) == 2
    out, err = capsys.readouterr()
    assert message in err and out == ""
    assert list(file.parent.iterdir()) == [file]


def shown(states: dict[str, Status], most: int | None = None) -> str:
    console = Console(width=140, file=io.StringIO(), color_system=None)
    console.print(live.rows(states, most))
    return console.file.getvalue()


def test_of_many_points_those_that_run_or_failed_are_shown():
    states = {f"{i:02}": Status(f"{i:02}", "finished", step=9, steps=9) for i in range(50)}
    states["40"] = Status("40", "running", "training", 4_000, 9_000, 0.25, 1234.0, 65.0, attempt=2)
    states["45"] = Status("45", "failed", error="no space left", steps=9)
    text = shown(states, 3)
    rows = [line.split()[0] for line in text.splitlines()[1:]]
    assert rows == ["00", "40", "45"]
    assert "training #2" in text and "4,000/9,000" in text and "1 min 05 s" in text
    assert "0.250" in text and "1,234" in text and "no space left" in text
    assert live.summary(states) == "50 points: 1 running, 1 failed, 48 finished"


def test_the_live_table_follows_the_points(tmp_path, file, pretend):
    assert cli.main(words(file, "--only=00_*")) == 0
    sweep = folder.read(file.parent / "s")
    console = Console(file=io.StringIO(), force_terminal=True, width=140, height=30)
    with live.table(console, sweep) as tell:
        tell(folder.look(sweep))
    text = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", console.file.getvalue())
    text = " ".join(text.split())  # lines are broken where the folder's name is long
    assert "00_lr=0.001_seed=0" in text and "10/10" in text
    assert "4 points: 3 waiting, 1 finished" in text and "Ctrl-C saves and stops" in text


def test_two_points_train_and_are_compared(file, capsys):
    few = ["--config.train.steps=4", "--only=0[02]_*", "--parallel=2", "--no-evaluate"]
    assert cli.main(words(file, *few)) == 0, capsys.readouterr()
    workdir = file.parent / "s"
    found = folder.look(folder.read(workdir))
    done = [s for s in found.values() if s.state == "finished"]
    assert [s.name for s in done] == ["00_lr=0.001_seed=0", "02_lr=0.002_seed=0"]
    assert [s.step for s in done] == [4, 4] and done[0].loss != done[1].loss
    for name, rate in (("00_lr=0.001_seed=0", 1e-3), ("02_lr=0.002_seed=0", 2e-3)):
        lines = map(json.loads, (workdir / name / "metrics.jsonl").read_text().splitlines())
        rates = [line["learning_rate"] for line in lines if line["kind"] == "train"]
        assert rates == [pytest.approx(rate)] * 2
    assert cli.main(["report", f"--workdir={workdir}"]) == 0
    assert (workdir / "report.html").is_file() and (workdir / "report.csv").is_file()
