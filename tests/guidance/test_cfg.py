"""Classifier-free guidance: its convention, scales, interval and rescale, and its compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import mixture_1d, same

from jdiff import UserError, denoisers, grids, guidance, sample, sampling, schedules, solvers
from jdiff.predictions import Prediction, corrupt, from_x0
from jdiff.pytree import stack, unstack

EDM = schedules.edm()
DENOISE, _ = mixture_1d(EDM, labels=True)
NULL = {"label": 2}
X = jnp.asarray([[0.3], [-1.4], [2.0]])
T = jnp.asarray([0.4, 1.0, 3.0])
COND = {"label": jnp.asarray([0, 1, 0])}
_call = jax.jit(lambda denoise, x, t, cond: denoise(x, t, cond))
GOOD = _call(DENOISE, X, T, COND)
BAD = _call(DENOISE, X, T, {"label": jnp.full(3, 2)})


def test_scale_1_is_the_conditional_model_and_scale_0_the_unconditional():
    same(_call(guidance.cfg(DENOISE, 1.0, NULL), X, T, COND), GOOD, 1e-6, 1e-6)
    same(_call(guidance.cfg(DENOISE, 0.0, NULL), X, T, COND), BAD, 1e-6, 1e-6)
    assert np.abs(GOOD.x0 - BAD.x0).max() > 0.1  # or the two lines above say nothing


@pytest.mark.parametrize("scale", [-0.5, 0.5, 2.0, 7.5])
def test_guidance_extrapolates_both_endpoints_from_null_to_conditional(scale):
    """scale = 1 + w of Ho and Salimans 2022: (1 + w) eps_c - w eps_null."""
    w = scale - 1
    made = _call(guidance.cfg(DENOISE, scale, NULL), X, T, COND)
    np.testing.assert_allclose(made.eps, (1 + w) * GOOD.eps - w * BAD.eps, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(made.x0, (1 + w) * GOOD.x0 - w * BAD.x0, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(corrupt(EDM, made.x0, made.eps, T), X, rtol=1e-4, atol=1e-4)


def test_a_scale_for_each_sample_equals_separate_calls():
    scales = jnp.asarray([0.0, 1.5, 4.0])
    together = _call(guidance.cfg(DENOISE, scales, NULL), X, T, COND)
    for i, w in enumerate(scales):
        alone = _call(guidance.cfg(DENOISE, w, NULL), X, T, COND)
        same(jax.tree.map(lambda a, i=i: a[i], alone), jax.tree.map(lambda a, i=i: a[i], together))


def test_a_scale_in_the_condition_follows_its_sample_through_the_chunks():
    scales, labels = jnp.asarray([0.0, 1.0, 2.0, 3.0, 4.0]), jnp.asarray([0, 1, 0, 1, 0])
    denoise = guidance.cfg(DENOISE, guidance.per_sample("w"), NULL)
    settings = dict(shape=(1,), solver=solvers.ddim(), times=grids.karras(EDM, 5))
    chunked = sample(
        jax.random.key(0), denoise, cond={"label": labels, "w": scales}, batch=2, **settings
    )
    for i, w in enumerate(scales):
        alone = sample(
            jax.random.key(0), guidance.cfg(DENOISE, w, NULL), cond={"label": labels[i : i + 1]},
            ids=jnp.asarray([i]), **settings,
        )  # fmt: skip
        np.testing.assert_allclose(chunked[i], alone[0], rtol=1e-4, atol=1e-5)


def test_the_scale_in_the_condition_is_not_shown_to_the_denoiser():
    seen = []

    def denoise(x, t, cond):
        seen.append(sorted(cond))
        return Prediction(x, x)

    made = guidance.cfg(denoise, guidance.per_sample(), {"label": 2})
    made(X, T, {"label": COND["label"], "scale": jnp.ones(3), "low": X})
    assert seen == [["label", "low"]]


def test_what_null_does_not_name_is_kept_and_pairs_are_neighbours():
    """A sample's two members lie side by side, so a sharded batch keeps them on one device."""
    seen = {}

    def denoise(x, t, cond):
        seen.update(x=x, t=t, cond=cond)
        return Prediction(x, x)

    guidance.cfg(denoise, 2.0, {"label": 2})(X, T, {"label": COND["label"], "low": 5 * X})
    np.testing.assert_array_equal(seen["x"], jnp.repeat(X, 2, 0))
    np.testing.assert_array_equal(seen["t"], jnp.repeat(T, 2))
    np.testing.assert_array_equal(seen["cond"]["low"], jnp.repeat(5 * X, 2, 0))
    np.testing.assert_array_equal(seen["cond"]["label"], [0, 2, 1, 2, 0, 2])


def test_unstack_undoes_stack_for_any_number_of_members():
    trees = [{"a": X + i, "b": T * i} for i in range(3)]
    for one, other in zip(unstack(stack(trees), 3), trees):
        same(one, other, 0, 0)


def test_an_interval_is_open_below_and_closed_above_in_log_snr():
    """With conditional 1 and null 0, the guided prediction is the scale that acted."""
    t = jnp.exp(-0.5 * jnp.asarray([-2.0, 0.0, 3.0]))
    low, middle, high = EDM.logsnr(t)  # uncompiled, so that the ends are hit exactly

    def denoise(x, t, cond):
        one = (cond["label"] != 2).astype(jnp.float32)[:, None]
        return Prediction(one, one)

    def acted(interval):
        denoiser = denoisers.function(denoise, EDM)
        return guidance.cfg(denoiser, 3.0, NULL, interval=interval)(X, t, COND).x0[:, 0].tolist()

    assert acted((low, high)) == [1.0, 3.0, 3.0]
    assert acted((low - 0.1, high)) == [3.0, 3.0, 3.0]
    assert acted((low, high - 0.1)) == [1.0, 3.0, 1.0]
    assert acted((middle, high)) == [1.0, 1.0, 3.0]


def _counted(calls):
    """A denoiser that notes the sizes of the batches that are computed, compiled or not."""

    def denoise(x, t, cond):
        jax.debug.callback(lambda n: calls.append(int(n)), len(x))
        return DENOISE(x, t, cond)

    return denoisers.function(denoise, EDM)


def test_outside_an_interval_the_null_is_not_computed():
    """Neither by solvers nor in sweeps over scales; where one sample needs it, all have it."""
    calls = []
    guided = lambda scale: guidance.cfg(_counted(calls), scale, NULL, interval=(-1.0, 2.0))

    def computed(f, *inputs):
        calls.clear()
        jax.block_until_ready(f(*inputs))
        jax.effects_barrier()
        return sorted(calls)

    for call in (jax.jit(guided(3.0)), guided(3.0)):
        assert computed(call, X, 3.0, COND) == [3] and computed(call, X, 1.0, COND) == [6]
        assert computed(call, X, T, COND) == [6]
    assert computed(guidance.rescale(guidance.apg(guided(3.0)), 0.5), X, 3.0, COND) == [3]
    assert computed(guidance.cfg_pp(guided(0.5)), X, 3.0, COND) == [6]

    times = grids.karras(EDM, 6)
    draw = lambda denoise: sample(
        jax.random.key(0), denoise, shape=(1,), cond=COND, times=times, solver=solvers.euler()
    )
    acts = [-1.0 < -2 * np.log(t) <= 2.0 for t in times[:-1]]
    sizes = sorted(6 if inside else 3 for inside in acts)
    assert 0 < sum(acts) < 6 and computed(draw, guided(3.0)) == sizes
    everywhere = lambda s, t: jnp.where((s.logsnr(t) > -1.0) & (s.logsnr(t) <= 2.0), 3.0, 1.0)
    same(draw(guided(3.0)), draw(guidance.cfg(DENOISE, everywhere, NULL)), 1e-4, 1e-5)

    plain = lambda scale: guidance.cfg(DENOISE, scale, NULL, interval=(-1.0, 2.0))
    sweep = jax.vmap(lambda scale: draw(plain(scale)))
    assert " cond[" in str(jax.make_jaxpr(sweep)(jnp.asarray([1.0, 3.0])))
    np.testing.assert_allclose(sweep(jnp.asarray([1.0, 3.0]))[1], draw(plain(3.0)), rtol=1e-4)


class _Images:
    """A labelled denoiser of random images: std 1 for label 0, other means for the null."""

    KEYS = jax.random.split(jax.random.key(7), 2)
    good = (
        jax.random.normal(KEYS[0], (3, 4, 4, 2)) * jnp.asarray([1.0, 0.5, 2.0])[:, None, None, None]
    )
    bad = jax.random.normal(KEYS[1], (3, 4, 4, 2))

    @classmethod
    def denoise(cls, x, t, cond):
        pick = (cond["label"] == 2)[:, None, None, None]
        return from_x0(
            EDM, x, jnp.where(pick, jnp.repeat(cls.bad, 2, 0), jnp.repeat(cls.good, 2, 0)), t
        )  # noqa: E501


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_rescale_gives_back_each_samples_own_standard_deviation(share):
    """Lin et al. 2023, section 3.4: share of x0 std(good) / std(guided), per sample."""
    x = jax.random.normal(jax.random.key(1), (3, 4, 4, 2))
    denoise = denoisers.function(_Images.denoise, EDM)
    made = guidance.cfg(denoise, 4.0, NULL, rescale=share)(x, T, COND)
    plain = np.asarray(guidance.cfg(denoise, 4.0, NULL)(x, T, COND).x0)
    for i in range(3):
        wanted = plain[i] * np.asarray(_Images.good[i]).std() / plain[i].std()
        np.testing.assert_allclose(made.x0[i], share * wanted + (1 - share) * plain[i], rtol=1e-4)
    np.testing.assert_allclose(corrupt(EDM, made.x0, made.eps, T), x, rtol=1e-4, atol=1e-5)


def test_guidance_composes_in_the_order_it_is_applied():
    """Clipping the guided image is not guiding the clipped images."""
    x = jax.random.normal(jax.random.key(1), (3, 4, 4, 2))
    denoise = denoisers.function(_Images.denoise, EDM)
    after = guidance.static_threshold(guidance.cfg(denoise, 4.0, NULL))(x, T, COND).x0
    before = guidance.cfg(guidance.static_threshold(denoise), 4.0, NULL)(x, T, COND).x0
    good, bad = _Images.good, _Images.bad
    np.testing.assert_allclose(after, np.clip(bad + 4 * (good - bad), -1, 1), atol=1e-5)
    clipped = [np.clip(a, -1, 1) for a in (good, bad)]
    np.testing.assert_allclose(before, clipped[1] + 4 * (clipped[0] - clipped[1]), atol=1e-4)
    assert np.abs(before).max() > 1.5


def test_low_precision_predictions_are_extrapolated_in_float32():
    good, bad = (Prediction(*[jnp.full((1, 2), v, jnp.bfloat16)] * 2) for v in (1.0, 1.0078125))
    made = guidance.extrapolate(bad, good, 1.5)
    assert made.x0.dtype == jnp.float32
    np.testing.assert_allclose(made.x0, 1.0078125 - 1.5 * 0.0078125)


def test_a_scale_interval_rescale_or_null_of_another_value_does_not_recompile():
    times, key = grids.karras(EDM, 3), jax.random.key(0)

    def draw(scale, low, rescale, null):
        denoise = guidance.cfg(
            DENOISE, scale, {"label": null}, interval=(low, 5.0), rescale=rescale
        )
        return sample(key, denoise, shape=(3,), cond=COND, times=times)

    draw(1.5, -3.0, 0.1, 2)
    compiled = sampling._run._cache_size()
    results = [draw(2.5, -3.0, 0.1, 2), draw(2.5, -2.0, 0.3, 2), draw(2.5, -2.0, 0.3, 1)]
    assert sampling._run._cache_size() == compiled
    assert len({float(r.sum()) for r in results}) == 3
    draw(2, -3.0, 0.1, 2)  # a whole number is a scale like any other
    assert sampling._run._cache_size() == compiled


def test_sixteen_scales_are_one_vmapped_program_and_equal_the_loop():
    times, key = grids.karras(EDM, 4), jax.random.key(0)

    def draw(w):
        return sample(key, guidance.cfg(DENOISE, w, NULL), shape=(1,), cond=COND, times=times)

    scales = jnp.linspace(0.0, 4.0, 16)
    before = sampling._run._cache_size()
    many = jax.vmap(draw)(scales)
    assert sampling._run._cache_size() <= before + 1
    np.testing.assert_allclose(many, jnp.stack([draw(w) for w in scales]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: guidance.cfg(DENOISE, 2.0, NULL, interval=(3.0, 1.0)), r"interval=.* is empty"),
        (lambda: guidance.cfg(DENOISE, 2.0, NULL, rescale=1.5), r"rescale=1.5 given; .* \[0, 1\]"),
        (lambda: guidance.cfg(lambda *_: 0, 2.0, NULL, rescale=0.5), r"cfg: .* pass schedule="),
        (lambda: guidance.cfg(DENOISE, 2.0, {"lable": 2})(X, T, COND), r"'lable' .* mean 'label'"),
        (lambda: guidance.cfg(DENOISE, 2.0, {"label": T[:2]})(X, T, COND), r"null\['label'\]"),
    ],
)  # fmt: skip
def test_guidance_that_cannot_work_is_refused_by_name(make, said):
    with pytest.raises(UserError, match=said):
        make()
