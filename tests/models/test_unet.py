"""The U-Net: published counts, its blocks in closed form, and what conditions may change."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from flax import nnx

from jdiff import models
from jdiff.models import layers
from jdiff.models.low_res import with_low_res
from jdiff.models.unet_blocks import INITS, STYLES, Block

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((3, 8, 8, 2)).astype(np.float32)
T = np.asarray([-1.0, 0.2, 0.9], np.float32)
LABEL = np.asarray([1, 4, 0], np.int32)
QUICK = {"xla_backend_optimization_level": 0}  # compiles faster
FIELDS = {
    "image_size": 8,
    "in_channels": 2,
    "channels": 8,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention_sizes": (4,),
    "num_classes": 4,
    "augment_dim": 3,
}


def small(rngs, **changes):
    return models.UNet(**(FIELDS | changes), rngs=rngs)


@functools.cache
def network(**changes):
    """`(jitted apply, params)` with every weight random, compiled once for all tests."""
    apply, params = models.init(functools.partial(small, **changes), KEY)
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda w: w + 0.1 * random.standard_normal(w.shape, np.float32), params)
    return jax.jit(apply), params


@functools.cache
def gradient(**changes):
    """Of a squared error, with respect to every weight."""
    apply, params = network(**changes)
    loss = jax.grad(lambda p: jnp.square(apply(p, X, T, cond()) - X).sum())
    return jax.jit(loss, compiler_options=QUICK)(params)


def cond(label=LABEL, augment=0.5):
    return {"label": label, "augment": np.full((3, 3), augment, np.float32)}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (models.ddpmpp_cifar10(), 55_733_891),
        (models.ddpmpp_cifar10(num_classes=10), 55_735_299),
        (models.ddpmpp_cifar10(augment_dim=0), 55_732_739),
        (models.ddpmpp_cifar10(image_size=64, multipliers=(1, 2, 2, 2)), 61_805_571),
        (models.ncsnpp_cifar10(), 56_397_827),
        (models.ncsnpp_cifar10(num_classes=10), 56_400_643),
        (models.adm_imagenet64(), 295_899_267),
        (models.adm_imagenet(64), 295_904_454),
        (models.adm_imagenet(128), 421_529_606),
        (models.adm_imagenet(256), 553_838_086),
        (models.adm_imagenet(256, num_classes=0), 552_814_086),
        (models.adm_imagenet(512), 558_997_638),
        (models.adm_upsampler(256), 311_795_910),
        (models.iddpm_cifar10(), 52_546_438),
        (models.ddpm_cifar10(), 35_746_307),
        (models.ddpm_cifar10(image_size=256, multipliers=(1, 1, 2, 2, 4, 4)), 113_673_219),
    ],
)
def test_published_parameter_counts(fields, expected):
    _, shapes = models.abstract(lambda rngs: models.UNet(**fields, rngs=rngs))
    assert models.count(shapes) == expected


@pytest.mark.parametrize("style", STYLES)
def test_samples_do_not_see_each_other(style):
    apply, params = network(style=style)
    y = np.asarray(apply(params, X, T, cond()))
    assert y.shape == X.shape
    assert y.dtype == np.float32
    others = X.copy()
    others[1:] += 1.0
    z = np.asarray(apply(params, others, T, cond()))
    np.testing.assert_allclose(z[0], y[0], rtol=1e-5, atol=1e-6)
    assert (np.abs(z[1:] - y[1:]).max(axis=(1, 2, 3)) > 1e-3).all()
    # Every input of a sample reaches its output and no other.
    for changed in (
        apply(params, X, T + np.asarray([0, 0.5, 0], np.float32), cond()),
        apply(params, X, T, cond(label=np.asarray([1, 2, 0], np.int32))),
        apply(
            params,
            X,
            T,
            cond() | {"augment": np.asarray([[0.5] * 3, [2.0] * 3, [0.5] * 3], np.float32)},
        ),
    ):
        moved = np.abs(np.asarray(changed) - y).max(axis=(1, 2, 3))
        assert moved[1] > 1e-4
        assert moved[[0, 2]].max() < 1e-5


def test_low_res_is_enlarged_between_the_centres_of_its_pixels():
    """So the border repeats; a stem that passes the last channel on shows what arrives there."""
    apply, shapes = models.abstract(functools.partial(small, low_res_channels=1, num_classes=0))
    low = np.asarray([[0, 1], [0, 1]], np.float32)[None, :, :, None]
    got = with_low_res(apply.skeleton(), X[:1], {"low_res": low}, 1)
    np.testing.assert_array_equal(got[..., :2], X[:1])
    row = [0, 0, 1 / 8, 3 / 8, 5 / 8, 7 / 8, 1, 1]
    np.testing.assert_allclose(got[0, :, :, 2], np.tile(row, (8, 1)), rtol=1e-6)
    assert shapes["stem"]["kernel"].shape == (3, 3, 3, 8)


def test_low_res_is_as_good_as_channels_of_x():
    """Of the full size it is what x's own channels would be; the output has x's alone."""
    wide, params = network(style="ncsnpp", in_channels=3, out_channels=2)
    narrow, _ = models.abstract(functools.partial(small, style="ncsnpp", low_res_channels=1))
    both = np.concatenate([X, X[..., :1] ** 2], axis=-1)
    y = wide(params, both, T, cond())
    given = cond() | {"low_res": both[..., 2:]}
    np.testing.assert_allclose(
        jax.jit(narrow)(params, X, T, given), y, rtol=1e-4, atol=1e-5 * np.abs(y).max()
    )


def test_low_res_missing_or_misshapen():
    apply, shapes = models.abstract(functools.partial(small, low_res_channels=1))
    with pytest.raises(ValueError, match=r"UNet needs cond\['low_res'\] of shape \[3, h, w, 1\]"):
        jax.eval_shape(apply, shapes, X, T, cond())
    with pytest.raises(ValueError, match=r"takes cond\['low_res'\] of shape .* not \[3, 8, 8, 2\]"):
        jax.eval_shape(apply, shapes, X, T, cond() | {"low_res": X})


def test_levels_may_be_narrower_than_channels():
    """ADM at 512 px starts at half of its channels, and so does its first convolution."""
    build = functools.partial(small, style="adm", multipliers=(0.5, 1))
    _, shapes = models.abstract(build)
    assert shapes["stem"]["kernel"].shape == (3, 3, 2, 4)
    assert shapes["time1"]["kernel"].shape == (8, 32)
    with pytest.raises(ValueError, match=r"multipliers=\(0.3, 1\) must make whole numbers"):
        models.abstract(functools.partial(build, multipliers=(0.3, 1)))


def test_unknown_adm_offers_the_nearest():
    with pytest.raises(ValueError, match="adm_imagenet: image_size '257' is not known"):
        models.adm_imagenet(257)


TEXT = np.random.default_rng(3).standard_normal((3, 4, 6)).astype(np.float32)
MASK = np.asarray([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]], bool)


def test_text_reaches_its_sample_through_the_tokens_to_see():
    changes = {"style": "adm", "multipliers": (1,), "text_width": 6, "attention_sizes": ()}
    apply, params = network(**changes)
    given = cond() | {"text": TEXT, "text_mask": MASK}
    y = np.asarray(apply(params, X, T, given))
    hidden = given | {"text": np.where(MASK[..., None], TEXT, 100.0)}
    np.testing.assert_allclose(apply(params, X, T, hidden), y, rtol=1e-4, atol=1e-5)
    other = given | {"text": TEXT * np.asarray([1, 0, 1], np.float32)[:, None, None]}
    moved = np.abs(np.asarray(apply(params, X, T, other)) - y).max(axis=(1, 2, 3))
    assert moved[1] > 1e-3
    assert moved[[0, 2]].max() < 1e-5
    # Text takes two ways, the pooled vector and the middle's attention; each goes alone.
    silence = functools.partial(jax.tree.map, jnp.zeros_like)
    middle = params["middle"]["0"]
    middle = params["middle"] | {"0": middle | {"text": silence(middle["text"])}}
    for one_way in ({"pool": silence(params["pool"])}, {"middle": middle}):
        z = [apply(params | one_way, X, T, text) for text in (given, other)]
        assert np.abs(z[0] - z[1])[1].max() > 1e-3
    assert "text" not in params["encoder"]["0"]["blocks"]["0"]


def test_imagens_base_attends_to_text_at_three_resolutions():
    _, shapes = models.abstract(lambda rngs: models.UNet(**models.imagen_base(), rngs=rngs))
    attending = ["text" in shapes["encoder"][str(i)]["blocks"]["2"] for i in range(4)]
    assert attending == [False, True, True, True]
    widths = [
        shapes["encoder"][str(i)]["blocks"]["2"]["conv2"]["kernel"].shape[3] for i in range(4)
    ]
    assert widths == [512, 1024, 1536, 2048]


@pytest.mark.parametrize("style", ["ddpmpp", "adm"])
def test_null_label_adds_nothing(style):
    apply, params = network(style=style)
    null = np.full(3, 4, np.int32)
    y = apply(params, X, T, cond(label=null))
    kernel = jnp.zeros_like(params["label"]["kernel"])
    silent = params | {"label": params["label"] | {"kernel": kernel}}
    np.testing.assert_allclose(y, apply(silent, X, T, cond()), rtol=1e-5, atol=1e-6)
    assert np.abs(y - apply(params, X, T, cond(label=null - 1))).max() > 1e-3


@pytest.mark.parametrize("style", ["ddpm", "ncsnpp", "adm"])  # DDPM++ has no layer of its own
def test_every_weight_gets_a_gradient(style, all_gradients_live):
    all_gradients_live(gradient(style=style))


def test_output_starts_at_zero():
    for style in ("ddpm", "adm"):
        _, params = models.init(functools.partial(small, style=style), KEY)
        assert not np.any(params["out_conv"]["kernel"])
        assert not np.any(params["out_conv"]["bias"])
        assert not np.any(params["middle"]["0"]["conv2"]["kernel"])
        assert not np.any(params["middle"]["0"]["project"]["kernel"])
    _, params = models.init(functools.partial(small, style="ddpmpp", channels=32), KEY)
    bound = 1e-5 * math.sqrt(6 / (9 * (32 + 2)))
    assert 0.9 * bound < np.abs(params["out_conv"]["kernel"]).max() <= bound * (1 + 1e-6)


def test_published_initial_spread():
    _, params = models.init(lambda r: small(r, style="ddpmpp", channels=64), KEY)
    block = params["middle"]["0"]
    assert np.std(block["conv1"]["kernel"]) == pytest.approx(math.sqrt(1 / (9 * 128)), rel=0.02)
    qkv = math.sqrt(0.2 * 2 / (128 + 384))
    assert np.std(block["qkv"]["kernel"]) == pytest.approx(qkv, rel=0.02)
    assert not np.any(block["conv1"]["bias"])
    _, params = models.init(lambda r: small(r, style="adm", channels=64, num_classes=50), KEY)
    block = params["middle"]["0"]
    assert np.std(block["conv1"]["kernel"]) == pytest.approx(math.sqrt(1 / 3 / (9 * 128)), rel=0.02)
    assert np.std(block["conv1"]["bias"]) == pytest.approx(math.sqrt(1 / 3 / (9 * 128)), rel=0.2)
    assert np.std(params["label"]["kernel"]) == pytest.approx(1.0, rel=0.02)
    assert not np.any(params["augment"]["kernel"])


def block_output(style, *, params=None, channels_out=8, embedding=None, **fields):
    """Output for X8 of a block whose branches end in zeros, but for `params`."""

    def build(rngs):
        common = {"width": 16, "dropout": 0.0, "style": style, "dtype": jnp.float32}
        return Block(8, channels_out, **common, **fields, rngs=rngs)

    apply, drawn = models.init(build, KEY)
    for name in {"conv2", "project"} & drawn.keys():
        drawn[name] = jax.tree.map(jnp.zeros_like, drawn[name])
    embedding = jnp.ones((2, 16)) if embedding is None else embedding
    return jax.jit(apply.merge(drawn | (params or {})).__call__)(X8, embedding, None)


X8 = np.random.default_rng(1).standard_normal((2, 4, 4, 8)).astype(np.float32)


@pytest.mark.parametrize(
    ("style", "factor"), [("ddpm", 1.0), ("ddpmpp", math.sqrt(0.5)), ("adm", 1.0)]
)
def test_a_silent_block_scales_its_skip(style, factor):
    s = dataclasses.replace(STYLES[style], head_channels=4)
    np.testing.assert_allclose(block_output(s), factor * X8, rtol=1e-6)
    attending = block_output(s, attend=True)
    np.testing.assert_allclose(attending, factor**2 * X8, rtol=1e-6)


def test_resampling_blocks_without_projection_only_resample():
    for direction, resample in (("up", layers.upsample), ("down", layers.downsample)):
        y = block_output(STYLES["adm"], resample=direction)
        np.testing.assert_allclose(y, resample(X8), rtol=1e-6)


def test_adaptive_norm_is_scale_then_shift():
    # With scale -1 nothing of the image is left, and silu(shift) enters the second convolution.
    shift = 0.7
    bias = np.concatenate([np.full(8, -1.0), np.full(8, shift)]).astype(np.float32)
    identity = np.zeros((3, 3, 8, 8), np.float32)
    identity[1, 1] = np.eye(8)
    params = {
        "affine": {"kernel": np.zeros((16, 16), np.float32), "bias": bias},
        "conv2": {"kernel": identity, "bias": np.zeros(8, np.float32)},
    }
    y = block_output(STYLES["adm"], params=params)
    np.testing.assert_allclose(y, X8 + shift / (1 + math.exp(-shift)), rtol=1e-5, atol=1e-6)


def test_additive_embedding_enters_before_the_norm():
    # The same shift of every channel is removed by a norm that comes after it.
    quiet, loud = (
        block_output(
            STYLES["ddpm"],
            params={
                "affine": {
                    "kernel": np.full((16, 8), v, np.float32),
                    "bias": np.zeros(8, np.float32),
                },
                "conv2": {
                    "kernel": np.ones((3, 3, 8, 8), np.float32),
                    "bias": np.zeros(8, np.float32),
                },
            },
        )
        for v in (0.0, 1.0)
    )
    assert np.abs(quiet - X8).max() > 0.1
    np.testing.assert_allclose(quiet, loud, atol=1e-3)


def test_residual_encoder_filters_the_unpadded_convolution():
    """NCSN++ convolves beyond the border and lets the filter remove the margin."""
    taps = (1, 3, 3, 1)
    conv = INITS["song"].conv(1, 1, 3, padding=2, rngs=nnx.Rngs(0))
    image = X[0, :, :, 0]
    y = layers.downsample(conv(image[None, :, :, None]), taps, pad=False)[0, :, :, 0]
    wide = scipy.signal.correlate2d(image, np.asarray(conv.kernel[...])[:, :, 0, 0], mode="full")
    kernel = np.outer(taps, taps) / 64
    expected = scipy.signal.correlate2d(wide, kernel, mode="valid")[::2, ::2]
    np.testing.assert_allclose(y, expected, atol=1e-5)
    _, shapes = models.abstract(lambda r: small(r, style="ncsnpp", multipliers=(1, 2, 2)))
    assert shapes["encoder"]["1"]["image"]["kernel"].shape == (3, 3, 2, 8)
    assert shapes["encoder"]["2"]["image"]["kernel"].shape == (3, 3, 8, 16)


@pytest.mark.parametrize(
    ("style", "first", "last"), [("ddpm", 0.0, 1.0), ("adm", 1.0, 0.0), ("ncsnpp", 0.0, 1.0)]
)
def test_embedding_of_time_zero_orders_sines_and_cosines(style, first, last, monkeypatch):
    apply, params = models.init(lambda r: small(r, style=style, channels=16, num_classes=0), KEY)
    seen = []
    monkeypatch.setattr(layers.Linear, "__call__", lambda self, x: seen.append(x) or x[:, :1])
    apply.merge(params).embed(jnp.zeros(1), {})
    assert float(seen[0][0, 0]) == first
    assert float(seen[0][0, -1]) == last


def test_dropout_follows_the_key():
    small = {"style": "ddpmpp", "multipliers": (1,)}
    apply, params = network(**small, dropout=0.5)
    run = functools.partial(apply, params, X, T, cond())
    np.testing.assert_array_equal(run(), run())
    one, same, other = run(key=KEY), run(key=KEY), run(key=jax.random.key(1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3
    assert np.abs(one - run()).max() > 1e-3
    without, _ = network(**small)
    np.testing.assert_allclose(run(), without(params, X, T, cond()), rtol=1e-5, atol=1e-6)


def test_blocks_drop_independently(monkeypatch):
    apply, shapes = models.abstract(functools.partial(small, dropout=0.5, num_classes=0))
    keys = []
    monkeypatch.setattr(layers, "dropout", lambda x, rate, key: keys.append(key) or x)
    jax.eval_shape(lambda p, key: apply(p, X, T, {}, key=key), shapes, KEY)
    assert len({id(key) for key in keys}) == len(keys) == 2 * 1 + 1 + 2 + 2 * 2 + 1


def test_remat_changes_nothing_but_memory():
    small = {"style": "adm", "multipliers": (1,)}
    apply, params = network(**small, remat=True)
    assert "remat" in str(jax.make_jaxpr(jax.grad(lambda p: apply(p, X, T, cond()).sum()))(params))
    one, other = gradient(**small), gradient(**small, remat=True)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(a).max())


def test_bfloat16_is_close_and_keeps_float32_outside():
    exact, params = network(style="adm")
    rough, _ = network(style="adm", dtype=jnp.bfloat16)
    y, z = exact(params, X, T, cond()), rough(params, X, T, cond())
    assert z.dtype == jnp.float32
    error = float(jnp.abs(y - z).max() / jnp.abs(y).max())
    assert 1e-5 < error < 0.05
    apply, shapes = models.abstract(functools.partial(small, dtype=jnp.bfloat16))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    embed = jax.eval_shape(lambda p: apply.merge(p).embed(jnp.asarray(T), cond()), shapes)
    assert embed.dtype == jnp.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"style": "admm"}, r"style 'admm' is not known. Did you mean 'adm'"),
        ({"image_size": 9}, "image_size=9 must be divisible by 2"),
        ({"multipliers": ()}, "multipliers"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"channels": 0}, "channels=0 must be positive"),
        ({"dtype": "bf16"}, "dtype='bf16' must be 'float32', 'bfloat16' or 'float16'"),
        (
            {"style": dataclasses.replace(STYLES["adm"], heads=3)},
            "heads=3 does not divide channels=16",
        ),
        ({"style": "ncsnpp", "frequencies": (1.0,)}, "frequencies has 1 entries, needs 8"),
    ],
)
def test_wrong_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        models.abstract(functools.partial(small, **changes))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": X[:, :7]}, r"height and width divisible by 2 .*not 7 x 8; the nearest is 8 x 8"),
        ({"x": X[..., :1]}, r"in_channels=2 takes x of shape \[B, H, W, 2\], not \[3, 8, 8, 1\]"),
        ({"x": X[0]}, r"takes x of shape \[B, H, W, 2\], not \[8, 8, 2\]"),
        ({"t": T[:1]}, r"t of shape \[B\] = \[3\], not \[1\]"),
        ({"cond": {}}, r"num_classes=4 needs cond\['label'\]: integers \[B\] from 0 to 4"),
        (
            {"cond": {"label": T}},
            r"cond\['label'\] as integers of shape \[B\] = \[3\], not float32",
        ),
        ({"cond": cond() | {"augment": X[:, 0, 0]}}, r"cond\['augment'\] of shape .* = \[3, 3\]"),
    ],
)
def test_wrong_inputs(inputs, message):
    apply, shapes = models.abstract(small)
    given = {"x": X, "t": T, "cond": cond()} | inputs
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(apply, shapes, given["x"], given["t"], given["cond"])


def test_any_size_and_unknown_conditions_pass():
    apply, shapes = models.abstract(functools.partial(small, num_classes=0))
    out = jax.eval_shape(apply, shapes, jnp.zeros((1, 16, 6, 2)), jnp.zeros(1), {"text": T})
    assert out.shape == (1, 16, 6, 2)
