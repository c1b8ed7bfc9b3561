"""From a config to networks: every family with every output, and the penalty of a distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import kinds, models
from jdiff.autoencoders import Moments, autoencoder
from jdiff.data.sources import Info
from jdiff.first_stage import networks
from jdiff.first_stage.defaults import defaults
from jdiff.first_stage.pixels import BY_NAME as PIXELS

KEY = jax.random.key(0)
INFO = Info("x", "train", (8, 8, 3), 0, (), 100)


def small(name, pixels="l1", **fields):
    c = defaults()
    c.model.update({"name": name, "widths": (4, 4), "blocks": 1, "groups": 1, "attention": False})
    c.model.update(fields)
    c.loss.pixels, c.loss.adversarial = pixels, 0.0
    return c, kinds.of(c).build(c, INFO)


@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("name", networks.BY_NAME)
def test_every_family_gives_an_output_and_decodes_to_images(name, pixels):
    """Shapes alone; the last convolution's kernel is where the ratio of gradients is taken."""
    _, exp = small(name, pixels)
    params = exp.shapes()["autoencoder"]
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    found = jax.eval_shape(exp.objective.through, params, x, KEY)
    outputs = 3 * PIXELS[pixels].outputs
    assert found.output.shape == (2, 8, 8, outputs) and found.penalty.shape == (2,)
    assert params["decoder"]["out_conv"]["kernel"].shape[-1] == outputs
    z = jax.eval_shape(exp.apply.method("encode"), params, x).mean
    assert jax.eval_shape(exp.apply.method("decode"), params, z).shape == x.shape


def test_an_autoencoder_of_a_distribution_decodes_to_the_image_that_it_means():
    _, exp = small("kl", "logit_laplace")
    apply, params = exp.apply, models.init(exp.builds["autoencoder"], KEY)[1]
    z = np.random.default_rng(0).standard_normal((1, 2, 2, 4), np.float32)
    output = jax.jit(apply.method("output"))(params, z)
    image = autoencoder(apply, params).decode(z)
    mean = 1 / (1 + np.exp(-np.asarray(output)[..., :3]))
    np.testing.assert_allclose(image, (mean - 0.1) / 0.8 * 2 - 1, rtol=1e-4, atol=1e-5)


def test_the_penalty_is_the_divergence_for_an_entry_of_the_image():
    """KL(N(m, s^2) || N(0, 1)) by its integral; LDM's weight goes with sums over pixels."""
    grid = np.linspace(-30, 30, 200_001)
    normal = lambda m, s: np.exp(-0.5 * ((grid - m) / s) ** 2) / (s * np.sqrt(2 * np.pi))
    p, q = normal(1.3, 0.6), normal(0.0, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        one = np.trapezoid(np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0), grid)
    moments = Moments(jnp.full((1, 2, 3, 4), 1.3), jnp.full((1, 2, 3, 4), 0.6))
    np.testing.assert_allclose(networks.divergence(moments), [24 * one], rtol=1e-4)
    c, exp = small("kl")
    params = models.init(exp.builds["autoencoder"], KEY)[1]
    x = np.random.default_rng(1).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    c.loss.kl = 2.0
    found = jax.jit(kinds.of(c).build(c, INFO).objective.through)(params, x, KEY)
    np.testing.assert_allclose(found.penalty.mean(), 2.0 * found.figures["kl"] / 192, rtol=1e-5)


def test_a_plan_needs_no_weights():
    """Of LPIPS the shapes are enough."""
    c, _ = small("fsq")
    weights, teacher = kinds.of(c).frozen(c, None)
    assert teacher is None and models.count(weights) == 14_714_688 + 1_472  # VGG16's, and the heads
    c.loss.perceptual = 0.0
    assert kinds.of(c).frozen(c, None) == (None, None)
