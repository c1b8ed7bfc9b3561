"""Fresh noise: by sample, by step, by draw; the same whatever the batch."""

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.noise import fresh

KEYS = jax.random.split(jax.random.key(0), 3)
X = jnp.zeros((3, 4))


def test_every_step_sample_interval_and_free_draw_differs():
    draws = []
    for step in (0, 1):
        noise = fresh().at(KEYS, step)
        draws += [noise.between(X, 1.0, 0.5), noise.between(X, 0.5, 0.2, part=1)]
        draws += [noise.free(X), noise.free(X, 1)]
    numbers = np.concatenate(draws).ravel()
    assert len(np.unique(numbers)) == numbers.size


def test_a_samples_noise_is_its_own_whatever_the_batch():
    for draw in (lambda n, x: n.between(x, 1.0, 0.0), lambda n, x: n.free(x, 2)):
        whole = draw(fresh().at(KEYS, 5), X)
        np.testing.assert_array_equal(draw(fresh().at(KEYS[1:2], 5), X[1:2]), whole[1:2])


def test_it_is_standard_normal():
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), jnp.arange(20_000))
    for z in (
        fresh().at(keys, 1).between(jnp.zeros((20_000, 2)), 1.0, 0.0),
        fresh().at(keys, 1).free(jnp.zeros((20_000, 2))),
    ):
        assert abs(float(z.mean())) < 0.02 and abs(float(z.std()) - 1.0) < 0.01
        assert abs(float(jnp.mean(z[:, 0] * z[:, 1]))) < 0.03
