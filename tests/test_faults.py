"""What a fault leaves behind: a line that says so, an exit code, and a run that the same command
takes up again, to the same bits."""

import argparse
import errno
import io
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import threading

import jax
import pytest
from rich.console import Console
from test_train import assert_same_bits, final, go, tiny

from jdiff import cli, errors, exits, experiment, train
from jdiff.commands import train as command
from jdiff.data import patience
from jdiff.errors import UserError
from jdiff.training import checkpoints, stop

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of six steps without a fault."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    go(tiny(), workdir)
    return workdir


def ended(workdir):
    described = json.loads((workdir / "run.json").read_text())
    return described["state"], described["reason"]


class Faulty:
    """The digits, which do `fault` when the image of a batch that is read for the first time comes.

    Batches are read ahead, so the batch that fails is named: the k-th of 16 images.
    """

    def __init__(self, source, batch, fault):
        self.info, self._source, self._fault, self._left = source.info, source, fault, batch

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        return self._source[index]

    def gather(self, ids):
        self._left -= 1
        if self._left == 0:
            self._fault()
        return self._source.gather(ids)


def faulty(monkeypatch, batch, fault):
    """Training reads from a `Faulty` source, one batch after the other."""
    source = patience.source
    given = lambda *a, **k: Faulty(source(*a, **k), batch, fault)
    monkeypatch.setattr(patience, "source", given)
    return tiny()


def test_data_that_cannot_be_read_any_more_is_named_and_the_steps_so_far_are_saved(
    straight, tmp_path, monkeypatch
):
    def gone():
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    config = faulty(monkeypatch, 5, gone)
    config.data.threads = 0
    with pytest.raises(patience.Unreadable) as raised:
        go(config, tmp_path / "run")
    text = str(raised.value)
    assert raised.value.code == exits.IO and not raised.value.hung
    assert "digits (train): images " in text and os.strerror(errno.ESTALE) in text
    assert text.endswith("Step 4 is saved, and the same command resumes.")
    assert ended(tmp_path / "run") == ("failed", errors.told(raised.value)[0])
    monkeypatch.undo()
    go(tiny(), tmp_path / "run")
    assert_same_bits(final(tmp_path / "run"), final(straight))


def test_a_reader_that_hangs_is_named_in_time_and_the_steps_so_far_are_saved(
    straight, tmp_path, monkeypatch
):
    free = threading.Event()
    config = faulty(monkeypatch, 5, free.wait)
    config.data.timeout = 0.5
    config.data.threads = 1
    try:
        with pytest.raises(patience.Unreadable) as raised:
            go(config, tmp_path / "run")
    finally:
        free.set()
    text = str(raised.value)
    assert raised.value.code == exits.IO and raised.value.hung
    assert "no batch came within 0.5 s: thread '" in text  # and what it reads, and where it is
    assert "has been reading images " in text and " of digits (train) for " in text
    assert "in threading.py:" in text and "(wait)" in text
    assert text.endswith("Step 4 is saved, and the same command resumes.")
    monkeypatch.undo()
    go(tiny(), tmp_path / "run")
    assert_same_bits(final(tmp_path / "run"), final(straight))


def test_a_process_whose_reader_hangs_leaves_at_once(tmp_path, monkeypatch, capfd):
    """Python would wait at exit for the thread of the reader, which waits for the disk."""
    left = []
    monkeypatch.setattr(os, "_exit", left.append)

    def hangs(*_):
        error = patience.Unreadable("no batch came")
        error.hung = True
        raise error

    monkeypatch.setattr(train, "train", hangs)
    (tmp_path / "c.py").write_text("from jdiff.experiment import defaults as get_config\n")
    words = ["train", f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'run'}"]
    assert cli.main(words) == exits.IO
    assert left == [exits.IO]
    assert "error: no batch came" in capfd.readouterr().err


def test_a_set_whose_folder_fails_is_unreadable_from_the_start(tmp_path, monkeypatch):
    def gone(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/data/cifar10")

    monkeypatch.setattr(patience, "source", gone)
    with pytest.raises(patience.Unreadable, match=r"'digits' cannot be read: .*\(/data/cifar10\)"):
        go(tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["a checkpoint", "the metrics"])
def test_a_disk_that_takes_no_more_ends_the_run_with_what_is_saved(
    straight, tmp_path, monkeypatch, what
):
    """The kernel refuses the write: a limit on the size of files, from a step on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = 2500 if what == "a checkpoint" else 100  # the metrics stay below the first

    def full(step):
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    after_step(monkeypatch, full)
    try:
        with pytest.raises(checkpoints.NotSaved) as raised:
            go(tiny(), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    text = str(raised.value)
    assert raised.value.code == exits.IO
    assert os.strerror(errno.EFBIG) in text and "the same command then resumes" in text
    assert ("Step 3 is saved." in text) or ("No step is saved." in text)
    monkeypatch.undo()
    go(tiny(), tmp_path / "run")
    assert ended(tmp_path / "run") == ("finished", None)
    assert_same_bits(final(tmp_path / "run"), final(straight))


def after_step(monkeypatch, do):
    """Calls `do(step)` when a step was dispatched."""
    add = train._Watch.add

    def and_then(self, step, ids, values):
        add(self, step, ids, values)
        jax.block_until_ready(values)
        do(step)

    monkeypatch.setattr(train._Watch, "add", and_then)


def test_a_disk_that_fills_up_and_one_that_becomes_read_only(tmp_path):
    """A file system of its own, of a few hundred kilobytes: a real ENOSPC, and a real EROFS."""
    script = tmp_path / "script.py"
    script.write_text(FULL)
    shell = ["unshare", "-m", sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=300)
    if "unshare" in done.stderr or "NO MOUNT" in done.stdout:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()[-200:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines == ["RESULT full 74", "RESULT room 0", "RESULT read-only 2"], done
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in told[0] and "the same command then resumes" in told[0]
    assert "cannot be written: Read-only file system" in told[1]


FULL = """
import subprocess, sys
folder = sys.argv[1]
sys.path.insert(0, {tests!r})
place = folder + "/small"
mount = f"mkdir {{place}} && mount -t tmpfs -o size=600k none {{place}}"
if subprocess.run(mount, shell=True).returncode:
    print("NO MOUNT"); sys.exit()
config = folder + "/c.py"
open(config, "w").write("from test_train import tiny\\ndef get_config(): return tiny()\\n")
from jdiff import cli
words = ["train", f"--config={{config}}", f"--workdir={{place}}/run", "--no-evaluate"]
print("RESULT full", cli.main(words), flush=True)
subprocess.run(f"mount -o remount,size=64m {{place}}", shell=True, check=True)
print("RESULT room", cli.main(words), flush=True)
subprocess.run(f"mount -o remount,ro {{place}}", shell=True, check=True)
print("RESULT read-only", cli.main(words), flush=True)
""".format(tests=str(ROOT / "tests"))


def test_a_work_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "run", pathlib.Path("/sys/jdiff")):
        with pytest.raises(UserError, match="--workdir=.* cannot be written: ") as raised:
            go(tiny(), place)
        assert raised.value.code == exits.USER


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(straight, tmp_path):
    workdir = tmp_path / "run"
    go(tiny(), workdir)
    values = max((workdir / "checkpoints" / "6").rglob("d/*"), key=lambda f: f.stat().st_size)
    data = bytearray(values.read_bytes())
    data[len(data) // 2] ^= 16
    values.write_bytes(data)
    console = Console(record=True, file=io.StringIO(), width=1000)
    train.train(tiny(), workdir, console)
    said = console.export_text()
    assert "checkpoints/6 cannot be used and was moved to" in said
    assert "Step 3, the one before, is used instead" in said and "after step 3" in said
    assert (workdir / "damaged" / "6").is_dir()
    assert_same_bits(final(workdir), final(straight))


def test_a_loss_that_is_not_finite_has_an_exit_code_of_its_own(tmp_path, monkeypatch):
    def nowhere(*_):
        raise train.Diverged("the loss is not finite at step 5")

    monkeypatch.setattr(train, "train", nowhere)
    (tmp_path / "c.py").write_text("from jdiff.experiment import defaults as get_config\n")
    words = ["train", f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'run'}"]
    assert cli.main(words) == exits.DIVERGED
    assert exits.DIVERGED not in exits.AGAIN


def test_a_schedulers_signal_is_heeded_where_there_is_nothing_to_save(monkeypatch):
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        with pytest.raises(stop.Stopped, match="with nothing to save") as raised, stop.at_once():
            os.kill(os.getpid(), signum)
        assert errors.told(raised.value) == (str(raised.value), exits.REQUEUE)
        assert raised.value.code in exits.AGAIN
    args = argparse.Namespace(config="c.py", overrides=[], coordinator=None, processes=1,
                              process=None, connect_timeout=1.0, traceback=False)  # fmt: skip
    monkeypatch.setattr(command, "_run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(stop.Stopped):
        command.run(args)


def test_signals_are_collected_and_a_second_ctrl_c_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with stop.listening() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()  # the handler runs between two instructions: at the latest here
    assert signal.getsignal(signal.SIGINT) is before
    assert stop.Stopped(3, signal.SIGINT).code == exits.INTERRUPTED


def test_a_signal_before_the_first_step_stops_a_run_that_was_resumed(straight, tmp_path):
    workdir = tmp_path / "run"
    go(tiny(steps=3), workdir)
    beginning = train._beginning

    def signalled(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return beginning(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_beginning", signalled)
        with pytest.raises(stop.Stopped, match="SIGTERM at step 3, saved"):
            go(tiny(), workdir)
    assert ended(workdir)[0] == "stopped"
    go(tiny(), workdir)
    assert_same_bits(final(workdir), final(straight))


def test_a_picture_that_a_signal_came_before_is_drawn_later(tmp_path, monkeypatch):
    after_step(monkeypatch, lambda step: step == 2 and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(stop.Stopped, match="at step 2, saved"):
        go(tiny(sample_every=2), tmp_path / "run")
    monkeypatch.undo()
    go(tiny(sample_every=2), tmp_path / "run")
    pictures = sorted(p.name for p in (tmp_path / "run" / "samples").iterdir())
    assert pictures == [f"step_{step:08d}.png" for step in (2, 4, 6)]


def test_a_start_that_was_killed_before_it_had_a_config_can_be_repeated(tmp_path):
    (tmp_path / ".config.json.123.unfinished").write_text("{")
    assert go(tiny(steps=1), tmp_path).step == 1


def test_torture_in_short(tmp_path):
    """One kill -9 in the middle of a save, one SIGTERM; one of two processes. The long form is the
    benchmark itself."""
    one = tortured("--quick", f"--folder={tmp_path / 'one'}")
    assert "1 left half a save behind" in one and "same bits: ok" in one
    two = tortured("--processes=2", "--kills=1", "--every=4", f"--folder={tmp_path / 'two'}")
    assert "the others: (76,)" in two and "same bits: ok" in two
    told = (tmp_path / "two" / "struck.log").read_text()
    assert "process 0 of 2" in told and "the same command on all hosts resumes" in told


def tortured(*options):
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    words = [sys.executable, "benchmarks/torture.py", *options]
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_exit_code_is_in_the_chapter_and_in_the_help():
    chapter = (ROOT / "docs" / "faults.md").read_text()
    for code in (value for value in vars(exits).values() if isinstance(value, int)):
        assert re.search(rf"\| \(?{code}\b", chapter) or code == exits.OK, code
        assert re.search(rf"^  {code}\b", cli.EPILOG, re.M), code


def test_the_defaults_wait_for_data_and_keep_programs():
    c = experiment.defaults()
    assert c.data.timeout > 0 and c.compile_cache and c.cache_dir is None
