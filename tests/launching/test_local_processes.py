"""Processes of this machine: what each is told, what starts again, and who hears of signals."""

import functools
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from jdiff import exits
from jdiff.errors import UserError
from jdiff.launching import jobs, local_processes
from jdiff.launching.task import Task

# In place of the training: process i ends as the n-th word of CODES_i says at its n-th start.
STAND_IN = """\
#!/usr/bin/env bash
me=${JAX_PROCESS_ID:-0}
n=$(($(cat "starts-$me" 2>/dev/null || echo 0) + 1)); echo $n >"starts-$me"
codes=CODES_$me; set -- ${!codes}; code=${!n}
echo "process $me of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS, start $n,\
 devices $JAX_NUM_CPU_DEVICES $CUDA_VISIBLE_DEVICES"
[ "$code" != wait ] && exit "$code"
trap 'echo saves; exit 75' TERM; trap 'echo saves; exit 130' INT
echo $$ >"ready-$me"; while :; do sleep 0.1; done
"""


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """planned(codes of each process, retries=, ...) -> the folder of a launch that may be run."""
    program = tmp_path / "stand-in"
    program.write_text(STAND_IN)
    program.chmod(0o755)

    def plan(*codes, retries=0, **options):
        for i, words in enumerate(codes):
            monkeypatch.setenv(f"CODES_{i}", words)
        what = Task("run", str(tmp_path / "run"), "{}", cwd=str(tmp_path), python=str(program),
                    retries=retries)  # fmt: skip
        options = {"processes": len(codes), "devices": 2, **options}
        chosen = local_processes.Options(**options)
        made = local_processes.plan(what, chosen, tmp_path / "launch" / "run-1")
        made.write()
        return made

    return plan


def lines(plan, name="log.txt"):
    return (plan.folder / name).read_text().splitlines()


def test_processes_meet_at_one_address_and_have_their_devices(planned, capfd):
    plan = planned("0", "0", "0")
    assert local_processes.run(plan.folder, show=True) == 0
    found = [lines(plan, name)[0] for name in ("log.txt", "process-1.txt", "process-2.txt")]
    told = [re.fullmatch(r"process (\d) of 3 at (127\.0\.0\.1:\d+), start 1, devices 2 ", line)
            for line in found]  # fmt: skip
    assert [t.group(1) for t in told] == ["0", "1", "2"]
    assert len({t.group(2) for t in told}) == 1
    assert capfd.readouterr().out.splitlines() == [found[0]]  # the first is shown, and only it
    # What a dry run prints is this environment, but for the port.
    words = ["env", "JAX_COORDINATOR_ADDRESS=127.0.0.1:PORT", "JAX_NUM_PROCESSES=3",
             "JAX_PROCESS_ID=1", "JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=2"]  # fmt: skip
    assert list(plan.commands[1][:6]) == words


def test_gpus_are_dealt_out_in_order(planned, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    plan = planned("0", "0", devices=None, gpus=2)
    assert local_processes.run(plan.folder, show=False) == 0
    assert lines(plan)[0].endswith("devices  3,5")
    assert lines(plan, "process-1.txt")[0].endswith("devices  6,7")


@pytest.mark.parametrize(
    "codes, retries, code, starts",
    [
        (("75 75 0", "75 75 0"), 0, 0, 3),  # saved: goes on however often
        (("1 1 0", "76 76 0"), 1, 1, 2),  # a crash, and a peer that noticed: one retry
        (("76 0", "137 0"), 1, 0, 2),
        (("2 0", "76 0"), 3, 2, 1),  # a mistake: no retry, whatever the others say
        (("65 0", "0 0"), 3, 65, 1),
    ],
)
def test_what_starts_again(planned, codes, retries, code, starts, tmp_path):
    plan = planned(*codes, retries=retries)
    assert local_processes.run(plan.folder, show=False) == code
    assert (tmp_path / "starts-0").read_text() == f"{starts}\n"


def test_the_worst_code_speaks_for_all():
    worst = local_processes.worst
    assert worst([0, 0]) == 0
    assert worst([exits.REQUEUE, 0]) == exits.REQUEUE
    assert worst([exits.PEER_LOST, exits.REQUEUE]) == exits.PEER_LOST
    assert worst([exits.PEER_LOST, -signal.SIGKILL]) == 137  # what happened, not who noticed
    assert worst([1, exits.USER]) == exits.USER


def test_a_launch_that_detached_is_seen_and_cancelled(planned, tmp_path):
    plan = planned("wait 0", "wait 0", retries=3)
    job = local_processes.submit(plan, "run", str(tmp_path / "run"))
    until(lambda: all((tmp_path / f"ready-{i}").exists() for i in (0, 1)))
    assert local_processes.standing(job).state == "running"
    assert "save first" in local_processes.cancel(job)
    until(lambda: local_processes.standing(job).state != "running")
    assert local_processes.standing(job) == ("stopped", "exit code 75")
    assert lines(plan)[-1] == lines(plan, "process-1.txt")[-1] == "saves"
    assert (tmp_path / "starts-0").read_text() == "1\n"  # asked to end: not started again
    assert local_processes.tail(job, 1) == "saves"


def test_a_launcher_that_was_killed_has_failed(planned, tmp_path):
    plan = planned("wait")
    job = local_processes.submit(plan, "run", str(tmp_path / "run"))
    until(lambda: (tmp_path / "ready-0").exists() and (tmp_path / "ready-0").read_text())
    os.kill(int(job.id), signal.SIGKILL)
    os.waitpid(int(job.id), 0)
    assert local_processes.standing(job).state == "failed"
    child = int((tmp_path / "ready-0").read_text())
    os.killpg(child, signal.SIGKILL)


def test_ctrl_c_reaches_the_processes_and_ends_it(planned, tmp_path):
    plan = planned("wait 0", "wait 0", retries=3)
    words = [sys.executable, "-m", "jdiff.launching.local_processes", str(plan.folder)]
    # As a terminal starts it: what runs in a script's background ignores the signal.
    default = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    launcher = subprocess.Popen(words, preexec_fn=default)
    until(lambda: all((tmp_path / f"ready-{i}").exists() for i in (0, 1)))
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=60) == exits.INTERRUPTED
    assert lines(plan)[-1] == "saves"


def until(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"processes": 2, "devices": None}, "say what each has"),
        ({"devices": 4, "gpus": 1}, "--devices simulates"),
        ({"processes": 0}, "--processes=0"),
    ],
)
def test_what_cannot_be_is_refused(planned, options, says):
    with pytest.raises(UserError, match=says):
        planned("0", **options)


def test_jobs_are_kept_newest_last(tmp_path):
    home = jobs.home(str(tmp_path), here=True)
    first = jobs.Job.new("slurm", "a", "1", str(tmp_path), home / "a-1", log="x", zone="z")
    second = jobs.Job.new("local", "a", "2", str(tmp_path), home / "a-2", log="y")
    jobs.add(home, first)
    jobs.add(home, second)
    assert jobs.find(str(tmp_path)) == [first, second]
    (home / "a-1").mkdir()
    assert jobs.next_folder(home, "a") == home / "a-2"
    (home / "jobs.json").write_text("[{]")
    with pytest.raises(UserError, match="cannot be read"):
        jobs.find(str(tmp_path))
