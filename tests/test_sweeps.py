"""A sweep is the loop over its grid, in one program, with its coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import denoisers, grids, guidance, sample, schedules, solvers

KEY, S = jax.random.key(3), schedules.edm()
DENOISE = denoisers.mixture(
    jnp.asarray([[-1.0], [0.5], [1.0]]), 0.05, S, labels=np.array([0, 1, 0])
)
LABEL = {"label": jnp.asarray([0, 1])}


def _draw(denoiser, solver, times, key=KEY):
    return sample(key, denoiser, times=times, solver=solver, shape=(1,), num=2, cond=LABEL)


def _guided(scale):
    return guidance.cfg(DENOISE, scale, {"label": 2})


SCALES, CHURNS, RHOS = [0.0, 1.0, 3.0], [0.0, 4.0], [3.0, 5.0, 7.0, 9.0]


@pytest.mark.parametrize("chunk", [None, 5, 1])
def test_every_point_is_what_a_call_of_its_own_gives(chunk):
    times = jnp.stack([grids.karras(S, 5, rho=rho) for rho in RHOS])
    found = jdiff.sweep(
        _draw,
        over={
            "solver": [solvers.edm(churn) for churn in CHURNS],
            "times": times,
            "denoiser": [_guided(w) for w in SCALES],
        },
        chunk=chunk,
    )
    assert found.result.shape == (2, 4, 3, 2, 1)
    assert list(found.axes) == ["solver", "times", "denoiser"]
    for i, j, k in [(0, 0, 0), (1, 2, 1), (0, 3, 2), (1, 3, 2)]:
        alone = _draw(_guided(SCALES[k]), solvers.edm(CHURNS[i]), times[j])
        np.testing.assert_allclose(found.result[i, j, k], alone, rtol=1e-4, atol=1e-5)


def test_keys_are_an_axis_and_sample_itself_a_function():
    keys = jax.random.split(KEY, 3)
    times = grids.karras(S, 4)
    found = jdiff.sweep(
        sample, over={"key": keys},
        fixed=dict(denoiser=DENOISE, times=times, solver=solvers.ddim(), shape=(1,), num=2),
    )  # fmt: skip
    for key, x in zip(keys, found.result):
        alone = sample(key, DENOISE, times=times, solver=solvers.ddim(), shape=(1,), num=2)
        np.testing.assert_allclose(x, alone, rtol=1e-5)


def test_it_is_traced_once_and_not_again_for_new_numbers():
    traced = []

    def fn(a, b, scale):
        traced.append(1)
        return {"sum": scale * (a + b), "pair": (a, b)}

    for a in ([1.0, 2.0], [5.0, -1.0]):
        found = jdiff.sweep(fn, {"a": a, "b": np.arange(3.0)}, fixed={"scale": jnp.asarray(2.0)})
        np.testing.assert_allclose(found.result["sum"], 2 * np.add.outer(a, np.arange(3.0)))
    assert len(traced) == 1


def test_leaves_that_entries_share_are_not_repeated():
    """Two guided denoisers of one network hold its weights once."""
    scale_of = lambda denoiser: denoiser.scale

    def program(guided):
        return str(jax.make_jaxpr(lambda: jdiff.sweep(scale_of, {"denoiser": guided}).result)())

    one, other = (denoisers.exact(jnp.ones((50, 1)), S) for _ in range(2))
    null = {"label": 0}
    assert "f32[2,50,1]" not in program([guidance.cfg(one, w, null) for w in (1.0, 2.0)])
    assert "f32[2,50,1]" in program([guidance.cfg(d, 1.0, null) for d in (one, other)])


def test_points_and_coordinates():
    found = jdiff.sweep(lambda a, b: a * b, {"a": [1.0, 2.0, 4.0], "b": [10, 20]})
    assert [(p, float(r)) for p, r in found][:3] == [
        ({"a": 1.0, "b": 10}, 10.0), ({"a": 1.0, "b": 20}, 20.0), ({"a": 2.0, "b": 10}, 20.0),
    ]  # fmt: skip
    np.testing.assert_allclose(found.at(a=2.0), [20.0, 40.0])
    assert float(found.at(b=20, a=3.9)) == 80.0


@pytest.mark.parametrize(
    ("over", "fixed", "said"),
    [
        ({}, None, "over is empty"),
        ({"a": []}, None, r"over\['a'\] must be an array or a list with at least one entry"),
        ({"a": 3.0}, None, r"over\['a'\] must be an array or a list"),
        ({"a": [1.0]}, {"a": 2.0}, r"\['a'\] is given in over and in fixed"),
        ({"a": [solvers.ddim(), solvers.heun()]}, None, r"over\['a'\]\[1\] differs in structure"),
        ({"a": [{"x": np.zeros(2)}, {"x": np.zeros(3)}]}, None, r"differ in shape at leaf \['x'\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_one_program_is_refused_by_name(over, fixed, said):
    with pytest.raises(jdiff.UserError, match=said):
        jdiff.sweep(lambda a: a, over, fixed=fixed)


def test_an_unknown_axis_is_named_with_the_nearest():
    found = jdiff.sweep(lambda scale: scale, {"scale": [1.0]})
    with pytest.raises(jdiff.UserError, match="Did you mean 'scale'"):
        found.at(scales=1.0)
