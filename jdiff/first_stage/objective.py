"""What training an autoencoder minimises, with one pass forwards and one backwards.

    L = pixels + perceptual LPIPS + penalty + lambda L_GAN       (Esser et al. 2021, equations 5-7)

The discriminator, LPIPS and the pixels only see the decoder's output. Their gradients by that
output are computed first; pulled back through the last convolution they give the weight lambda, and
their sum is pulled back through decoder and encoder once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdiff.first_stage import adversary
from jdiff.first_stage.adversary import Game, Round
from jdiff.first_stage.pixels import Pixels
from jdiff.pytree import Array, PyTree


class Pass(NamedTuple):
    """One pass through an autoencoder.

    Attributes:
      output: of the decoder's last convolution, [B, H, W, ...].
      penalty: [B], of the latents; weighted.
      figures: {name: scalar} to be logged.
    """

    output: Array
    penalty: Array
    figures: dict[str, Array]


class Objective(NamedTuple):
    """The parts of the loss.

    Attributes:
      through: (weights, images, key) -> `Pass`.
      last: path of the last convolution's kernel in the weights.
      pixels: how near output and image are.
      perceptual: weight of `lpips`, a function (its weights, images, truth) -> [B].
      game: None without a discriminator.
      judge: (weights, images) -> logits.
      adversarial: weight of the game beside the adaptive one.
      start: the step at which it begins; the discriminator learns nothing before.
    """

    through: Callable[[PyTree, Array, Array], Pass]
    last: tuple[str, ...]
    pixels: Pixels
    perceptual: float
    lpips: Callable[[PyTree, Array, Array], Array] | None
    game: Game | None
    judge: Callable[[PyTree, Array], Array] | None
    adversarial: float
    start: int


def loss(
    objective: Objective, params: PyTree, key: Array, x: Array, step: Array, frozen: PyTree
) -> tuple[Array, dict[str, Array]]:
    """([B], figures): the value is pixels + LPIPS + penalty; the gradient is that of both players.

    The gradient by params["autoencoder"] is that of L, with lambda and the discriminator held
    fixed; that by params["discriminator"] is that of its own loss, with the images held fixed. A
    value of the game would say nothing: it has no minimum.

    Args:
      params: {"autoencoder", and with a game "discriminator"}.
      x: images [B, H, W, C] in [-1, 1].
      step: of training.
      frozen: LPIPS' weights, or None.
    """
    o, weights, fixed = objective, params["autoencoder"], jax.lax.stop_gradient

    def through(kernel: Array) -> tuple[Array, Pass]:
        found = o.through(put(weights, o.last, kernel), x, key)
        return found.output, found

    # The output stays differentiable by all weights; `pull` goes back through the last layer alone.
    output, pull, found = jax.vjp(through, get(weights, o.last), has_aux=True)

    def near(output: Array) -> tuple[Array, tuple[Array, dict[str, Array]]]:
        pixels = o.pixels.distance(output, x)
        figures, total = {"pixels": pixels.mean()}, pixels
        if o.perceptual:
            looks = o.lpips(frozen, o.pixels.image(output), x)
            figures["lpips"], total = looks.mean(), total + o.perceptual * looks
        return total.mean(), (total, figures)

    gradient, (distance, figures) = jax.grad(near, has_aux=True)(fixed(output))
    terms = found.penalty.mean()
    if o.game is not None:
        played, begun = _game(o, fixed(params["discriminator"]), x, fixed(output), step)
        by_kernel = [pull(fixed(g))[0] for g in (gradient, played.by_images)]
        ratio = adversary.adaptive_weight(*by_kernel)
        weight = fixed(jnp.where(begun, o.adversarial * ratio, 0.0))
        gradient = gradient + weight * played.by_images
        terms = terms + dot(params["discriminator"], played.by_weights)
        figures |= {
            "generator": played.generator, "discriminator": played.discriminator,
            "adversarial_weight": weight,
        }  # fmt: skip
    terms = terms + dot(output, fixed(gradient))
    values = fixed(distance + found.penalty) + (terms - fixed(terms))  # terms have no value
    return values, jax.tree.map(fixed, figures | found.figures)


def _game(o: Objective, judge: PyTree, x: Array, output: Array, step: Array) -> tuple[Round, Array]:
    """The round, and whether the game has begun; before, nothing is computed and all is zero."""

    def play(output: Array) -> Round:
        fake, back = jax.vjp(o.pixels.image, output)
        played = adversary.play(o.game, o.judge, judge, x, fake)
        return played._replace(by_images=back(played.by_images)[0])

    zero = lambda like: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    wait = lambda output: zero(jax.eval_shape(play, output))
    begun = step >= o.start
    return jax.lax.cond(begun, play, wait, output), begun


def dot(a: PyTree, b: PyTree) -> Array:
    """The sum of products of all entries: its gradient by a is b."""
    products = jax.tree.map(lambda x, y: (x * y).sum(), a, jax.lax.stop_gradient(b))
    return jax.tree.reduce(jnp.add, products)


def get(tree: Any, path: tuple[str, ...]) -> Any:
    """The entry of nested dicts at a path."""
    for name in path:
        tree = tree[name]
    return tree


def put(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    """The tree with another entry there."""
    if not path:
        return value
    return {**tree, path[0]: put(tree[path[0]], path[1:], value)}
