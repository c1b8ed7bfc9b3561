"""The training loop on real digits with a tiny network: resuming, stopping, failing."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from rich.console import Console

from jdiff import experiment, runs, train
from jdiff.errors import UserError
from jdiff.profiling import tracer
from jdiff.profiling.clock import PARTS
from jdiff.training import checkpoints


def tiny(**changes):
    c = experiment.defaults()
    c.name = "tiny"
    c.model.update({"name": "dit", "width": 16, "depth": 1, "heads": 2})
    c.ema = {"ema": {"kind": "constant", "decay": 0.9}, "wide": {"kind": "power", "sigma_rel": 0.1}}
    c.sampling.grid.steps = 2
    c.train.update(
        {"batch_size": 16, "steps": 6, "log_every": 2, "sample_every": 100, "checkpoint_every": 3}
    )
    c.train.update(changes)
    return c


def go(config, workdir):
    return train.train(config, workdir, Console(quiet=True))


def final(workdir):
    """Everything the newest checkpoint holds, as numpy."""
    with checkpoints.opened(workdir, write=False) as saved:
        import orbax.checkpoint as ocp

        state = saved._manager.restore(
            saved.latest, args=ocp.args.Composite(state=ocp.args.StandardRestore())
        ).state
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    as_numpy = lambda a: jax.random.key_data(a) if jax.dtypes.issubdtype(
        getattr(a, "dtype", np.float32), jax.dtypes.prng_key) else a  # fmt: skip
    return {jax.tree_util.keystr(path): np.asarray(as_numpy(a)) for path, a in leaves}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    different = [k for k in a if not np.array_equal(a[k], b[k])]
    assert not different


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of six steps without interruption."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    result = go(tiny(), workdir)
    assert result.step == 6
    return workdir


def test_a_run_directory_holds_all_of_the_run(straight):
    names = {p.name for p in straight.iterdir()}
    assert {"config.json", "run.json", "metrics.jsonl", "tb", "checkpoints", "samples"} <= names
    assert (straight / "samples" / "step_00000006.png").is_file()
    assert any(p.name.startswith("events.out.tfevents") for p in (straight / "tb").iterdir())
    every = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in every if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    assert all(line["loss"] > 0 and line["images_per_s"] > 0 for line in lines)
    described = json.loads((straight / "run.json").read_text())
    assert described["state"] == "finished"
    assert described["data"]["num_classes"] == 10


def test_a_run_that_was_cut_in_two_ends_with_the_same_bits(straight, tmp_path):
    """And the second part may be traced."""
    go(tiny(steps=3), tmp_path / "run")
    traced = tracer.Profile(first=2, count=2)
    train.train(tiny(steps=6), tmp_path / "run", Console(quiet=True), traced)
    assert_same_bits(final(tmp_path / "run"), final(straight))
    summary = json.loads((tmp_path / "run" / "profile" / "summary.json").read_text())
    assert (summary["steps"], summary["devices"]) == ([5, 6], 4)
    assert summary["split"]["compute"] > 0 and "all-reduce" in summary["collectives"]
    assert summary["split"]["samples"] > 0  # step 6 is the last


def test_the_lines_account_for_the_wall_time(straight):
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    spent = [line for line in lines if line["kind"] == "spent"]
    assert [line["step"] for line in spent] == [2, 3, 4, 6, 6]
    parts = {"compile": 0, "start": 0, "steps": 0, "samples": 0, "checkpoint": 0}
    for line in spent:
        parts |= {name: parts[name] + line.get(name, 0.0) for name in parts}
    assert all(parts.values())
    total = sum(line.get(name, 0.0) for line in spent for name in PARTS)
    seconds = json.loads((straight / "run.json").read_text())["wall_seconds"]
    assert total == pytest.approx(seconds, rel=0.05, abs=2.0)


def test_speed_is_told_for_a_chip_and_as_utilisation_where_the_peak_is_known(straight, tmp_path):
    """This CPU's peak is not known, unless the config says it."""
    read = lambda run: [
        line
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if line["kind"] == "train"
    ]
    for line in read(straight):
        assert line["images_per_s_chip"] == pytest.approx(line["images_per_s"] / 4)
        assert "mfu" not in line
    speed = json.loads((straight / "run.json").read_text())["speed"]
    assert speed["peak"] is None
    go(tiny(steps=2, peak_flops=1e9), tmp_path / "run")
    (line,) = read(tmp_path / "run")
    assert line["mfu"] == pytest.approx(line["images_per_s"] / 16 * speed["flops"] / 4e9)


def test_a_finished_run_is_left_as_it_is(straight):
    before = {p: p.read_bytes() for p in (straight / "checkpoints").rglob("*") if p.is_file()}
    assert go(tiny(), straight).step == 6
    after = {p: p.read_bytes() for p in (straight / "checkpoints").rglob("*") if p.is_file()}
    assert after == before


def test_sigterm_saves_and_the_same_command_goes_on(straight, tmp_path, monkeypatch):
    write = train._write_samples

    def interrupted(workdir, metrics, step, *drawn):
        write(workdir, metrics, step, *drawn)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "_write_samples", interrupted)
    with pytest.raises(train.Stopped, match="SIGTERM at step 2, saved"):
        go(tiny(sample_every=1), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "stopped"
    monkeypatch.undo()
    go(tiny(), tmp_path / "run")
    assert_same_bits(final(tmp_path / "run"), final(straight))


def test_a_loss_that_is_not_finite_stops_and_names_step_batch_and_checkpoint(tmp_path, monkeypatch):
    loss = experiment.Experiment.loss

    def spoiled(self, params, key, batch, state):
        # The randomness of a step is a function of its number: the fifth draw is the bad one.
        bad = jax.random.key_data(key)[0] == jax.random.key_data(fifth)[0]
        return loss(self, params, key, batch, state) + jax.numpy.where(bad, jax.numpy.nan, 0.0)

    key_train = jax.random.split(jax.random.key(0), 3)[1]
    fifth = jax.random.fold_in(key_train, 4)
    monkeypatch.setattr(experiment.Experiment, "loss", spoiled)
    with pytest.raises(train.Diverged, match=r"step 5 \(images [\d, ]+\.\.\..*step 3 is saved"):
        go(tiny(), tmp_path / "run")
    with checkpoints.opened(tmp_path / "run", write=False) as saved:
        assert saved.steps == [3]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "failed"


def test_a_directory_of_another_config_is_refused_and_left_as_it_is(straight):
    before = {p: p.read_bytes() for p in straight.rglob("*") if p.is_file()}
    other = tiny()
    other.optimizer.learning_rate = 0.5
    with pytest.raises(UserError, match="belongs to another config: .*learning_rate"):
        go(other, straight)
    assert {p: p.read_bytes() for p in straight.rglob("*") if p.is_file()} == before


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is not empty and is not a run"):
        go(tiny(), tmp_path)


def test_load_run_gives_the_trained_denoiser(straight):
    run = runs.load_run(straight)
    assert (run.step, run.ema, run.null) == (6, "ema", {"label": 10})
    saved = final(straight)
    name = next(k for k in saved if k.startswith("['averages']['ema']"))
    params = jax.tree_util.tree_flatten_with_path(run.denoiser.params)[0]
    mine = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in params}
    np.testing.assert_array_equal(mine[name.removeprefix("['averages']['ema']")], saved[name])
    x = np.zeros((2, 8, 8, 1), np.float32)
    prediction = run.denoiser(x, np.float32(1.0), {"label": np.array([3, 10])})
    assert prediction.x0.shape == x.shape
    assert runs.load_run(straight, ema="params", step=3).step == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ema": "emma"}, "ema 'emma' is not known. Did you mean 'ema'"),
        ({"step": 4}, "no checkpoint of step 4 .*nearest is 3"),
    ],
)
def test_load_run_names_what_is_not_there(straight, options, words):
    with pytest.raises(UserError, match=words):
        runs.load_run(straight, **options)


def test_a_damaged_description_is_named(straight, tmp_path):
    (tmp_path / "config.json").write_text((straight / "config.json").read_text())
    (tmp_path / "run.json").write_text('{"data": {"name"')
    with pytest.raises(UserError, match=r"run.json cannot be read"):
        runs.load_run(tmp_path)


def test_a_directory_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        runs.load_run(tmp_path)


def test_the_sampler_of_a_run_takes_choices(straight):
    run = runs.load_run(straight)
    denoise, solver, times = runs.sampler(
        run, guidance={"scale": 3.0}, grid={"steps": 4}, solver={"name": "ddim", "eta": 1.0}
    )
    assert (denoise.scale, solver.eta, len(times)) == (3.0, 1.0, 5)
    assert run.config.sampling.grid.steps == 2  # the run's own config is not touched


def student(teacher, **changes):
    """A run that learns the teacher's two steps as one, from the teacher's weights."""
    c = tiny(start=str(teacher), **changes)
    c.loss.update({"name": "progressive", "teacher": str(teacher), "arguments": {"steps": 2}})
    return c


def test_a_student_starts_as_its_teacher_whose_weights_it_keeps_and_resumes_bit_for_bit(
    straight, tmp_path
):
    go(student(straight), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "6")  # as if killed after step 3
    moved = straight.rename(straight.with_name("moved"))
    try:  # what is frozen is in the checkpoint, but its structure is the teacher's config
        with pytest.raises(UserError, match="run is not a run directory"):
            go(student(straight), tmp_path / "cut")
    finally:
        moved.rename(straight)
    go(student(straight), tmp_path / "cut")
    mine, teachers = final(tmp_path / "whole"), final(straight)
    assert_same_bits(final(tmp_path / "cut"), mine)
    frozen = {
        k.removeprefix("['frozen']"): v for k, v in mine.items() if k.startswith("['frozen']")
    }
    average = {
        k.removeprefix("['averages']['ema']"): v for k, v in teachers.items()
        if k.startswith("['averages']['ema']")
    }  # fmt: skip
    assert_same_bits(frozen, average)
    one = {k: v for k, v in mine.items() if k.startswith("['params']")}
    moves = [np.abs(v - average[k.removeprefix("['params']")]).max() for k, v in one.items()]
    assert 0 < max(moves) < 0.05  # six steps of 1e-3 from where the teacher was
    run = runs.load_run(tmp_path / "whole")
    assert run.denoiser(
        np.zeros((1, 8, 8, 1), np.float32), np.float32(1.0), {"label": np.array([3])}
    )


def test_a_start_or_a_teacher_that_does_not_fit_is_named(straight, tmp_path):
    wider = tiny(start=str(straight))
    wider.model.width = 32
    with pytest.raises(
        UserError, match=r"config.train.start=.* is of another network: .* there and .* here"
    ):
        go(wider, tmp_path / "a")
    c = student(straight)
    c.data.size = 4
    with pytest.raises(UserError, match=r"config.loss.teacher=.* was trained on digits.*\(8, 8, 1"):
        go(c, tmp_path / "b")
    c = student(straight)
    c.low_res.factor = 2
    with pytest.raises(UserError, match=r"teacher=.* residual\) None; this run has \[2.0, 'area'"):
        go(c, tmp_path / "c")
