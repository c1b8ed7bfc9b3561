"""An autoencoder's units in a config, and an autoencoder of one's own in a folder."""

import jax
import numpy as np
import pytest

from jdiff import interop, models
from jdiff.autoencoders import KL, autoencoder
from jdiff.errors import UserError
from jdiff.interop.latents import units

FIELDS = {"widths": (4, 4), "blocks": 1, "channels": 2, "groups": 2}


@pytest.fixture(scope="module")
def network():
    return models.init(lambda rngs: KL(**FIELDS, rngs=rngs), jax.random.key(0))


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, (0.0, 0.18215)),  # the default of the class
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, (0.1159, 0.3611)),
        ({"scaling_factor": 0.13025, "shift_factor": None}, (0.0, 0.13025)),
        (  # (z - mean) scaling / std, as the pipelines of SDXL and Qwen-Image undo it
            {"scaling_factor": 0.5, "latents_mean": [1, 2], "latents_std": [4, 5]},
            ([1, 2], [0.125, 0.1]),
        ),
    ],
)
def test_a_config_tells_the_units(config, wanted):
    for found, want in zip(units(config, "AutoencoderKL"), wanted):
        np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize("given", [(0.25, 0.5), ([0.25, -1.0], [0.5, 2.0])])
def test_an_autoencoder_of_ones_own_opens_with_its_units(network, tmp_path, given):
    apply, params = network
    coder = autoencoder(apply, params, shift=given[0], scale=given[1])
    component = interop.autoencoder_component("AutoencoderKL", coder, **FIELDS)
    interop.save(component, tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    for again in (interop.autoencoder(tmp_path), interop.autoencoder(component)):
        np.testing.assert_array_equal(again.shift, given[0])
        np.testing.assert_array_equal(again.scale, given[1])
        assert (again.apply, again.factor, again.channels) == (apply, 2, 2)
        assert jax.tree.all(jax.tree.map(np.array_equal, again.params, params))


def test_what_is_no_autoencoder_is_refused(network):
    fields = models.sit_imagenet("S/2", depth=1, width=16, heads=2, num_classes=2)
    _, params = models.init(lambda rngs: models.DiT(**fields, rngs=rngs), jax.random.key(0))
    with pytest.raises(UserError, match="DiT is no autoencoder"):
        interop.autoencoder(interop.component("DiT", params, **fields))
    coder = autoencoder(*network)
    component = interop.autoencoder_component("AutoencoderKL", coder, **FIELDS)
    with pytest.raises(UserError, match="dtype must be given when it is opened"):
        interop.autoencoder(component, dtype="bfloat16")
