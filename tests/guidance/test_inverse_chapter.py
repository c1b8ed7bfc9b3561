"""docs/inverse.md: its blocks run in order, and say what the text says of them."""

import pathlib
import re

import numpy as np

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "inverse.md").read_text()


def test_the_chapters_code_runs_and_keeps_its_word():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(block, names)
    inpaint, small, test = names["inpaint"], names["small"], names["test"]
    wanted = inpaint(test[:4])
    for name in ("ddnm", "repaint"):
        np.testing.assert_allclose(inpaint(names["filled"][name]), wanted, atol=1e-5)
    np.testing.assert_allclose(small(names["enlarged"]), small(test[:4]), atol=1e-5)
    # Within the noise of y, not on y; and the last: nearer to y than any digit's draw would be.
    gap = small(names["plus"]) - names["noisy"], small(names["bayes"]) - names["noisy"]
    for g in gap:
        assert 0.03 < np.sqrt(np.mean(g**2)) < 0.4
    for name, value in names["total"](names["dark"]).items():
        assert np.abs(value - names["total"](test[:4])[name]).max() < 0.1
