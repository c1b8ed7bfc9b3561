"""The game of an autoencoder and a discriminator: both gradients from one look at the images."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdiff.pytree import Array, PyTree

#: Added to the gradient of the game in the weight's denominator, and the largest weight (VQGAN).
DELTA, LARGEST = 1e-4, 1e4


class Game(NamedTuple):
    """Losses of the two players, as means over patches, of the discriminator's logits.

    Attributes:
      generator: logits of reconstructions -> what the autoencoder minimises.
      discriminator: logits of (images, reconstructions) -> what the discriminator minimises.
    """

    generator: Callable[[Array], Array]
    discriminator: Callable[[Array, Array], Array]


#: What config.discriminator.loss names.
BY_NAME = {
    # Lim and Ye 2017, as VQGAN has it.
    "hinge": Game(
        lambda fake: -jnp.mean(fake),
        lambda real, fake: 0.5 * jnp.mean(jax.nn.relu(1 - real) + jax.nn.relu(1 + fake)),
    ),
    # Goodfellow et al. 2014, section 3.
    "non_saturating": Game(
        lambda fake: jnp.mean(jax.nn.softplus(-fake)),
        lambda real, fake: 0.5 * jnp.mean(jax.nn.softplus(-real) + jax.nn.softplus(fake)),
    ),
}


class Round(NamedTuple):
    """What one look at a batch tells the players.

    Attributes:
      generator, discriminator: their losses.
      by_images: gradient of the first by the reconstructions, like them.
      by_weights: gradient of the second by the discriminator's weights.
    """

    generator: Array
    discriminator: Array
    by_images: Array
    by_weights: PyTree


def play(
    game: Game, judge: Callable[[PyTree, Array], Array], weights: PyTree, real: Array, fake: Array
) -> Round:
    """One round: the discriminator sees each batch once, and nothing else is differentiated.

    Args:
      judge: (weights, images) -> logits.
      real, fake: images and reconstructions [B, H, W, C].
    """
    on_fake, back = jax.vjp(judge, weights, fake)
    on_real, back_real = jax.vjp(lambda w: judge(w, real), weights)
    generator, by_verdict = jax.value_and_grad(game.generator)(on_fake)
    discriminator, sides = jax.value_and_grad(game.discriminator, (0, 1))(on_real, on_fake)
    _, by_images = back(by_verdict)
    by_weights, _ = back(sides[1])
    by_weights = jax.tree.map(jnp.add, by_weights, *back_real(sides[0]))
    return Round(generator, discriminator, by_images, by_weights)


def adaptive_weight(reconstruction: Array, adversarial: Array) -> Array:
    """||grad L_rec|| / (||grad L_GAN|| + 1e-4), at most 1e4; Esser et al. 2021, equation 7.

    Args:
      reconstruction, adversarial: the gradients of the two losses by the decoder's last layer.
    """
    norm = lambda a: jnp.sqrt(jnp.square(a).sum())
    return jnp.clip(norm(reconstruction) / (norm(adversarial) + DELTA), 0.0, LARGEST)
