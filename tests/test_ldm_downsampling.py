"""experiments/ldm_downsampling.py: equal compute, what is left to do, tables; none is trained."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from jdiff import config, experiment, kinds, runs
from jdiff.data.sources import Info
from jdiff.errors import UserError
from jdiff.models.flops import flops

_PATH = pathlib.Path(__file__).parents[1] / "experiments" / "ldm_downsampling.py"
_SPEC = importlib.util.spec_from_file_location("ldm_downsampling", _PATH)
ldm = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(ldm)
FULL = ldm.Settings()


def test_every_factor_has_the_same_operations():
    """Convolutions dominate, whose operations fall with the area."""
    cost = {factor: ldm.operations(FULL, factor) for factor in FULL.factors}
    for factor in (2, 4, 8):
        assert cost[factor // 2] / cost[factor] == pytest.approx(4, rel=0.1)
    assert ldm.steps_of(FULL, 1) == FULL.steps
    for factor in FULL.factors:
        for part in FULL.parts:
            spent = ldm.steps_of(FULL, factor, part) * cost[factor]
            assert spent == pytest.approx(part * FULL.steps * cost[1], rel=1e-2)


def test_the_counted_network_is_the_one_that_is_trained(tmp_path, monkeypatch):
    s = ldm.QUICK
    monkeypatch.setattr(ldm, "data_dir", lambda s, workdir: tmp_path)
    c = ldm.config(s, 2, tmp_path, 10)
    info = Info("latents_f2", "train", (4, 4, 2), 10, (), 100)
    exp = experiment.build(c, info)
    like = experiment.jax.ShapeDtypeStruct
    given = like((1, 4, 4, 2), "float32"), like((1,), "float32"), {"label": like((1,), "int32")}
    assert flops(exp.apply, exp.shapes(), *given) == ldm.operations(s, 2)


@pytest.mark.parametrize("settings", [FULL, ldm.SMALL, ldm.QUICK], ids=["full", "small", "quick"])
def test_configs_make_networks_of_their_kinds(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(ldm, "data_dir", lambda s, workdir: tmp_path)
    for factor in settings.factors:
        c = ldm.config(settings, factor, tmp_path, 7)
        assert (c.kind, c.train.steps) == ("diffusion", 7)
        assert c.data.name == (settings.data if factor == 1 else f"latents_f{factor}")
        if factor > 1:
            first = ldm.first_config(settings, factor, tmp_path)
            assert first.kind == "autoencoder" and len(first.model.widths) == np.log2(factor) + 1
            info = Info(settings.data, "train", (settings.size, settings.size, 3), 10, (), 100)
            assert set(kinds.of(first).build(first, info).shapes()) >= {"autoencoder"}
            assert config.from_json(config.to_json(first)) == first


@pytest.fixture
def done(tmp_path, monkeypatch):
    """What would be done, and its results, without doing it."""
    log = []

    def trained(c, workdir, console):
        log.append((workdir.name, c.train.steps))
        workdir.mkdir(exist_ok=True)
        runs.describe(workdir, state="finished")
        (workdir / "config.json").write_text(config.to_json(c))
        return type("Result", (), {"loss": 1.0})

    def encoded(wanted):
        log.append(wanted.name)
        folder = wanted.data_dir / wanted.name / "1.0.0"
        folder.mkdir(parents=True)
        (folder / "encoding.json").write_text("{}")
        return folder

    def measured(s, workdir, factor, judge):
        steps = runs.read_config(workdir / f"f{factor}").train.steps
        np.save(workdir / "cells" / f"f{factor}_{steps}.npy", np.zeros((16, 8, 8, 1), np.uint8))
        return ldm.Figures(10.0 * factor, steps, 2.0 * steps, 0.25)

    monkeypatch.setattr(ldm, "data_dir", lambda s, workdir: tmp_path / "data")
    monkeypatch.setattr(ldm.train, "train", trained)
    monkeypatch.setattr(ldm.encoding, "encode", encoded)
    monkeypatch.setattr(ldm, "measured", measured)
    monkeypatch.setattr(ldm, "reconstructed", lambda *args: 3.0)
    moments = ldm.Moments.of(np.random.default_rng(0).normal(size=(20, 3)))
    judge = ldm.Judge(None, moments, moments, None)
    monkeypatch.setattr(ldm, "judged", lambda s, workdir: judge)
    return log


def test_what_is_there_is_not_done_again(done, tmp_path, capsys):
    arguments = ["--quick", f"--workdir={tmp_path}", f"--out={tmp_path / 'figure.png'}"]
    found = ldm.main(arguments)
    two = ldm.steps_of(ldm.QUICK, 2, 0.5)
    assert done == [
        ("f1", 30), ("f1", 60), ("first_f2", 300), "latents_f2", ("f2", two),
        ("f2", ldm.steps_of(ldm.QUICK, 2)),
    ]  # fmt: skip
    rows = capsys.readouterr().out.splitlines()
    assert "| 1 | 60 | 2.000 | 10.00 | 10.00 | 0 | 4.0 |" in rows
    assert any(row.startswith("| 2 |") and row.endswith("| 20.00 | 20.00 | 3.00 | 4.0 |")
               for row in rows)  # fmt: skip
    assert (tmp_path / "figure.png").stat().st_size > 1000
    done.clear()
    (tmp_path / "cells" / "f2_1.json").unlink()  # cut off before the last cell was written
    assert ldm.main(arguments) == found and done == []
    with pytest.raises(UserError, match="made with other settings"):
        ldm.claim(tmp_path, FULL)


def test_seconds_of_training_are_those_of_its_steps(tmp_path):
    c = experiment.defaults()
    c.train.batch_size = 10
    (tmp_path / "config.json").write_text(config.to_json(c))
    lines = [
        {"step": 50, "kind": "train", "images_per_s": 100.0}, {"step": 50, "kind": "evaluation"},
        {"step": 80, "kind": "train", "images_per_s": 50.0},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ldm.trained_seconds(tmp_path) == pytest.approx(50 * 10 / 100 + 30 * 10 / 50)
