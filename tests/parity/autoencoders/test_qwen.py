"""Qwen-Image's autoencoder against diffusers' AutoencoderKLQwenImage, on one set of weights."""

import functools

import jax
import numpy as np
import pytest
from checkpoints import assert_round_trip, distance, images, randomise
from peers import peer

from jdiff import interop, models
from jdiff.autoencoders.qwen import QwenAutoencoder
from jdiff.errors import UserError
from jdiff.interop import loading
from jdiff.interop.families import autoencoder_qwen

torch = peer("torch")
diffusers = peer("diffusers")
torch.set_num_threads(1)

CONFIG = {
    "base_dim": 8,
    "z_dim": 3,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
    "latents_mean": [0.5, -0.25, 0.0],
    "latents_std": [2.0, 0.5, 1.5],
}
X = images(2, 16, 24, 3)
Z = images(2, 4, 6, 3, seed=1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    theirs = randomise(diffusers.AutoencoderKLQwenImage(**CONFIG), std=0.15)
    theirs.save_pretrained(folder)
    return loading.load_component(folder), theirs, folder


@functools.cache
def jitted(ours, name):
    return jax.jit(ours.apply.method(name))


def frame(x):
    """Images [B, H, W, C] as a video of one frame, [B, C, 1, H, W]."""
    return torch.tensor(np.moveaxis(x, -1, 1)[:, :, None])


def still(x):
    return np.moveaxis(x.numpy()[:, :, 0], 1, -1)


def test_an_image_is_encoded_as_a_video_of_one_frame(pair):
    ours, theirs, _ = pair
    assert ours.model is QwenAutoencoder
    mean, std = jitted(ours, "encode")(ours.params, X)
    with torch.no_grad():
        posterior = theirs.encode(frame(X)).latent_dist
    assert distance(mean, still(posterior.mean)) < 1e-4
    assert distance(std, still(posterior.std)) < 1e-4


def test_latents_are_decoded_as_a_video_of_one_frame(pair):
    ours, theirs, _ = pair
    x = jitted(ours, "decode")(ours.params, Z)
    with torch.no_grad():
        clipped = theirs.decode(frame(Z)).sample
        theirs.clear_cache()
        z = theirs.post_quant_conv(frame(Z))
        whole = theirs.decoder(z, feat_cache=theirs._feat_map, feat_idx=[0])
    assert distance(x, still(whole)) < 1e-4
    np.testing.assert_allclose(np.clip(x, -1, 1), still(clipped), atol=1e-4)


def test_only_the_last_slice_in_time_meets_an_image(pair):
    ours, _, _ = pair
    decode = jitted(ours, "decode")

    def other(path, leaf):
        """Another past: all slices but the last, and what resamples in time."""
        if leaf.ndim != 5:
            return leaf
        changed = np.array(leaf)
        changed[: None if "time" in jax.tree_util.keystr(path) else -1] += 1.0
        return changed

    changed = jax.tree_util.tree_map_with_path(other, ours.params)
    np.testing.assert_array_equal(decode(changed, Z), decode(ours.params, Z))


def test_latents_are_in_the_units_of_the_config(pair):
    """Their pipeline decodes latents * std + mean, entry by entry of a latent's channels."""
    coder = interop.autoencoder(pair[0])
    np.testing.assert_allclose(coder.shift, CONFIG["latents_mean"])
    np.testing.assert_allclose(1 / coder.scale, CONFIG["latents_std"])


def test_what_is_saved_is_what_was_read_and_opens_there(pair, tmp_path):
    ours, theirs, folder = pair
    assert_round_trip(ours, theirs, folder, tmp_path)


def test_the_default_has_as_many_parameters_as_theirs():
    model, fields = autoencoder_qwen.FAMILY.build({})
    apply, shapes = models.abstract(lambda rngs: model(**fields, rngs=rngs))
    assert (apply.skeleton().factor, apply.skeleton().channels) == (8, 16)
    assert models.abstract(lambda rngs: model(rngs=rngs))[1] == shapes
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLQwenImage()
    assert models.count(shapes) == sum(w.numel() for w in theirs.parameters())


def test_fields_make_a_config_that_makes_them_again():
    model, fields = autoencoder_qwen.FAMILY.build(CONFIG)
    assert autoencoder_qwen.FAMILY.build(autoencoder_qwen.FAMILY.config(fields)) == (model, fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperal_downsample": [True]}, "only one entry for each of the 3 steps"),
        ({"attn_scales": [0.5]}, r"attn_scales=\[0.5\] is not served, only \[\]"),
        ({"patch_size": 2}, "key of the config 'patch_size' is not known"),
    ],
)
def test_configs_that_are_not_served(config, message):
    with pytest.raises(UserError, match=message):
        autoencoder_qwen.FAMILY.build(config)
