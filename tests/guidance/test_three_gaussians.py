"""experiments/guidance_mixture.py: its density, and that guidance does not sample it."""

import importlib.util
import pathlib

import numpy as np
import pytest

_PATH = pathlib.Path(__file__).parents[2] / "experiments" / "guidance_mixture.py"
_SPEC = importlib.util.spec_from_file_location("guidance_mixture", _PATH)
mixture = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(mixture)


def test_the_tilted_density_is_the_class_at_1_and_the_whole_at_0():
    points = mixture.cells(2)
    moments = mixture.moments(points, mixture.tilted(1.0, points))
    np.testing.assert_allclose(moments, [1.0, 0.5, 0.5], atol=1e-3)
    mean, along, across = mixture.moments(points, mixture.tilted(0.0, points))
    assert mean == pytest.approx(0.0, abs=1e-6)
    # 0.5 ^ 2, and the variance of the means: (1 + 1 / 4 + 1 / 4) / 3 = 1 / 2 on either axis
    np.testing.assert_allclose([along, across], np.sqrt([0.75, 0.75]), atol=1e-3)


def test_guided_samples_are_the_class_at_1_and_not_the_tilted_density_above():
    for w, differs in ((1.0, False), (4.0, True)):
        _, *rest = mixture.row(w, mixture.draw(w, 2000, 24)[0])
        samples, tilted, (distance, chance) = rest[:3], rest[3:6], rest[6:]
        assert (samples[0] - tilted[0] > 0.5) == differs
        assert (distance > 3 * chance) == differs
