"""Batch scripts on a real SLURM: what is requeued and what is not; a training of two processes."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from jdiff import exits
from jdiff.errors import UserError
from jdiff.launching import jobs, programs, slurm
from jdiff.launching.task import Task

# In place of the training: says which start this is, and ends as MODE and the start ask.
STAND_IN = """\
#!/usr/bin/env bash
echo "task $SLURM_PROCID of $SLURM_NTASKS, start ${SLURM_RESTART_COUNT:-0}"
case $MODE-${SLURM_RESTART_COUNT:-0} in
  saved-0 | saved-1) exit 75 ;;
  mistake-*) exit 2 ;;
  crash-*) exit 1 ;;
  wait-0)
    trap 'echo "task $SLURM_PROCID saves"; exit 75' TERM
    touch "ready-$SLURM_PROCID"
    while :; do sleep 0.2; done ;;
esac
"""


@pytest.fixture
def start(slurm, tmp_path, monkeypatch):
    """start(mode, retries) submits a job of two nodes; it is cancelled when the test ends."""
    program = tmp_path / "stand-in"
    program.write_text(STAND_IN)
    program.chmod(0o755)
    started = []

    def submit(mode, retries=0, **options):
        monkeypatch.setenv("MODE", mode)
        what = Task("stand-in", str(tmp_path / "run"), "{}", cwd=str(tmp_path),
                    python=str(program), retries=retries)  # fmt: skip
        options = {"nodes": 2, "time": "10", "cpus_per_task": 1, **options}
        plan = module.plan(what, module.Options(**options), tmp_path / "launch" / mode)
        started.append(module.submit(plan, "stand-in", what.workdir))
        return started[-1]

    yield submit
    for job in started:
        programs.call(["scancel", job.id])


module = slurm  # the fixture of this name hides it in tests


def until(condition, seconds=180.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.3)
    return pytest.fail(f"waited {seconds} s in vain")


def ended(job):
    return until(lambda: (s := module.standing(job)).state not in jobs.GOES_ON and s)


def starts(job):
    """The starts that task 0 had, by the log."""
    found = re.findall(r"^task 0 of 2, start (\d)$", module.tail(job, 1000), re.M)
    return [int(start) for start in found]


def test_a_run_that_saved_starts_again_however_often_and_a_mistake_and_a_crash_do_not(start):
    saved, mistake, crash = start("saved"), start("mistake", 3), start("crash", 1)
    # Code 2 would come again: not repeated although three retries are left.
    assert ended(mistake) == ("failed", "SLURM: FAILED exit code 2")
    assert starts(mistake) == [0]
    # Code 1 costs a retry, and there was one.
    assert ended(crash) == ("failed", "SLURM: FAILED exit code 1 restarted 1x")
    assert starts(crash) == [0, 1]
    # Code 75 costs none: it went on twice without any.
    assert ended(saved) == ("finished", "SLURM: COMPLETED restarted 2x")
    assert starts(saved) == [0, 1, 2]
    assert "task 1 of 2, start 2" in module.tail(saved, 1000)  # both nodes, one log


def test_sigterm_reaches_the_tasks_and_the_job_is_queued_again(start, tmp_path):
    job = start("wait")
    until(lambda: (tmp_path / "ready-0").exists() and (tmp_path / "ready-1").exists())
    assert module.standing(job).state == "running"
    # As SLURM itself does --notice seconds before the time limit: to the tasks, not to the script.
    programs.call(["scancel", "--signal=TERM", job.id])
    assert ended(job) == ("finished", "SLURM: COMPLETED restarted 1x")
    assert starts(job) == [0, 1] and "task 0 saves" in module.tail(job, 1000)


def test_a_job_that_another_displaces_saves_and_comes_back(start, tmp_path):
    job = start("wait", partition="low", cpus_per_task=5)  # of 8
    until(lambda: (tmp_path / "ready-0").exists() and (tmp_path / "ready-1").exists())
    words = ["--cpus-per-task=5", "--nodes=2", "--output=/dev/null", "--wrap=true"]
    other = programs.call(["sbatch", "--parsable", *words])
    try:
        stand = ended(job)
    finally:
        programs.call(["scancel", other.strip()])
    assert stand.state == "finished" and "restarted" in stand.detail
    assert "task 0 saves" in module.tail(job, 1000) and starts(job)[0] == 0 and starts(job)[-1] > 0


def test_a_cancelled_job_saves_and_is_not_queued_again(start, tmp_path):
    job = start("wait")
    until(lambda: (tmp_path / "ready-0").exists() and (tmp_path / "ready-1").exists())
    assert "save first" in module.cancel(job)
    assert ended(job) == ("stopped", "SLURM: FAILED exit code 75")
    assert starts(job) == [0] and "task 0 saves" in module.tail(job, 1000)


def jdiff(*words, **environ):
    return subprocess.run(
        [sys.executable, "-m", "jdiff.cli", *words], env=os.environ | environ, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


def launch(workdir, steps):
    """A training of two processes with two simulated devices each, submitted; its job."""
    small = {
        "model.width": 32, "model.depth": 1, "model.heads": 2, "train.batch_size": 8,
        "train.steps": steps, "train.log_every": 1, "train.checkpoint_every": 10**6,
        "train.sample_every": 10**6, "sampling.grid.steps": 2, "optimizer.warmup": 1,
    }  # fmt: skip
    done = jdiff(
        "launch", "--platform=slurm", "--nodes=2", "--config=configs/digits_dit_flow.py",
        f"--workdir={workdir}", "--no-evaluate", "--time=20",
        *(f"--config.{name}={value}" for name, value in small.items()),
        JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return jobs.find(str(workdir))[-1]


def steps_of(workdir):
    try:
        text = (workdir / "metrics.jsonl").read_text()
    except OSError:
        return []
    rows = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [row["step"] for row in rows if "loss" in row]


def test_two_processes_train_on_two_nodes_and_survive_the_time_limit(slurm, tmp_path):
    workdir = tmp_path / "run"
    first = launch(workdir, 10**6)
    try:
        until(lambda: steps_of(workdir) or module.standing(first).state == "failed", 400)
        assert steps_of(workdir), module.tail(first, 40)
        second = jdiff("launch", "--platform=slurm", "--config=configs/digits_dit_flow.py",
                       f"--workdir={workdir}")  # fmt: skip
        assert second.returncode == exits.USER and "is running" in second.stderr
        # What SLURM does --notice seconds before the time limit.
        programs.call(["scancel", "--signal=TERM", first.id])
        until(lambda: "restarted 1x" in module.standing(first).detail, 200)
    finally:
        programs.call(["scancel", first.id])
    assert ended(first).state == "cancelled"
    log = module.tail(first, 1000)
    assert "ended with exit code 75" in log
    saved = int(re.search(r"stopped by SIGTERM at step (\d+), saved", log).group(1))
    last = launch(workdir, saved + 3)  # the same run, to its end
    try:
        stand = until(lambda: (s := module.standing(last)).state not in jobs.GOES_ON and s, 400)
    finally:
        programs.call(["scancel", last.id])
    assert stand.state == "finished", module.tail(last, 40)
    # One process wrote, every step once, from 1 to the end.
    assert steps_of(workdir) == list(range(1, saved + 4))
    described = json.loads((workdir / "run.json").read_text())
    assert described["state"] == "finished" and len(described["devices"]) == 4
    shown = jdiff("jobs", f"--workdir={workdir}")
    assert f"cancelled  slurm {first.id} (run)" in shown.stdout
    assert f"finished   slurm {last.id} (run)" in shown.stdout
    assert f"step {saved + 3:,} of {saved + 3:,}" in shown.stdout
    assert f"trained {saved + 3:,} steps" in shown.stdout and shown.returncode == 0


# What needs no SLURM.

LAUNCH = pathlib.Path("/shared/run/launch/name-1")


def script(**options):
    what = Task("name", "/shared/run", "{}", cwd="/code", python="python", setup=("module load a",))
    options = {"nodes": 4, "time": "1-00:00:00", **options}
    return module.script(what, module.Options(**options), folder=LAUNCH)


def test_the_script_says_what_was_asked_and_nothing_else():
    text = script(gpus_per_node=8, partition="gpu", cpus_per_task=12, sbatch=("--exclusive",))
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.M))
    assert asked == {
        "job-name": "name", "nodes": "4", "ntasks-per-node": "1", "gpus-per-node": "8",
        "cpus-per-task": "12", "time": "1-00:00:00", "partition": "gpu",
        "output": "/shared/run/launch/name-1/%j.log", "open-mode": "append",
        "signal": "TERM@300", "requeue": "", "exclusive": "",
    }  # fmt: skip
    assert text.index("cd /code") < text.index("module load a") < text.index("\nsrun ")
    assert "--cpus-per-task=12 python -m jdiff.cli train" in text
    assert "account" not in script()
    checked = subprocess.run(["bash", "-n"], input=text, text=True)
    assert checked.returncode == 0


@pytest.mark.parametrize(
    "text, limit",
    [("30", 1800), ("5:30", 330), ("1:00:00", 3600), ("2-0", 172800), ("1-2:30", 95400),
     ("1-00:00:01", 86401)],
)  # fmt: skip
def test_time_limits_are_read_as_sbatch_reads_them(text, limit):
    assert module.seconds(text) == limit


@pytest.mark.parametrize(
    "options, says",
    [
        ({"time": "4"}, "--time=4 is 240 s, and --notice=300"),
        ({"time": "soon"}, "HH:MM:SS"),
        ({"gpus_per_node": 8, "tasks_per_node": 3}, "--tasks_per_node=3 with --gpus=8"),
        ({"sbatch": ("--signal=USR1@10",)}, "set by the launcher"),
        ({"sbatch": ("exclusive",)}, "long options"),
        ({"nodes": 0}, "--nodes=0"),
    ],
)
def test_what_cannot_be_is_refused(options, says, tmp_path):
    with pytest.raises(UserError, match=re.escape(says)):
        module.plan(Task("a", "/a", "{}"), module.Options(**options), tmp_path)


def test_a_work_directory_that_other_nodes_may_not_see_gets_a_warning(tmp_path):
    from jdiff.launching.task import visible

    mounts = "/dev/sda / ext4 rw 0 0\nhome:/x /home nfs4 rw 0 0\ntmpfs /home/tmp tmpfs rw 0 0\n"
    assert visible("/home/me/run", 2, mounts) == ()
    assert visible("/data/run", 1, mounts) == ()
    assert "lies on ext4" in visible("/data/run", 2, mounts)[0]
    assert "lies on tmpfs" in visible("/home/tmp/run", 2, mounts)[0]


@pytest.mark.parametrize(
    "said, stand",
    [
        ("COMPLETED|00:10:00|0:0|n1", ("finished", "exit code 0")),
        ("CANCELLED by 1000|00:01:00|0:15|n[1-2]", ("cancelled", "on n[1-2]")),
        ("TIMEOUT|00:01:00|0:0|n1", ("failed", "TIMEOUT after 00:01:00")),
        ("FAILED|00:01:00|75:0|n1", ("stopped", "exit code 75")),
        ("", ("unknown", "no longer knows")),
    ],
)  # fmt: skip
def test_accounts_are_read_when_the_controller_has_forgotten(said, stand):
    found = module.read_account(said)
    assert found.state == stand[0] and stand[1] in found.detail


def test_exit_codes_and_shell_agree_on_what_starts_again(tmp_path):
    from jdiff.launching.task import again, shell_again

    what = Task("a", "/a", "{}", retries=2)
    for codes in ([75] * 5, [0], [2], [65], [130], [1, 76, 137], [1, 75, 1, 1, 1], [74, 74, 74]):
        counter = tmp_path / "failures"
        counter.unlink(missing_ok=True)
        failures = 0
        for code in codes:
            failures = 0 if code == exits.REQUEUE else failures + 1
            text = f"{shell_again(what, str(counter))}\nagain {code}"
            said = subprocess.run(["bash", "-c", text]).returncode == 0
            assert said == again(code, failures, what.retries), (codes, code)
    assert signal.SIGTERM == 15  # the number that SLURM's TERM stands for
