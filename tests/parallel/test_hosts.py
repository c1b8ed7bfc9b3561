"""Two processes of four devices, one of eight and one of one: the same training, for real.

Three groups of processes measure all that is asserted here:
  A  1 process x 8    trains a run
  B  2 processes x 4  train one; go on with a copy of A's until a SIGTERM; draw samples
  C  1 process x 1    trains one
then C goes on with what B left of A's run, A again with what C left, and C with its own, to
compare.
"""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import encoded_sets
import host_tasks
import jax
import numpy as np
import pytest

from jdiff import experiment
from jdiff.data import sources
from jdiff.training import checkpoints

TASKS = host_tasks.__file__
STEPS = 10
FSDP = {"data": 1, "fsdp": -1}
# Meshes of eight devices over two hosts: rows apart, some shared, all shared, interleaved.
LAYOUTS = {
    "data": ({"data": 8}, range(8)),
    "fsdp and data": ({"data": 2, "fsdp": 4}, range(8)),
    "tensor on a host": ({"data": 2, "tensor": 4}, range(8)),
    "tensor across hosts": ({"tensor": 8}, range(8)),
    "sequence across hosts": ({"data": 4, "sequence": 2}, (0, 4, 1, 5, 2, 6, 3, 7)),
    "hosts interleaved": ({"data": 8}, (0, 4, 1, 5, 2, 6, 3, 7)),
    "rows that overlap": ({"data": 4, "tensor": 2}, (0, 1, 2, 4, 3, 5, 6, 7)),
}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Group:
    """Processes that do the same tasks together."""

    def __init__(self, folder, count, devices, *tasks):
        environ = os.environ | {
            "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }  # fmt: skip
        address = f"127.0.0.1:{free_port()}" if count > 1 else None
        self.processes, self.first = [], ""
        for index in range(count):
            given = {"address": address, "count": count, "index": index, "tasks": tasks}
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, TASKS, json.dumps(given)], env=environ, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )  # fmt: skip

    def until_it_tells(self, task):
        """Waits until the first process has done this."""
        while f'"task": "{task}"' not in self.first:
            line = self.processes[0].stdout.readline()
            assert line, self.told()
            self.first += line

    def alive(self):
        return all(process.poll() is None for process in self.processes)

    def told(self):
        """What each process told of each task; fails with what they wrote if one fails."""
        ends = [process.communicate(timeout=900) for process in self.processes]
        codes = [process.returncode for process in self.processes]
        assert not any(codes), f"{codes}: {[(out, err[-4000:]) for out, err in ends]}"
        texts = [self.first + ends[0][0], *[out for out, _ in ends[1:]]]
        return [[json.loads(x) for x in text.splitlines() if x[:1] == "{"] for text in texts]

    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()


def losses(workdir):
    """Of each step, as far as they are written."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    told = [json.loads(line) for line in lines if line.endswith("}")]
    return [line["loss"] for line in told if line["kind"] == "train"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(folder with the runs, what the processes of each group told)."""
    folder = tmp_path_factory.mktemp("hosts")
    run = lambda name: str(folder / name)
    pictures = encoded_sets.prepare(folder / "tfds")
    encoder = str(pictures), str(encoded_sets.save_autoencoder(folder / "vae"))
    a = Group(
        folder, 1, 8, ("train", run("eight"), STEPS, FSDP),
        ("wait", run("C is done")), ("onward", run("moved"), 2, FSDP),
    )  # fmt: skip
    c = Group(
        folder, 1, 1, ("train", run("one"), STEPS, {}), ("wait", run("B is done")),
        ("sample", run("two"), run("one.npy")), ("evaluate", run("two")),
        ("encode", *encoder, "by_one"),
        ("onward", run("moved"), 2, {}),
        ("wait", run("A is done")), ("as_far", run("one"), run("moved"), {}),
    )  # fmt: skip
    b = None
    try:
        a.until_it_tells("train")
        shutil.copytree(folder / "eight", folder / "moved")
        b = Group(
            folder, 2, 4, ("train", run("two"), STEPS, FSDP), ("share", FSDP),
            ("divide", run("order")),
            *[("rows", sizes, list(order)) for sizes, order in LAYOUTS.values()],
            ("sample", run("two"), run("two.npy")), ("evaluate", run("two")),
            ("encode", *encoder, "by_two"),
            ("train", run("moved"), 10**6, FSDP),
        )  # fmt: skip
        while len(losses(folder / "moved")) < STEPS + 2:
            assert b.alive(), b.told()
            time.sleep(0.05)
        b.processes[1].send_signal(signal.SIGTERM)
        told = {"B": b.told()}
        (folder / "B is done").touch()
        c.until_it_tells("onward")
        (folder / "C is done").touch()
        told["A"] = a.told()
        (folder / "A is done").touch()
        told["C"] = c.told()
    finally:
        for group in filter(None, (a, b, c)):
            group.kill()
    return folder, told


@functools.cache
def shapes():
    info = sources.source("digits", "train").info
    return jax.eval_shape(experiment.build(host_tasks.config(1, {}), info).init, jax.random.key(0))


def weights(workdir, name="params", step=None):
    """(step, weights) of a checkpoint, read on the four devices of this process."""
    with checkpoints.opened(workdir, write=False) as saved:
        restored = saved.restore_average(shapes(), name, step)
    return restored.step, jax.tree.leaves(jax.tree.map(np.asarray, restored.state))


@pytest.mark.parametrize("other", ["eight", "one"])
def test_two_processes_train_to_the_parameters_of_one(measured, other):
    folder, _ = measured
    for name in ("params", "ema"):
        _, two = weights(folder / "two", name, STEPS)
        _, same = weights(folder / other, name, STEPS)
        for a, b in zip(two, same, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
    assert losses(folder / "two") == pytest.approx(losses(folder / other)[:STEPS], abs=1e-5)
    assert len(losses(folder / "two")) == STEPS


def test_weights_are_split_over_the_hosts(measured):
    """Half of them a host, but for the small ones, which are whole everywhere."""
    shares = [task["percent"] for told in measured[1]["B"] for task in told
              if task["task"] == "share"]  # fmt: skip
    assert len(shares) == 2 and all(50 <= share < 70 for share in shares)


def test_sigterm_on_one_process_stops_both_behind_one_step_and_saves(measured):
    folder, told = measured
    first, second = (told["B"][i][-1] for i in range(2))
    assert first == second == {"task": "train", "step": first["step"], "by": signal.SIGTERM}
    assert STEPS + 2 <= first["step"] < 10**6


def test_a_run_goes_on_from_eight_devices_to_two_processes_to_one_device_and_back(measured):
    """Nothing is lost on the way: its numbers are those of a run that was not moved."""
    folder, told = measured
    stopped = told["B"][0][-1]["step"]
    assert [t["step"] for t in told["C"][0] if t["task"] == "onward"] == [stopped + 2]
    assert [t["step"] for t in told["A"][0] if t["task"] == "onward"] == [stopped + 4]
    lines = (folder / "moved" / "metrics.jsonl").read_text().splitlines()
    steps = [line["step"] for line in map(json.loads, lines) if line["kind"] == "train"]
    assert steps == list(range(1, stopped + 5))  # each once
    assert losses(folder / "moved") == pytest.approx(losses(folder / "one"), abs=1e-4)
    (step, moved), (_, stayed) = weights(folder / "moved"), weights(folder / "one")
    assert step == stopped + 4
    for a, b in zip(moved, stayed, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rows_of_the_hosts_make_the_batch(measured, layout):
    place = list(LAYOUTS).index(layout)
    here = [[t for t in told if t["task"] == "rows"][place] for told in measured[1]["B"]]
    assert all(task["same"] for task in here)
    assert set(here[0]["rows"]) | set(here[1]["rows"]) == set(range(16))
    if set(LAYOUTS[layout][0]) <= {"data", "fsdp"}:
        assert not set(here[0]["rows"]) & set(here[1]["rows"])  # no row is read twice


def test_what_evaluation_divides_over_processes_is_whole_and_in_order(measured):
    told = [t for told in measured[1]["B"] for t in told if t["task"] == "divide"]
    assert [(t["whole"], t["own"], t["waited"]) for t in told] == [(True, 4, True)] * 2


def test_samples_of_two_processes_are_those_of_one(measured):
    folder, told = measured
    two, one = (np.load(folder / f"{name}.npy").astype(int) for name in ("two", "one"))
    assert two.shape == (20, 8, 8, 1) and two.std() > 10
    assert np.abs(two - one).max() <= 1  # rounding of 1e-6 may fall on either side of a level
    assert (two == one).mean() > 0.999
    assert [t for t in told["B"][1] if t["task"] == "sample"][0]["batches"] == [16, 4]


def test_figures_of_two_processes_are_those_of_one(measured):
    folder, told = measured
    groups = [*told["B"], *told["C"]]
    figures = [t["frechet"] for group in groups for t in group if t["task"] == "evaluate"]
    assert len(figures) == 3 and figures == pytest.approx([figures[0]] * 3, rel=1e-3)
    (line,) = [x for x in (folder / "two" / "metrics.jsonl").read_text().splitlines()
               if '"evaluation"' in x][:1]  # fmt: skip
    assert json.loads(line)["frechet"] == figures[0]
    lines = (folder / "two" / "metrics.jsonl").read_text().count('"evaluation"')
    assert lines == 2  # B's first process, and C's


def test_a_set_that_two_processes_encode_is_that_of_one(measured):
    folder, told = measured
    shares = [t["numbers"] for process in told["B"] for t in process if t["task"] == "encode"]
    assert shares == [[6 + 8] * 2, [8 + 5] * 2]  # files of 6, 8, 8 and 5: every other one
    for split in encoded_sets.SIZES:
        sets = [sources.source(name, split, folder / "tfds", progress=lambda _: None)
                for name in ("by_one", "by_two")]  # fmt: skip
        one, two = (s.gather(range(len(s))) for s in sets)
        assert one.keys() == two.keys() and {"latent", "latent_std", "label"} <= one.keys()
        np.testing.assert_array_equal(one["label"], two["label"])
        for name in ("latent", "latent_std"):
            np.testing.assert_allclose(one[name], two[name], rtol=2e-5, atol=2e-6)


CONFIG = """
import os
from jdiff.experiment import defaults

def get_config():
    c = defaults()
    c.train.batch_size = int(os.environ.get("BATCH", 16))
    return c
"""


def test_a_mistake_on_one_host_ends_both_commands_with_one_message(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    words = ["train", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
    words += [f"--coordinator=127.0.0.1:{free_port()}", "--processes=2"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "jdiff.cli", *words, f"--process={i}"], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "4", "BATCH": batch},
        )
        for i, batch in enumerate(("16", "7"))
    ]  # fmt: skip
    told = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "2 processes (flags), met at" in told[0][0] and told[1] == ("", "")
    (line,) = told[0][1].splitlines()
    assert line.startswith("error: config.train.batch_size=7 is not a multiple of 8")
    assert "(process 1 of 2, on " in line
