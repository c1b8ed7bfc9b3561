"""One pass forwards and backwards gives both players the gradients of two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import x64

from jdiff import models
from jdiff.first_stage import adversary, objective
from jdiff.first_stage.discriminator import PatchGAN, smallest
from jdiff.first_stage.objective import Objective, Pass
from jdiff.first_stage.pixels import BY_NAME as PIXELS

KEY = jax.random.key(0)
LAST = ("out", "kernel")


def through(weights, x, key):
    """A layer with a penalty, and a last layer."""
    h = jnp.tanh(x @ weights["in"]["kernel"])
    h = h + 0.1 * jax.random.normal(key, h.shape, h.dtype)
    penalty = 0.01 * jnp.square(h).mean((1, 2, 3))
    return Pass(h @ weights["out"]["kernel"], penalty, {"kl": penalty.mean()})


def judge(weights, images):
    return jnp.tanh(images @ weights["a"])[..., 0] + weights["b"]


def lpips(weights, images, truth):
    """Any difference will do here."""
    return jnp.square((images - truth) @ weights).mean((1, 2, 3))


def parts(**changes) -> tuple:
    draw = lambda n, *shape: jax.random.normal(jax.random.fold_in(KEY, n), shape)
    params = {
        "autoencoder": {"in": {"kernel": draw(0, 3, 5)}, "out": {"kernel": draw(1, 5, 3)}},
        "discriminator": {"a": draw(2, 3, 1), "b": draw(3)},
    }
    o = Objective(
        through, LAST, PIXELS["l2"], 0.7, lpips, adversary.BY_NAME["non_saturating"], judge, 0.5, 3
    )
    return o._replace(**changes), params, draw(4, 2, 4, 4, 3), draw(5, 3, 2)


def gradient(o: Objective, params, x, frozen, step):
    """(value, figures, gradient) as the training step takes them."""

    def mean(params):
        values, figures = objective.loss(o, params, KEY, x, jnp.asarray(step), frozen)
        return values.mean(), figures

    (value, figures), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    return value, figures, grads


def naive(o: Objective, params, x, frozen):
    """(value, weight, gradients of the two players), each loss differentiated on its own."""
    game, pixels = o.game, o.pixels

    def near(w):
        found = through(w, x, KEY)
        seen = pixels.image(found.output)
        return (pixels.distance(found.output, x) + o.perceptual * lpips(frozen, seen, x)).mean()

    def fooled(w):
        return game.generator(
            judge(params["discriminator"], pixels.image(through(w, x, KEY).output))
        )

    def verdict(d):
        fake = pixels.image(through(params["autoencoder"], x, KEY).output)
        return game.discriminator(judge(d, x), judge(d, fake))

    w = params["autoencoder"]
    penalty = lambda w: through(w, x, KEY).penalty.mean()
    norm = lambda tree: jnp.linalg.norm(objective.get(tree, LAST))
    ratio = jnp.minimum(norm(jax.grad(near)(w)) / (norm(jax.grad(fooled)(w)) + 1e-4), 1e4)
    weight = o.adversarial * ratio
    whole = jax.grad(lambda w: near(w) + penalty(w) + weight * fooled(w))(w)
    return near(w) + penalty(w), weight, whole, jax.grad(verdict)(params["discriminator"])


@pytest.mark.parametrize(("game", "pixels"), [("hinge", "l1"), ("non_saturating", "logit_laplace")])
@x64
def test_the_gradients_are_those_of_the_losses_one_by_one(game, pixels):
    o, params, x, frozen = parts(game=adversary.BY_NAME[game], pixels=PIXELS[pixels])
    if pixels == "logit_laplace":
        x = jnp.tanh(x)
        kernel = jax.random.normal(KEY, (5, 6))
        params["autoencoder"]["out"]["kernel"] = kernel
    value, figures, grads = gradient(o, params, x, frozen, step=3)
    expected, weight, ours, theirs = jax.jit(lambda p: naive(o, p, x, frozen))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    np.testing.assert_allclose(figures["adversarial_weight"], weight, rtol=1e-10)
    wanted = {"autoencoder": ours, "discriminator": theirs}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-9, 1e-12), grads, wanted)


def test_a_step_goes_through_the_autoencoder_once_and_judges_each_batch_once():
    """Traced: forwards; what goes back is the transpose of that."""
    called = []
    once = lambda name, f: lambda *args: (called.append(name), f(*args))[1]
    o, params, x, frozen = parts()
    o = o._replace(through=once("autoencoder", through), judge=once("discriminator", judge))
    o = o._replace(lpips=once("lpips", lpips), start=0)
    loss = lambda p: objective.loss(o, p, KEY, x, jnp.asarray(0), frozen)[0].mean()
    jax.make_jaxpr(jax.grad(loss))(params)
    assert called.count("autoencoder") == 1 == called.count("lpips")
    # The waiting branch is shaped like the round, which traces the judge once more for nothing.
    assert called.count("discriminator") == 4


def test_neither_player_moves_the_other():
    """The autoencoder's part is linear in the game's weight; the discriminator's knows nothing of
    it, and what it would have the images be moves no weight of the autoencoder."""
    o, params, x, frozen = parts()
    deaf = o.game._replace(generator=lambda fake: 0 * fake.mean())
    _, _, alone = gradient(o._replace(game=deaf), params, x, frozen, step=3)
    _, _, without = gradient(o._replace(game=None), params, x, frozen, step=3)
    _, _, both = gradient(o, params, x, frozen, step=3)
    same = lambda a, b: jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), a, b)
    same(alone["autoencoder"], without["autoencoder"])  # the discriminator's loss moves it not
    same(alone["discriminator"], both["discriminator"])  # the generator's loss moves that not
    assert (
        np.abs(both["autoencoder"]["in"]["kernel"] - without["autoencoder"]["in"]["kernel"]).max()
        > 1e-3
    )
    assert all(
        float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(without["discriminator"])
    )


def test_before_its_start_the_discriminator_neither_learns_nor_counts():
    o, params, x, frozen = parts(start=3)
    _, figures, before = gradient(o, params, x, frozen, step=2)
    _, _, without = gradient(o._replace(game=None), params, x, frozen, step=2)
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(before["discriminator"]))
    assert figures["adversarial_weight"] == 0
    jax.tree.map(np.testing.assert_array_equal, before["autoencoder"], without["autoencoder"])


def test_the_weight_is_the_ratio_of_the_gradients_in_its_bounds():
    rec, gan = jnp.asarray([[3.0], [4.0]]), jnp.asarray([[0.0], [2.0]])
    np.testing.assert_allclose(adversary.adaptive_weight(rec, gan), 5 / (2 + 1e-4), rtol=1e-6)
    assert adversary.adaptive_weight(rec, 0 * gan) == 1e4
    assert adversary.adaptive_weight(0 * rec, gan) == 0


def test_the_games_have_their_values_at_the_logits_that_decide_nothing():
    zero, one = jnp.zeros((2, 3, 3)), jnp.ones((2, 3, 3))
    hinge, usual = adversary.BY_NAME["hinge"], adversary.BY_NAME["non_saturating"]
    assert hinge.discriminator(zero, zero) == 1 and hinge.discriminator(one, -2 * one) == 0
    assert hinge.generator(2 * one) == -2
    np.testing.assert_allclose(usual.discriminator(zero, zero), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(usual.generator(zero), np.log(2), rtol=1e-6)
    # Minus the log-probability that sigmoid(logit) gives to "real".
    p = jax.nn.sigmoid(0.7 * one)
    np.testing.assert_allclose(usual.generator(0.7 * one), -np.log(p).mean(), rtol=1e-6)


def test_a_patch_is_as_large_as_published_and_judged_alone():
    """70 x 70 pixels with three layers that halve; images do not see each other."""
    apply, params = models.init(lambda rngs: PatchGAN(channels=4, depth=3, rngs=rngs), KEY)
    assert (smallest(3), smallest(1)) == (24, 6)
    # What one logit sees, without the norms, which look at a whole image.
    side = 1
    for stride in (1, 1, 2, 2, 2):
        side = (side - 1) * stride + 4
    assert side == 70
    x = jax.random.normal(KEY, (2, 24, 24, 3))
    judged = jax.jit(apply.method("__call__"))
    out = judged(params, x)
    assert out.shape == (2, 1, 1)
    other = x.at[1].set(0.3)
    np.testing.assert_allclose(judged(params, other)[0], out[0], rtol=1e-6)


@x64
def test_logit_laplace_is_a_density_and_its_image_is_the_pixel():
    """Integrated over the values that a pixel can take, and beyond the margin, it gives 1."""
    pixels = PIXELS["logit_laplace"]
    y = jnp.linspace(1e-6, 1 - 1e-6, 400_001)
    x = ((y - 0.1) / 0.8) * 2 - 1
    output = jnp.broadcast_to(jnp.asarray([0.3, -0.5]), (len(y), 1, 1, 2))
    density = jnp.exp(-pixels.distance(output, x[:, None, None, None]))
    np.testing.assert_allclose(jnp.trapezoid(density, y), 1.0, rtol=1e-4)
    pixel = jnp.asarray([-1.0, -0.2, 1.0])[:, None, None, None]
    logit = jnp.log((0.1 + 0.4 * (pixel + 1)) / (0.9 - 0.4 * (pixel + 1)))
    output = jnp.concatenate([logit, jnp.zeros_like(logit)], -1)
    np.testing.assert_allclose(pixels.image(output), pixel, atol=1e-12)
