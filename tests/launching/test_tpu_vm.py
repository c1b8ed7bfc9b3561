"""TPU VMs: gcloud's commands, and the workers' script run by two workers of this machine.

There is no gcloud here: a stand-in takes its place that runs --command in a home folder for each
worker. What the commands mean to Google's own is not tested.
"""

import json
import os
import pathlib
import re
import subprocess
import time

import pytest

from jdiff import exits
from jdiff.errors import UserError
from jdiff.launching import jobs, programs, tpu_vm
from jdiff.launching.task import Task

GCLOUD = """\
#!/usr/bin/env bash
cd "$WORKERS" && printf '%q ' "$@" >>calls && echo >>calls
verb=$4; shift 4
words=(); worker=all
for word; do
  case $word in
    --worker=*) worker=${word#*=} ;;
    --command=*) command=${word#*=} ;;
    --*) ;;
    *) words+=("$word") ;;
  esac
done
[ "$worker" != all ] && all=("$worker") || all=(0 1)
for i in "${all[@]}"; do
  case $verb in
    ssh) echo "SSH: worker $i"; HOME=$WORKERS/$i bash -c "cd && $command" ;;
    scp) cp -r "${words[0]}" "$i/${words[1]#*:}" ;;
    describe) echo READY; exit ;;
  esac
done
"""
# In place of the training: ends as the lines of the file `codes` say, one a start.
STAND_IN = """\
#!/usr/bin/env bash
n=$(($(cat ~/starts 2>/dev/null || echo 0) + 1)); echo $n >~/starts
echo "start $n in $PWD: $*"; grep -h seed "$HOME"/jdiff-launch/*/config.json
code=$(sed -n "${n}p" ~/codes)
[ "$code" != wait ] && exit "$code"
trap 'echo saves; exit 75' TERM; touch ~/ready; while :; do sleep 0.1; done
"""


@pytest.fixture
def workers(tmp_path, monkeypatch):
    """workers(codes of worker 0, of worker 1) -> a job on them, started."""
    for name, text in {"gcloud": GCLOUD, "python-tpu": STAND_IN}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("WORKERS", str(tmp_path))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "setup.txt").touch()

    def start(*codes):
        for i, lines in enumerate(codes):
            (tmp_path / str(i)).mkdir()
            (tmp_path / str(i) / "codes").write_text("\n".join(map(str, lines)) + "\n")
        what = Task("run", "/shared/run", '{"seed": 7}', cwd="", python="python-tpu", retries=1)
        options = tpu_vm.Options(tpu="mine", zone="z", project="p", copy=str(tmp_path / "code"))
        plan = tpu_vm.plan(what, options, tmp_path / "launch" / "run-1")
        return tpu_vm.submit(plan, "run", what.workdir)

    yield start
    for pid in tmp_path.glob("*/jdiff-launch/*/pid"):
        subprocess.run(["kill", "-TERM", pid.read_text().strip()], capture_output=True)


def ended(job, state=None):
    end = time.monotonic() + 60
    while (found := tpu_vm.standing(job)).state in jobs.GOES_ON and time.monotonic() < end:
        time.sleep(0.1)
    return found


def test_every_worker_trains_and_starts_again_when_it_saved(workers, tmp_path):
    job = workers([75, 75, 75, 0], [75, 75, 75, 0])
    assert ended(job) == ("finished", "0 of 2 workers run; exit codes 0")
    for i in (0, 1):
        log = (tmp_path / str(i) / "jdiff-launch/run-1/log.txt").read_text()
        home = tmp_path / str(i) / "jdiff-launch/run-1"
        assert re.findall(r"^start (\d) in (\S+):", log, re.M) == [
            (str(n), str(home / "code")) for n in (1, 2, 3, 4)
        ]
        assert (home / "code" / "setup.txt").exists()
        assert f"--config={home}/config.json --workdir=/shared/run" in log
        assert json.loads((home / "config.json").read_text()) == {"seed": 7}
    assert "ended with exit code 0" in tpu_vm.tail(job, 1)


def test_a_crash_costs_a_retry_and_a_mistake_ends(workers):
    job = workers([1, 1, 0], [2, 0])
    assert ended(job) == ("failed", "0 of 2 workers run; exit codes 1, 2")
    # Worker 0 had one retry; worker 1 was not started again.
    assert programs.call(["bash", "-c", "cat $WORKERS/0/starts $WORKERS/1/starts"]) == "2\n1\n"


def test_a_cancelled_run_saves_on_every_worker_and_stays_down(workers, tmp_path):
    job = workers(["wait", 0], ["wait", 0])
    end = time.monotonic() + 60
    while not all((tmp_path / str(i) / "ready").exists() for i in (0, 1)):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert tpu_vm.standing(job) == ("running", "2 of 2 workers run")
    assert "gcloud compute tpus tpu-vm delete mine --quiet" in tpu_vm.cancel(job)
    assert ended(job) == ("stopped", "0 of 2 workers run; exit codes 75")
    assert "saves" in tpu_vm.tail(job, 3)
    assert (tmp_path / "0" / "starts").read_text() == "1\n"


def plan(folder=pathlib.Path("/records/run-1"), workdir="/gcs/b/run", **options):
    what = Task("run", workdir, "{}", cwd="", python="python3")
    return tpu_vm.plan(what, tpu_vm.Options(**{"tpu": "mine", "zone": "z", **options}), folder)


def test_a_tpu_vm_is_made_as_gcloud_wants_it():
    made = plan(accelerator="v5p-256", create=True, spot=True, mounts=(("gs://b", "/gcs/b"),))
    create = [
        "mine",
        "--accelerator-type=v5p-256",
        "--version=v2-alpha-tpuv5",
        "--spot",
        "--zone=z",
    ]
    assert made.commands[0] == ("gcloud", "compute", "tpus", "tpu-vm", "create", *create)
    assert [command[4] for command in made.commands] == ["create", "ssh", "scp", "ssh"]
    assert all("--worker=all" in command for command in made.commands[1:])
    assert made.warnings == ()
    other = plan(accelerator="v5p", topology="4x4x16", create=True, project="p")
    assert other.commands[0][6:8] == ("--type=v5p", "--topology=4x4x16")
    assert other.commands[0][-1] == "--project=p"
    assert "must share it" in other.warnings[0]
    script = made.files[made.folder / "worker.sh"]
    assert "gcsfuse --implicit-dirs --rename-dir-limit=100000 b /gcs/b" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize(
    "options, says",
    [
        ({"zone": None}, "--zone is missing"),
        ({"tpu": None}, "--tpu is missing"),
        ({"create": True}, "--accelerator is missing"),
        ({"spot": True}, "needs --create"),
        ({"accelerator": "v5p-12"}, "Nearest: v5p-8, v5p-16"),
        ({"accelerator": "tpu7x-16", "create": True}, "--runtime is missing"),
        ({"copy": "/nowhere"}, "--copy=/nowhere is not a folder"),
        ({"mounts": (("pvc/x", "/x"),)}, "gs://BUCKET"),
    ],
)
def test_what_cannot_be_is_refused(options, says):
    with pytest.raises(UserError, match=re.escape(says)):
        plan(**options)


def test_what_workers_answer_is_read():
    runs, gone = "jdiff-runs\n", "jdiff-gone\n"
    assert tpu_vm.read_workers(runs + "SSH: key\n" + runs).state == "running"
    assert tpu_vm.read_workers(runs + "jdiff-exit 76\n").detail.endswith("exit codes 76")
    assert tpu_vm.read_workers("jdiff-exit 0\njdiff-exit 0\n").state == "finished"
    assert tpu_vm.read_workers(f"jdiff-exit {exits.REQUEUE}\n" * 2).state == "stopped"
    assert tpu_vm.read_workers("jdiff-exit 0\n" + gone).state == "failed"
    assert tpu_vm.read_workers("").state == "failed"
