"""The chapters' code runs, block after block, and the tables name what there is."""

import pathlib
import re

import jax
import numpy as np
import pytest

from jdiff import solvers

DOCS = pathlib.Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"```python\n(.*?)```", re.S)


@pytest.mark.parametrize(
    "chapter",
    [
        "solvers.md",
        "training.md",
        "few_step.md",
        "models.md",
        "interop.md",
        "profiling.md",
        "scale.md",
        "long_sequences.md",
        "cascades.md",
        "texts.md",
        "latent.md",
    ],
)
def test_the_code_of_a_chapter_runs(chapter):
    names = {}
    for block in BLOCK.findall((DOCS / chapter).read_text()):
        exec(block, names)  # noqa: S102, our own text
    arrays = [v for v in names.values() if isinstance(v, jax.Array) and not v.is_deleted()]
    floats = [v for v in arrays if jax.dtypes.issubdtype(v.dtype, np.floating)]
    assert floats and all(np.isfinite(v).all() for v in floats)
    if chapter == "solvers.md":  # what its sentences say of the numbers
        other = names["x"]  # of another path
        assert (
            np.abs(names["coarse"] - names["fine"]).mean()
            < 0.2 * np.abs(other - names["fine"]).mean()
        )
        assert np.abs(names["again"] - names["x"]).mean() < 0.05


def test_every_solver_is_in_the_chapter():
    named = set(re.findall(r"`(\w+)", (DOCS / "solvers.md").read_text()))
    assert set(solvers.BY_NAME) <= named, sorted(set(solvers.BY_NAME) - named)
