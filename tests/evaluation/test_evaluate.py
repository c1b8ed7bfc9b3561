"""Evaluation end to end on small sets whose figures are known."""

import numpy as np
import pytest

from jdiff.errors import UserError
from jdiff.evaluation import evaluate as evaluation
from jdiff.evaluation import features
from jdiff.evaluation.moments import Moments, frechet

SHAPE = (2, 2, 1)
SPACE = features.pixels(SHAPE)


def images(count, low, high, seed):
    return np.random.default_rng(seed).integers(low, high, (count, *SHAPE), dtype=np.uint8)


def batches(x, labels=None, size=7):
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        yield x[part], None if labels is None else labels[part]


def bright(x):
    """Class 1 for bright images, class 0 for dark ones, surely."""
    return np.eye(2)[(x.mean((1, 2, 3)) > 127).astype(int)]


def test_a_figure_lies_between_its_floor_and_its_ceiling():
    held_out, training, samples = (images(60, 60, 120, s) for s in range(3))
    samples = samples + np.uint8(10)
    labels = (np.arange(60) % 4 == 0).astype(int)  # a quarter is meant to be bright; none is
    got = evaluation.evaluate(
        batches(samples, labels),
        batches(held_out),
        features=SPACE,
        probabilities=bright,
        training=batches(training, np.zeros(60, int)),
    )
    assert (got["features"], got["num"], got["num_reference"]) == ("pixels", 60, 60)
    table = got["metrics"]
    for name in ("frechet", "kernel", "sliced"):
        assert table[name]["floor"] < table[name]["value"] < table[name]["ceiling"]
    direct = frechet(Moments.of(SPACE(samples)), Moments.of(SPACE(held_out)))
    assert table["frechet"]["value"] == pytest.approx(direct, rel=1e-9)
    assert table["accuracy"] == {"value": 0.75, "floor": 1.0, "ceiling": None}
    assert table["accuracy_per_class"]["value"] == [1.0, 0.0]
    assert table["inception_score"]["value"] == pytest.approx(1)
    assert 1 < table["inception_score"]["ceiling"] <= 2
    assert table["precision"]["floor"] > table["precision"]["ceiling"]
    assert set(table) == {
        *("frechet", "kernel", "kernel_deviation", "precision", "recall", "density", "coverage"),
        *("inception_score", "sliced", "accuracy", "accuracy_per_class"),
    }


def test_figures_do_not_depend_on_the_batches():
    x, y = images(40, 0, 200, 0), images(40, 0, 256, 1)
    one, two = (
        evaluation.evaluate(batches(x, size=a), batches(y, size=b), features=SPACE)["metrics"]
        for a, b in ((40, 3), (1, 40))
    )
    for name, row in one.items():
        for place in ("value", "ceiling"):
            assert row[place] == pytest.approx(two[name][place], rel=1e-9)


def test_only_the_asked_metrics_are_measured():
    x = images(20, 0, 256, 0)
    got = evaluation.evaluate(
        batches(x), batches(x), features=SPACE, metrics=["frechet"], noise=False
    )
    assert got["metrics"] == {
        "frechet": {"value": pytest.approx(0, abs=1e-12), "floor": None, "ceiling": None}
    }


def test_the_kept_features_are_a_uniform_sample_of_all():
    x = np.zeros((1000, *SHAPE), np.uint8)
    x[500:] = 255  # a stream whose second half differs: the first ones kept would miss it
    summary = evaluation.summarize(batches(x), SPACE, keep=200)
    assert summary.kept.shape == summary.pixels.shape == (200, 4)
    np.testing.assert_array_equal(summary.kept, summary.pixels)
    assert abs((summary.kept > 0).mean() - 0.5) < 4 * 0.5 / np.sqrt(200)
    assert summary.moments.count == 1000
    whole = evaluation.summarize(batches(x), SPACE, keep=2000)
    np.testing.assert_array_equal(whole.kept, SPACE(x))


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_noise_images(kind):
    parts = list(evaluation.noise_batches(SHAPE, 600, kind=kind, batch=256))
    assert [len(x) for x, _ in parts] == [256, 256, 88]
    x = np.concatenate([x for x, _ in parts])
    assert x.dtype == np.uint8
    assert abs(x.mean() - 127.5) < 5
    expected = {"uniform": 256 / np.sqrt(12), "gaussian": 62.2}[kind]  # clipping takes some off 64
    assert abs(x.std() - expected) < 4


def run(**changes):
    x = images(20, 0, 256, 0)
    arguments = {"samples": batches(x), "reference": batches(x), "features": SPACE, "noise": False}
    return evaluation.evaluate(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": []}, "at least 2 images are needed, got 0"),
        ({"samples": batches(images(1, 0, 9, 0))}, "at least 2 images are needed, got 1"),
        ({"samples": [(np.zeros((4, *SHAPE)), None)]}, "dtype float64.*to_uint8"),
        ({"samples": [(np.zeros((4, 2, 2, 3), np.uint8), None)]}, r"\(2, 2, 3\).*\(2, 2, 1\)"),
        (
            {"samples": batches(images(9, 0, 9, 0), np.full(9, 5)), "probabilities": bright},
            r"labels span 5\.\.5: 0\.\.1 allowed",
        ),
        (
            {"samples": batches(images(9, 0, 9, 0), np.zeros(9)), "probabilities": bright},
            "labels float64",
        ),
        (
            {"features": features.function("broken", 1, lambda x: x.mean((1, 2)) / 0 * 0)},
            "features 'broken' hold NaN",
        ),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)


def test_an_unknown_metric_is_refused_with_the_nearest_one():
    with pytest.raises(UserError, match="Did you mean 'frechet'"):
        run(metrics=["frechett"])
