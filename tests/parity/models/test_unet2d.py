"""DDPM's and ADM's U-Net against diffusers' UNet2DModel, on one set of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import (
    assert_round_trip,
    channels_first,
    channels_last,
    distance,
    images,
    randomise,
)
from peers import peer

from jdiff import models
from jdiff.interop import loading
from jdiff.interop.families import unet2d

torch = peer("torch")
diffusers = peer("diffusers")
safetorch = peer("safetensors.torch")
torch.set_num_threads(1)

COMMON = {"block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8}
CONFIGS = {
    # google/ddpm-cifar10-32
    "ddpm": {
        "attention_head_dim": None,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-3,  # large enough to be seen
        "norm_num_groups": 4,
    },
    # what one gets without asking, and an image beside the noisy one
    "default": {
        "block_out_channels": (8, 12),
        "in_channels": 6,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "attention_head_dim": 4,
        "norm_num_groups": 2,
        "num_class_embeds": 5,
    },
    # the consistency models of ImageNet-64
    "adm": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "attn_norm_num_groups": 4,
        "num_class_embeds": 5,
    },
}
X, LOW = images(2, 8, 8, 3), images(2, 8, 8, 3, seed=1)
T, LABEL = np.asarray([3.0, 700.5], np.float32), np.asarray([4, 1])


@pytest.fixture(params=CONFIGS)
def pair(request, tmp_path):
    """`(their network, our component read from its folder, the folder)`."""
    theirs = randomise(diffusers.UNet2DModel(**(COMMON | CONFIGS[request.param])))
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, loading.load_component(tmp_path / "theirs"), tmp_path


def test_outputs_are_theirs(pair):
    theirs, ours, _ = pair
    given, cond, x = {}, {}, X
    if ours.fields["num_classes"]:
        given, cond = {"class_labels": torch.tensor(LABEL)}, {"label": jnp.asarray(LABEL)}
    if ours.fields["low_res_channels"]:
        cond, x = cond | {"low_res": LOW}, np.concatenate([X, LOW], axis=-1)
    y = jax.jit(ours.apply)(ours.params, X, T, cond)
    output = theirs(channels_first(x), torch.tensor(T), **given).sample
    assert distance(y, channels_last(output)) < 1e-4


def test_what_is_saved_is_what_was_read_and_opens_there(pair):
    theirs, ours, folder = pair
    assert_round_trip(ours, theirs, folder / "theirs", folder)


@pytest.mark.parametrize("fields", [models.ddpm_cifar10(), models.ddpm_cifar10(image_size=256)])
def test_our_ddpm_is_one_of_theirs(fields):
    config = unet2d.FAMILY.config(fields)
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(**config)
    _, shapes = models.abstract(lambda rngs: models.UNet(**fields, rngs=rngs))
    assert models.count(shapes) == sum(w.numel() for w in theirs.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_make_a_config_that_makes_them_again(name):
    model, fields = unet2d.FAMILY.build(
        dict(diffusers.UNet2DModel(**(COMMON | CONFIGS[name])).config)
    )
    assert model is models.UNet
    assert unet2d.FAMILY.build(unet2d.FAMILY.config(fields)) == (model, fields)


def test_the_names_of_the_first_files_are_understood_as_there(tmp_path):
    theirs = randomise(diffusers.UNet2DModel(**(COMMON | CONFIGS["ddpm"])))
    theirs.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for key, value in safetorch.load_file(file).items():
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.")  # noqa: PLW2901
        weights[key] = value
    assert any(".query." in key for key in weights)
    safetorch.save_file(weights, file)
    again = diffusers.UNet2DModel.from_pretrained(tmp_path)
    ours = loading.load_component(tmp_path)
    output = again(channels_first(X), torch.tensor(T)).sample
    assert distance(jax.jit(ours.apply)(ours.params, X, T, {}), channels_last(output)) < 1e-4
