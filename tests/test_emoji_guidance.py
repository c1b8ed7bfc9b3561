"""experiments/emoji_guidance.py: its quick form whole, which is exact, and its cells by hand."""

import importlib.util
import pathlib

import numpy as np
import pytest

from jdiff.errors import UserError

_PATH = pathlib.Path(__file__).parents[1] / "experiments" / "emoji_guidance.py"
_SPEC = importlib.util.spec_from_file_location("emoji_guidance", _PATH)
guidance = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(guidance)


def test_without_guidance_there_is_one_cell():
    found = guidance.cells((1.0, 2.0), ("everywhere", "(-2, 2)"))
    assert [tuple(c) for c in found] == [
        (1.0, "everywhere"), (2.0, "everywhere"), (2.0, "(-2, 2)"),
    ]  # fmt: skip


def test_the_scorer_of_digits_finds_the_nearest_mean():
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 10
    means = rng.normal(size=(10, 4, 4, 1)).astype(np.float32)
    scorer = guidance.nearest_mean(means[labels], labels)
    texts = scorer.texts(["the digit 3", "the digit 7"])
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1.0, rtol=1e-5)
    centred = means - means.mean(axis=0)
    seen = scorer.see(means[[3, 7]])
    np.testing.assert_allclose((seen * texts).sum(axis=1), 1.0, rtol=1e-5)
    other = (centred[3] * centred[7]).sum() / np.sqrt((centred[[3, 7]] ** 2).sum((1, 2, 3)).prod())
    assert (seen[0] @ texts[1]) == pytest.approx(other, rel=1e-4)


def test_the_quick_form_draws_once_and_then_reads(tmp_path, capsys, monkeypatch):
    two = [guidance.Cell(1.0, "everywhere"), guidance.Cell(4.0, "(-2, 2)")]  # of its three
    monkeypatch.setattr(guidance, "cells", lambda scales, intervals: two)
    arguments = ["--quick", "--num=40", f"--workdir={tmp_path}", f"--out={tmp_path / 'figure.png'}"]
    found = guidance.main(arguments)
    table = capsys.readouterr().out
    assert "| 1 | nowhere |" in table and "| 4 | (-2, 2) |" in table
    assert "| real pictures |" in table and "| 10.0% |" in table
    assert (tmp_path / "figure.png").stat().st_size > 1000
    # exact samples are digits: nearer to them than noise, and mostly those that were asked for
    assert all(figures.recall > 0.6 for figures in found.values())

    def drawn(*args, **options):
        raise AssertionError("drawn again")

    monkeypatch.setattr(guidance.generate, "images", drawn)
    assert guidance.main(arguments) == found


def test_a_run_without_a_scorer_is_refused(tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        guidance.main([])
    monkeypatch.setattr(guidance.runs, "load_run", lambda workdir: _run(workdir))
    with pytest.raises(UserError, match="--scorer: name the run"):
        guidance.of_run(tmp_path, None, 8, None, None)


def _run(workdir):
    import exact_run

    return exact_run.make(workdir)
