"""docs/guidance.md: its blocks run in order, and say what the text says of them."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from closed_forms import same

from jdiff import guidance

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "guidance.md").read_text()


def test_the_chapters_code_runs_and_keeps_its_word():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(block, names)
    assert names["images"].shape == (3, 8, 8, 1)
    assert np.isfinite(names["images"]).all()
    assert np.abs(names["by_scale"][0] - names["by_scale"][3]).max() > 0.05
    call = jax.jit(lambda denoise, x, t, cond: denoise(x, t, cond))
    x, t = jax.random.normal(jax.random.key(3), (3, 8, 8, 1)), jnp.asarray([0.3, 0.5, 0.7])
    cond = {"label": jnp.asarray([0, 1, 2])}
    same(call(names["bayes"], x, t, cond), call(names["denoise"], x, t, cond), 1e-2, 1e-3)


def test_every_guidance_is_in_the_chapter():
    named = set(re.findall(r"`(?:scales\.)?(\w+)", TEXT)) | set(re.findall(r"(\w+)\(", TEXT))
    made = {n for n in guidance.__all__ if n.islower()} - {"extrapolate", "scales"}
    assert made <= named, f"not in docs/guidance.md: {sorted(made - named)}"
