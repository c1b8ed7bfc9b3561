"""experiments/imagen_thresholding.py: its measures by hand, and draws from an exact denoiser."""

import importlib.util
import pathlib

import exact_run
import numpy as np
import pytest
from rich.console import Console

from jdiff.data import sources
from jdiff.evaluation import classifier
from jdiff.evaluation.moments import Moments

_PATH = pathlib.Path(__file__).parents[1] / "experiments" / "imagen_thresholding.py"
_SPEC = importlib.util.spec_from_file_location("imagen_thresholding", _PATH)
thresholding = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(thresholding)


def test_saturated_are_the_values_at_either_end_and_beyond():
    x = np.array([-1.5, -1.0, -0.9, 0.0, 0.9, 0.999, 1.0, 3.0]).reshape(2, 2, 2, 1)
    share, mean = thresholding.saturation(x)
    assert share == 5 / 8  # 0.999 is within half a level of the end
    assert mean == pytest.approx(np.mean([1.5, 1, 0.9, 0, 0.9, 0.999, 1, 3]))


def test_the_mean_of_real_images_is_at_no_distance_and_all_are_found():
    """Real images measured as samples against themselves, by a classifier that knows them."""

    class Knows:
        """Features are the pixels; the class is the label that is written into the first one."""

        def features(self, images):
            return images.reshape(len(images), -1).astype(np.float32)

        def predict(self, images):
            return images[:, 0, 0, 0].astype(int) // 20

    labels = np.arange(10)
    images = np.random.default_rng(0).integers(0, 256, (10, 2, 2, 1))
    images[:, 0, 0, 0] = labels * 20
    x = images / 127.5 - 1
    found = thresholding.measured(x, labels, Knows(), Moments.of(Knows().features(images)))
    assert found.frechet == pytest.approx(0, abs=1e-6)
    assert found.found == 1.0
    np.testing.assert_array_equal(found.images, images)


def test_what_each_kind_allows_under_strong_guidance(tmp_path):
    """The exact denoiser of 300 digits, guided at 8: bounds that follow from the definitions."""
    run = exact_run.make(tmp_path)
    real = sources.source("digits", "train").gather(range(300))
    judge = classifier.train(real["image"], real["label"], steps=5)
    reference = Moments.of(judge.features(real["image"]))
    sizes = thresholding.Sizes(scales=(8.0,), num=20)
    results = thresholding.measure(
        run, thresholding.Judge(judge, reference, None), sizes, Console(quiet=True)
    )
    assert set(results) == {(kind, 8.0) for kind in thresholding.KINDS}
    drawn = {kind: thresholding.draw(run, kind, 8.0, 20, lambda n: None) for kind in
             thresholding.KINDS}  # fmt: skip
    assert np.abs(drawn["none"]).max() > 1.001
    assert np.abs(drawn["static"]).max() <= 1.0 and np.abs(drawn["dynamic"]).max() <= 1.0
    assert results["dynamic", 8.0].saturated <= results["static", 8.0].saturated
    assert results["none", 8.0].magnitude == pytest.approx(np.abs(drawn["none"]).mean(), rel=1e-5)

    real = thresholding.Measured(0.5, 0.7, 0.0, 1.0, real["image"])
    lines = thresholding.table("digits", results, real).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| 8 | ") and lines[3].startswith("| held-out")
    thresholding.picture("digits", results, real, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
