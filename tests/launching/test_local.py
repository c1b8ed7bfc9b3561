"""A sweep on this machine, with a small script in the place of training."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from made_sweeps import fake
from made_sweeps import sweep as made

from jdiff.errors import UserError
from jdiff.launching import attempts, folder, local


def go(sweep: folder.Sweep, plans: dict[int, str], *, parallel: int = 1, retries: int = 0, **rest):
    """Runs the sweep; points without a plan are done at once."""

    def command(name: str) -> list[str]:
        plan = plans.get(int(name[:2]), "done")
        return fake(sweep, name, plan)

    rest.setdefault("slots", [{} for _ in range(parallel)])
    return local.run(sweep, list(sweep.current), retries=retries, command=command, **rest)


def states(sweep: folder.Sweep) -> list[str]:
    return [status.state for status in folder.look(sweep).values()]


def tries(sweep: folder.Sweep) -> list[int]:
    found = [sweep.folder / name / "tries" for name in sweep.points]
    return [int(path.read_text()) if path.exists() else 0 for path in found]


def test_one_that_fails_stops_no_other_and_the_same_command_takes_it_up_again(tmp_path):
    sweep = made(tmp_path / "s", 4)
    assert states(sweep) == ["waiting"] * 4
    assert go(sweep, {0: "fail+done", 1: "mistake", 2: "die+done"}, parallel=2) is None
    assert states(sweep) == ["failed", "failed", "failed", "finished"]
    errors = [status.error for status in folder.look(sweep).values()]
    assert errors[0] == "OSError: the disk is on fire"
    assert errors[1] == "config.seed is no seed"
    assert errors[2] == "killed by SIGKILL (out of memory?)"
    snapshot = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert [row["state"] for row in snapshot["points"]] == states(sweep)
    go(made(tmp_path / "s", 4), {0: "fail+done", 2: "die+done"})
    assert states(sweep) == ["finished"] * 4
    assert tries(sweep) == [2, 2, 2, 1]  # what was finished was left alone


def test_failed_points_are_tried_again_but_mistakes_are_not(tmp_path):
    sweep = made(tmp_path / "s", 4)
    plans = {0: "fail+die+done", 1: "fail", 2: "mistake"}
    go(sweep, plans, retries=2, parallel=2)
    assert states(sweep) == ["finished", "failed", "failed", "finished"]
    assert tries(sweep) == [3, 3, 1, 1]
    log = attempts.log_of(sweep.folder, "00_seed=0").read_text()
    assert [f"attempt {n} on" in log for n in (1, 2, 3)] == [True] * 3
    assert "attempt 3 sees None" in log and "fake_point.py" in log


def test_points_run_side_by_side_and_no_more_than_allowed(tmp_path):
    seen = []

    def tell(now):
        seen.append(sum(status.state == "running" for status in now.values()))

    sweep = made(tmp_path / "s", 5)
    slots = [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    go(sweep, {0: "meet", 1: "meet"}, slots=slots, tell=tell)  # one alone would never end
    assert states(sweep) == ["finished"] * 5
    assert max(seen) <= 2
    logs = [attempts.log_of(sweep.folder, name).read_text() for name in sweep.points]
    assert "sees 0,1" in logs[0] and "sees 2,3" in logs[1]
    assert all("sees 0,1" in log or "sees 2,3" in log for log in logs)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_has_all_save_and_the_same_command_goes_on(tmp_path, signum):
    sweep = made(tmp_path / "s", 3)
    sent = []

    def tell(now):
        if not sent and len(list(sweep.folder.glob("*/ready"))) == 2:
            sent.append(now)
            os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    assert go(sweep, {0: "wait+done", 1: "wait+done"}, parallel=2, tell=tell) == signum
    assert signal.getsignal(signum) is before
    found = folder.look(sweep)
    assert [s.state for s in found.values()] == ["stopped", "stopped", "waiting"]
    assert [s.step for s in found.values()] == [7, 7, 0]  # they have saved
    assert [attempts.read(sweep.folder, name).code for name in list(found)[:2]] == [75, 75]
    assert go(sweep, {0: "wait+done", 1: "wait+done"}) is None
    assert states(sweep) == ["finished"] * 3


def test_the_second_ctrl_c_kills(tmp_path):
    sweep = made(tmp_path / "s", 1)
    stubborn = [sys.executable, "-S", "-c",
                "import pathlib, signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
                "pathlib.Path(sys.argv[1]).touch(); signal.pause(); signal.pause()",
                str(tmp_path / "deaf")]  # fmt: skip

    def tell(now):
        if (tmp_path / "deaf").exists():
            os.kill(os.getpid(), signal.SIGINT)

    names = list(sweep.current)
    stopped_by = local.run(sweep, names, slots=[{}], command=lambda _: stubborn, tell=tell)
    assert stopped_by == signal.SIGINT
    assert attempts.read(sweep.folder, names[0]).code == -signal.SIGKILL


def test_what_a_killed_sweep_left_running_is_waited_for_and_not_started_twice(tmp_path):
    sweep = made(tmp_path / "s", 2)
    name = sweep.current[0]
    words = fake(sweep, name, "wait")
    # The shell is gone when the point goes on: nobody here is its parent.
    shell = ["sh", "-c", '"$@" >/dev/null 2>&1 & echo $!', "sh", *words]
    pid = int(subprocess.run(shell, check=True, capture_output=True).stdout)
    host, born = socket.gethostname(), attempts._born(pid)
    attempts.write(sweep.folder, name, attempts.Note(host=host, pid=pid, born=born))

    def tell(now):
        assert now[name].state in ("running", "stopped")
        if (sweep.folder / name / "ready").exists() and now[name].state == "running":
            os.kill(attempts.read(sweep.folder, name).pid, signal.SIGTERM)

    go(sweep, {}, tell=tell)
    assert states(sweep) == ["stopped", "finished"]
    assert tries(sweep) == [1, 1]


def test_gpus_are_dealt_out(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3,5,7,9")
    named = lambda *each: [{"CUDA_VISIBLE_DEVICES": names} for names in each]
    assert local.places(None, 2) == named("1,3", "5,7")
    assert local.places(3, 1) == named("1", "3", "5")
    assert local.places(2, None) == [{}, {}] and local.places(None, None) == [{}]
    with pytest.raises(UserError, match="--gpus=2 for each of 3 points: this machine shows 5"):
        local.places(3, 2)
    listed = tmp_path / "nvidia-smi"
    listed.write_text("#!/bin/sh\nprintf 'GPU 0: H100 (UUID: a)\\n  MIG 1g\\nGPU 1: H100\\n'\n")
    listed.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert local.places(None, 1) == named("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="this machine shows 0"):
        local.places(None, 1)
