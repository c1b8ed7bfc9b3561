"""DC-AE against diffusers' AutoencoderDC, on one set of weights."""

import jax
import numpy as np
import pytest
from checkpoints import assert_round_trip, channels_first, channels_last, distance, images
from checkpoints import randomise as randomised
from peers import peer

from jdiff import models
from jdiff.autoencoders.dc import DCAutoencoder, Size
from jdiff.errors import UserError
from jdiff.interop import files, loading
from jdiff.interop.families import autoencoder_dc

torch = peer("torch")
diffusers = peer("diffusers")
torch.set_num_threads(1)

#: As SANA's: strides and repeated pixels, two scales.
SANA = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_types": ["ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [4, 8, 8],
    "decoder_block_out_channels": [4, 8, 16],
    "encoder_layers_per_block": [1, 1, 1],
    "decoder_layers_per_block": [1, 1, 1],
    "encoder_qkv_multiscales": [[], [], [3, 5]],
    "decoder_qkv_multiscales": [[], [5], [3]],
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
#: As those for ImageNet: no block at full size, folded pixels, norms of a batch in the decoder.
IMAGENET = SANA | {
    "encoder_layers_per_block": [0, 1, 1],
    "decoder_layers_per_block": [0, 2, 1],
    "downsample_block_type": "pixel_unshuffle",
    "upsample_block_type": "pixel_shuffle",
    "decoder_norm_types": ["batch_norm", "batch_norm", "rms_norm"],
    "decoder_act_fns": ["relu", "relu", "silu"],
    "decoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
    "encoder_out_shortcut": False,
    "decoder_in_shortcut": False,
    "decoder_conv_act_fn": "silu",
}
# Of three pixels, fewer than a head's channels, theirs weighs the values pixel by pixel: the same
# but for rounding. The sizes before have more.
X = images(2, 4, 12, 3)
Z = images(2, 1, 3, 4, seed=1)


def randomise(network):
    """Random weights, and random statistics of batches."""
    generator = torch.Generator().manual_seed(1)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        if name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return randomised(network, std=0.3)


@pytest.fixture(scope="module", params=[SANA, IMAGENET], ids=["sana", "imagenet"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dc")
    theirs = randomise(diffusers.AutoencoderDC(**request.param))
    theirs.save_pretrained(folder)
    return loading.load_component(folder), theirs, folder


def test_images_are_encoded_and_latents_decoded_as_theirs(pair):
    ours, theirs, _ = pair
    assert ours.model is DCAutoencoder
    mean, std = jax.jit(ours.apply.method("encode"))(ours.params, X)
    x = jax.jit(ours.apply.method("decode"))(ours.params, Z)
    with torch.no_grad():
        latents = channels_last(theirs.encode(channels_first(X)).latent)
        pictures = channels_last(theirs.decode(channels_first(Z)).sample)
    assert distance(mean, latents) < 1e-4
    assert not std.any()
    assert distance(x, pictures) < 1e-4


def test_what_is_saved_is_what_was_read_and_opens_there(pair, tmp_path):
    ours, theirs, folder = pair
    if not any(name.endswith("running_mean") for name, _ in theirs.named_buffers()):
        assert_round_trip(ours, theirs, folder, tmp_path)
        return
    # The norms' counts of their training steps are not written; nothing reads them.
    loading.save_component(ours, tmp_path)
    saved = files.component(tmp_path)
    for name, tensor in files.component(folder).items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(saved[name], tensor, err_msg=name)
    back = type(theirs).from_pretrained(tmp_path)
    with torch.no_grad():
        pictures = [one.decode(channels_first(Z)).sample for one in (back, theirs)]
    assert torch.equal(*pictures)


def test_the_default_is_sanas_of_312_million_parameters():
    apply, shapes = models.abstract(lambda rngs: DCAutoencoder(rngs=rngs))
    assert (apply.skeleton().factor, apply.skeleton().channels) == (32, 32)
    config = autoencoder_dc.FAMILY.config({})
    with torch.device("meta"):
        theirs = diffusers.AutoencoderDC(**config)
    assert models.count(shapes) == sum(w.numel() for w in theirs.parameters())
    assert round(models.count(shapes) / 1e6) == 312


@pytest.mark.parametrize("config", [{}, SANA, IMAGENET], ids=["default", "sana", "imagenet"])
def test_fields_make_a_config_that_makes_them_again(config):
    model, fields = autoencoder_dc.FAMILY.build(config)
    again = autoencoder_dc.FAMILY.build(autoencoder_dc.FAMILY.config(fields))
    assert again == (model, fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"downsample_block_type": "pool"}, "downsample_block_type 'pool' is not known"),
        ({"decoder_norm_types": "layer_norm"}, "decoder_norm_types 'layer_norm' is not known"),
        ({"encoder_layers_per_block": [1, 2]}, "encoder_layers_per_block has 2 entries"),
        ({"latent_channel": 8}, "Did you mean 'latent_channels'"),
    ],
    ids=str,
)
def test_configs_that_are_not_served(config, message):
    with pytest.raises(UserError, match=message):
        autoencoder_dc.FAMILY.build(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 48}, "channels=48 does not divide its last width 1024"),
        ({"decoder": [Size(8, 1), Size(8, 0), Size(8, 1)]}, "encoder has 6 sizes and decoder 3"),
        ({"encoder": [Size(8, 1)] * 5 + [Size(8, 0)]}, "only the first size may have no blocks"),
        ({"encoder": [Size(8, 1)] * 5 + [Size(96, 1)]}, "each must divide four times the one"),
    ],
    ids=str,
)
def test_fields_that_make_no_network(changes, message):
    with pytest.raises(ValueError, match=message):
        models.abstract(lambda rngs: DCAutoencoder(**changes, rngs=rngs))
