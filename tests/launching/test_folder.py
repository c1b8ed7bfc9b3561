"""A sweep's folder: whose it is, and how its points stand by what their runs hold."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest
from made_sweeps import points

from jdiff.errors import UserError
from jdiff.launching import attempts, folder
from jdiff.launching.attempts import Note


def trained(workdir: pathlib.Path, name: str, *, state="finished", step=10, evaluated=True) -> None:
    """The files that a run would have written."""
    run = workdir / name
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text((workdir / "points" / f"{name}.json").read_text())
    (run / "run.json").write_text(json.dumps({"state": state, "wall_seconds": 61.0}))
    lines = [{"step": s, "kind": "train", "loss": 1 / s, "images_per_s": 5.0, "time": s}
             for s in range(1, step + 1)]  # fmt: skip
    lines.append({"step": step, "kind": "evaluation", "frechet": 1.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluated:
        (run / "evaluation.json").write_text(json.dumps({"settings": {"step": step}}))


def contents(workdir: pathlib.Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in workdir.rglob("*") if f.is_file()}


def test_a_sweep_is_read_as_it_was_written(tmp_path):
    sweep = folder.claim(tmp_path / "s", "c.py", points(), command=["sweep", "--x"])
    assert folder.read(tmp_path / "s") == sweep
    assert sweep.points == {"00_seed=0": {"seed": 0}, "01_seed=1": {"seed": 1}}
    assert sweep.steps == {"00_seed=0": 10, "01_seed=1": 10}


def test_points_are_added_and_those_that_are_gone_are_kept(tmp_path):
    folder.claim(tmp_path / "s", "c.py", points(2))
    sweep = folder.claim(tmp_path / "s", "c.py", points(4)[1:])
    assert list(sweep.points) == [f"{i:02}_seed={i}" for i in range(4)]
    assert sweep.current == ("01_seed=1", "02_seed=2", "03_seed=3")


def test_a_changed_config_is_refused_by_name_and_nothing_is_written(tmp_path):
    folder.claim(tmp_path / "s", "c.py", points())
    before = contents(tmp_path / "s")
    with pytest.raises(UserError, match=r"in 00_seed=0, train.batch_size: 128 -> 64") as caught:
        folder.claim(tmp_path / "s", "c.py", points(3, batch_size=64))
    assert "belongs to another config" in str(caught.value)
    assert contents(tmp_path / "s") == before
    # How long a point goes on may change: what was finished then has more to do.
    trained(tmp_path / "s", "00_seed=0")
    assert folder.look(folder.read(tmp_path / "s"))["00_seed=0"].state == "finished"
    longer = folder.claim(tmp_path / "s", "c.py", points(steps=20))
    assert folder.look(longer)["00_seed=0"].state == "stopped"
    shorter = folder.claim(tmp_path / "s", "c.py", points(steps=5))
    assert folder.look(shorter)["00_seed=0"].state == "finished"


def test_folders_of_others_are_refused(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty and is not a sweep"):
        folder.claim(tmp_path / "thesis", "c.py", points())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is the directory of a run"):
        folder.claim(tmp_path / "run", "c.py", points())
    with pytest.raises(UserError, match="is a file"):
        folder.claim(tmp_path / "thesis" / "a.tex", "c.py", points())
    with pytest.raises(UserError, match=r"is not a sweep \(no sweep.json\)"):
        folder.read(tmp_path / "thesis")
    (tmp_path / "thesis" / "sweep.json").write_text('{"points": [{}]}')
    with pytest.raises(UserError, match="sweep.json is damaged"):
        folder.read(tmp_path / "thesis")


@pytest.mark.parametrize(
    "run,note,state",
    [
        (None, None, "waiting"),
        ({}, None, "finished"),
        ({"evaluated": False}, None, "stopped"),
        ({"state": "stopped", "step": 4, "evaluated": False}, None, "stopped"),
        ({"state": "failed", "step": 4, "evaluated": False}, None, "failed"),
        ({"state": "running", "step": 4, "evaluated": False}, None, "stopped"),
        ({"step": 4}, None, "stopped"),  # of fewer steps than are wanted now
        (None, Note(code=2, ended=1.0), "failed"),
        (None, Note(code=0, ended=1.0), "failed"),  # and has left nothing
        ({"step": 4}, Note(code=0, ended=1.0), "stopped"),  # more is wanted of it now
        (None, Note(code=75, ended=1.0), "stopped"),
        (None, Note(code=-15, ended=1.0), "stopped"),
        ({}, Note(code=0, ended=1.0), "finished"),
        ({}, Note(code=1, ended=1.0), "failed"),  # trained and evaluated, but what followed failed
        ({"state": "failed", "evaluated": False}, Note(code=-15, ended=1.0), "stopped"),
        ({"state": "running", "evaluated": False}, Note(host="here", pid=-1), "failed"),
        ({}, Note(host="here", pid=-1), "finished"),
        ({"step": 4, "evaluated": False}, Note(host="there", pid=5), "running"),
        ({"step": 4, "evaluated": False}, Note(host="there", pid=5, started=-1e9), "failed"),
        (None, Note(job="7_0"), "failed"),
        (None, Note(job="7_1"), "queued"),
        (None, Note(job="7_2", host="there", pid=5), "running"),
        ({"evaluated": False}, Note(job="7_1", host="there", pid=5, ended=1.0, code=75), "queued"),
        ({}, Note(job="7_2", host="there", pid=5, ended=1.0, code=0), "finished"),
    ],
)  # fmt: skip
def test_how_a_point_stands(tmp_path, run, note, state):
    sweep = folder.claim(tmp_path / "s", "c.py", points(1))
    name, queue = "00_seed=0", {"7_1": "PENDING", "7_2": "RUNNING"}
    if run is not None:
        trained(tmp_path / "s", name, **run)
    if note is not None:
        host = socket.gethostname() if note.host == "here" else note.host
        pid = gone() if note.pid == -1 else note.pid
        started = note.started + time.time()
        if note.started < 0:  # silent for long
            for path in (tmp_path / "s" / name).iterdir():
                os.utime(path, (started, started))
        note = dataclasses.replace(note, host=host, pid=pid, started=started)
        attempts.write(tmp_path / "s", name, note)
    found = folder.status(sweep, name, queue)
    assert found.state == state
    if run is not None:
        step = run.get("step", 10)
        assert (found.step, found.steps) == (step, 10)
        assert found.loss == 1 / step and found.rate == 5.0 and found.seconds == 61.0


def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_what_a_running_point_does(tmp_path):
    sweep = folder.claim(tmp_path / "s", "c.py", points(1))
    name = "00_seed=0"
    note = Note(socket.gethostname(), os.getpid(), attempts._born(os.getpid()))
    attempts.write(tmp_path / "s", name, note)
    assert folder.status(sweep, name).doing == "starting"
    trained(tmp_path / "s", name, state="running", step=4, evaluated=False)
    assert folder.status(sweep, name).doing == "training"
    trained(tmp_path / "s", name, evaluated=False)
    assert folder.status(sweep, name).doing == "evaluating"
    attempts.write(tmp_path / "s", name, dataclasses.replace(note, born="another's"))
    assert folder.status(sweep, name).state == "failed"


def test_the_last_words_are_those_of_the_last_attempt(tmp_path):
    path = attempts.log_of(tmp_path, "p")
    path.parent.mkdir()
    path.write_text("# attempt 1\nerror: old\n# attempt 2\nwarming up\nerror: new one\n   advice\n")
    assert attempts.last_words(tmp_path, "p", None) == "new one"
    path.write_text(
        "# attempt 1\nerror: old\n# attempt 2\nTraceback:\n  x\nkilled in a dark wood\n"
    )
    assert attempts.last_words(tmp_path, "p", None) == "killed in a dark wood"
    path.write_text("# attempt 1\nerror: old\n# attempt 2\n")
    assert attempts.last_words(tmp_path, "p", Note(code=1)) == "exit code 1"


def test_a_folder_serves_one_command_at_a_time(tmp_path):
    with folder.locked(tmp_path / "s"):
        mine = rf"in use by a `jdiff sweep` \(process {os.getpid()}"
        with pytest.raises(UserError, match=mine), folder.locked(tmp_path / "s"):
            pass
        folder.claim(tmp_path / "s", "c.py", points())  # the lock is no foreign file
    with folder.locked(tmp_path / "s"):
        pass


def test_only_some():
    names = ["00_lr=1_seed=0", "01_lr=1_seed=1", "02_lr=2_seed=0"]
    assert folder.chosen(names, None) == names
    assert folder.chosen(names, "*_seed=0") == [names[0], names[2]]
    assert folder.chosen(names, "01_*") == [names[1]]
    with pytest.raises(UserError, match=r"--only=09_\* means none of the points: 00_lr=1_seed=0"):
        folder.chosen(names, "09_*")
