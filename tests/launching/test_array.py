"""A sweep as a SLURM array: what is submitted, what a task does, and both on a real SLURM."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from made_sweeps import fake as faked
from made_sweeps import sweep as made

from jdiff import cli
from jdiff.errors import UserError
from jdiff.launching import array, attempts, folder
from jdiff.launching.slurm import Options

OPTIONS = Options(
    nodes=1, tasks_per_node=1, gpus_per_node=2, cpus_per_task=4, memory="8G", time="1:30:00",
    partition="gpu", account="me", notice=120, sbatch=("--exclusive", "--mail-type=END"),
)  # fmt: skip

# Writes the submission file where the test finds it; SLURM's programs by name alone.
SBATCH = """\
#!/bin/sh
cp "$1" "$RECORD"
echo Submitted batch job 4711
"""


@pytest.fixture
def submitit():
    return pytest.importorskip(
        "submitit", reason="NOT TESTED: submitit is not installed (pip install 'jdiff[slurm]')"
    )


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """An sbatch that keeps what it is given, alone in PATH with the system's."""
    place = tmp_path / "bin"
    place.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": "#!/bin/sh\n"}.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path / "submitted.sh"))
    return tmp_path / "submitted.sh"


def fake(sweep: folder.Sweep, plan: str) -> dict[str, list[str]]:
    return {name: faked(sweep, name, plan) for name in sweep.points}


@pytest.mark.parametrize("count", [1, 3])
def test_the_dry_run_shows_exactly_what_is_submitted(submitit, programs, tmp_path, count):
    sweep = made(tmp_path / "s", count)
    shown = array.script(sweep.folder, count, OPTIONS, title="lr", parallel=2)
    jobs = array.submit(sweep.folder, fake(sweep, "done"), OPTIONS, title="lr", parallel=2)
    assert programs.read_text() == shown
    lines = shown.splitlines()
    for line in ("--job-name=lr", "--time=90", "--partition=gpu", "--gpus-per-node=2", "--nodes=1",
                 "--cpus-per-task=4", "--mem=8G", "--account=me", "--exclusive", "--mail-type=END",
                 "--requeue", "--signal=USR2@120", "--ntasks-per-node=1"):  # fmt: skip
        assert f"#SBATCH {line}" in lines, line
    assert ("#SBATCH --array=0-2%2" in lines) == (count > 1)
    assert jobs == (["4711"] if count == 1 else ["4711_0", "4711_1", "4711_2"])
    found = folder.look(sweep, {job: "PENDING" for job in jobs})
    assert [(s.state, s.where) for s in found.values()] == [("queued", f"job {j}") for j in jobs]
    # What submitit has pickled are the points, in order.
    pickles = sorted((sweep.folder / "slurm").glob("*_submitted.pkl"))
    tasks = [submitit.core.utils.DelayedSubmission.load(path).function for path in pickles]
    assert [task.name for task in tasks] == list(sweep.points)
    assert [list(task.words) for task in tasks] == list(fake(sweep, "done").values())


@pytest.mark.parametrize(
    "change,message",
    [
        ({"time": None}, "--time is needed with --executor=slurm"),
        ({"time": "2 hours"}, "--time=2 hours"),
        ({"time": "2"}, "120 s before its end"),
        ({"sbatch": ("exclusive",)}, "--sbatch='exclusive'"),
    ],
)
def test_options_that_are_none(submitit, tmp_path, change, message):
    with pytest.raises(UserError) as caught:
        array.script(tmp_path, 2, dataclasses.replace(OPTIONS, **change), title="x")
    assert message in str(caught.value)


def test_without_submitit_the_command_that_installs_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'jdiff\[slurm\]'"):
        array.script(tmp_path, 2, OPTIONS, title="x")


def test_without_slurm_a_login_node_is_asked_for(submitit, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch here; use a login node"):
        array.submit(tmp_path, {"a": ["true"]}, OPTIONS, title="x")
    assert array.queue() is None


def _seen() -> str:
    """What SLURM says, for who reads why a wait was in vain."""
    words = "squeue --all --long; scontrol show jobs; sinfo --Node --long"
    return subprocess.run(words, shell=True, capture_output=True, text=True).stdout


def wait_for(condition, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, _seen()
        time.sleep(0.02)


@pytest.fixture
def on_a_node(monkeypatch):
    """This process is a task of an array; the task's own handling of SIGTERM ends with the test."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_task_tries_again_and_tells_its_last_error(on_a_node, tmp_path):
    sweep = made(tmp_path / "s", 1)
    name = sweep.current[0]
    words = tuple(faked(sweep, name, "fail+die+done"))
    with pytest.raises(RuntimeError, match=r"killed by SIGKILL \(out of memory\?\)"):
        array.Task(sweep.folder, name, words, retries=1)()
    note = attempts.read(sweep.folder, name)
    assert (note.job, note.number, note.code) == ("12_3", 2, -signal.SIGKILL)
    assert array.Task(sweep.folder, name, words)() == 0
    assert folder.look(sweep, {})[name].state == "finished"
    with pytest.raises(RuntimeError, match="config.seed is no seed"):
        array.Task(sweep.folder, name, tuple(faked(sweep, name, "mistake")), retries=5)()
    assert attempts.read(sweep.folder, name).number == 1


def test_a_task_that_is_told_to_end_saves_and_ends_with_the_code_that_requeues(on_a_node, tmp_path):
    sweep = made(tmp_path / "s", 1)
    name = sweep.current[0]

    def preempt():
        wait_for((sweep.folder / name / "ready").exists)
        os.kill(os.getpid(), signal.SIGTERM)

    slurm = threading.Thread(target=preempt)
    slurm.start()
    with pytest.raises(SystemExit) as ended:
        array.Task(sweep.folder, name, tuple(faked(sweep, name, "wait")), retries=3)()
    slurm.join()
    assert ended.value.code == 75
    note = attempts.read(sweep.folder, name)
    assert (note.code, note.number) == (75, 1)
    assert folder.look(sweep, {})[name].state == "stopped"


@pytest.fixture
def cancelled(slurm):
    """A list of jobs that are cancelled when the test ends, however it does."""
    jobs: list[str] = []
    yield jobs
    if jobs:
        subprocess.run(["scancel", *jobs], check=False)


def test_on_slurm_the_warning_before_the_limit_saves_and_requeues(cancelled, submitit, tmp_path):
    sweep = made(tmp_path / "s", 2)
    options = Options(time="10", notice=60)
    jobs = array.submit(sweep.folder, fake(sweep, "wait+done"), options, title="warned")
    cancelled += jobs
    names = list(sweep.points)
    wait_for(lambda: all((sweep.folder / name / "ready").exists() for name in names))
    found = folder.look(sweep, array.queue())
    assert [(s.state, s.where) for s in found.values()] == [
        ("running", f"job {job}") for job in jobs
    ]
    for job in jobs:  # what SLURM does by itself before the limit
        subprocess.run(["scancel", "--signal=USR2", job], check=True)
    state = lambda: {s.state for s in folder.look(sweep, array.queue()).values()}
    try:
        wait_for(lambda: state() == {"finished"}, 150)
    except AssertionError:
        waiting = [job for job in jobs if (array.queue() or {}).get(job) == "PENDING"]
        if not waiting:
            raise
        pytest.skip(f"NOT PROVEN: SLURM has {waiting} in its queue and starts none: {_seen()}")
    tries = [int((sweep.folder / name / "tries").read_text()) for name in names]
    assert tries == [2, 2]  # once each before and after


CONFIG = """\
from jdiff.experiment import defaults


def get_config():
    c = defaults()
    c.model.update({"name": "dit", "width": 16, "depth": 1, "heads": 2})
    c.sampling.grid.steps = 2
    c.train.update({"batch_size": 16, "steps": 4, "sample_every": 4, "checkpoint_every": 2})
    return c


def sweep():
    return [{"optimizer.learning_rate": 1e-3}, {"optimizer.learning_rate": 2e-3}]
"""


def test_on_slurm_a_sweep_of_two_points_trains(cancelled, submitit, tmp_path, capsys):
    path, workdir = tmp_path / "c.py", tmp_path / "s"
    path.write_text(CONFIG)
    words = ["sweep", f"--config={path}", f"--workdir={workdir}", "--executor=slurm",
             "--time=10", "--no-evaluate"]  # fmt: skip
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "submitted 2 of 2 points" in said
    # The same command submits nothing twice.
    assert cli.main(words) == 0
    assert "nothing to submit" in capsys.readouterr().out
    sweep = folder.read(workdir)
    cancelled += [attempts.read(workdir, name).job for name in sweep.points]
    active = lambda: [s for s in folder.look(sweep, array.queue()).values()
                      if s.state in ("queued", "running")]  # fmt: skip
    wait_for(lambda: not active(), seconds=400)
    found = folder.look(sweep, {})
    logs = {name: attempts.log_of(workdir, name).read_text() for name in found}
    assert [s.state for s in found.values()] == ["finished"] * 2, logs
    assert [s.step for s in found.values()] == [4, 4]
    rates = [json.loads((workdir / name / "config.json").read_text())["optimizer"]["learning_rate"]
             for name in found]  # fmt: skip
    assert rates == [1e-3, 2e-3]
    assert all((workdir / name / "report.html").is_file() for name in found)
    assert cli.main(words) == 0
    assert "nothing to submit: every point is finished" in capsys.readouterr().out
    assert pathlib.Path(workdir / "slurm").is_dir()
