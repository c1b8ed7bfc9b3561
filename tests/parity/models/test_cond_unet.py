"""The text-conditional U-Net against diffusers' UNet2DConditionModel, on one set of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import (
    assert_gradients,
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
from jdiff.interop.families import cond_unet

torch = peer("torch")
diffusers = peer("diffusers")
torch.set_num_threads(1)

DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
COMMON = {
    "block_out_channels": (16, 24),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
}
CONFIGS = {
    "sd15": {
        "down_block_types": DOWN[::-1],
        "up_block_types": UP,
        "norm_eps": 1e-3,  # large enough to be seen
    },
    "sdxl": {
        "down_block_types": DOWN,
        "up_block_types": UP[::-1],
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
    },
    "upscaler": {
        "in_channels": 7,
        "down_block_types": DOWN[1:] * 2,
        "up_block_types": UP[1:] * 2,
        "only_cross_attention": (True, False),
        "num_class_embeds": 5,
        "time_cond_proj_dim": 6,
        "use_linear_projection": True,
    },
}
FIELDS = {"sdxl": {"scan": True}}  # what we choose beside the config
X, T, TEXT = images(2, 8, 8, 4), np.asarray([3.0, 700.5], np.float32), images(2, 5, 12, seed=1)
MASK = np.asarray([[1, 1, 1, 1, 1], [1, 1, 0, 0, 1]], bool)
POOLED, IDS = images(2, 20, seed=2), 512 * np.abs(images(2, 6, seed=3))
LOW, LABEL, SCALE = images(2, 8, 8, 3, seed=4), np.asarray([1, 4]), np.asarray([1.5, 8.0], "f")
COND = {
    "sd15": {"text_mask": MASK},
    "sdxl": {"pooled": POOLED, "time_ids": IDS},
    "upscaler": {"low_res": LOW, "label": LABEL, "guidance": SCALE},
}
SPREAD = images(2, 8, 8, 4, seed=5)  # weighs the outputs in a loss


def network(name):
    return randomise(diffusers.UNet2DConditionModel(**(COMMON | CONFIGS[name])))


def guidance_waves(scale):
    """What LCM's pipeline hands over (it needs transformers): sines, then cosines, of 1000 (s - 1).

    Their scale counts from 0 for the conditional prediction alone.
    """
    angles = 1000 * (np.float64(scale) - 1)[:, None] * 10_000.0 ** -np.linspace(0, 1, 3)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


def call(name, theirs):
    """Their output, in their words."""
    given = {
        "sd15": lambda: {"encoder_attention_mask": torch.tensor(MASK)},
        "sdxl": lambda: {
            "added_cond_kwargs": {
                "text_embeds": torch.tensor(POOLED),
                "time_ids": torch.tensor(IDS),
            }
        },
        "upscaler": lambda: {
            "class_labels": torch.tensor(LABEL),
            "timestep_cond": torch.tensor(guidance_waves(SCALE), dtype=torch.float32),
        },
    }[name]()
    x = channels_first(np.concatenate([X, LOW], axis=-1) if name == "upscaler" else X)
    return theirs(x, torch.tensor(T), torch.tensor(TEXT), **given).sample


@pytest.fixture(params=CONFIGS)
def pair(request, tmp_path):
    """`(name, their network, our component read from its folder, the folder)`."""
    theirs = network(request.param)
    theirs.save_pretrained(tmp_path / "theirs")
    fields = FIELDS.get(request.param, {})
    return request.param, theirs, loading.load_component(tmp_path / "theirs", **fields), tmp_path


def test_outputs_and_gradients_are_theirs(pair):
    name, theirs, ours, _ = pair
    output = call(name, theirs)
    cond = {"text": TEXT} | COND[name]

    def loss(params):
        y = ours.apply(params, X, T, cond)
        return jnp.vdot(SPREAD, y), y

    if name == "sd15":  # the gradient of one of a kind: it takes long to compile
        (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(ours.params)
        (channels_first(SPREAD) * output).sum().backward()
        assert_gradients(ours, grads, theirs, 1e-4)
    else:
        y = jax.jit(loss)(ours.params)[1]
    assert distance(y, channels_last(output)) < 1e-4


def test_what_is_saved_is_what_was_read_and_opens_there(pair):
    name, theirs, ours, folder = pair
    assert_round_trip(ours, theirs, folder / "theirs", folder, **FIELDS.get(name, {}))


@pytest.mark.parametrize(
    "preset", [models.sd15, models.sd2, models.sdxl, models.sd_upscaler], ids=lambda f: f.__name__
)
def test_presets_have_as_many_parameters_as_theirs_of_their_config(preset):
    config = cond_unet.FAMILY.config(preset())
    model, fields = cond_unet.FAMILY.build(config)
    _, shapes = models.abstract(lambda rngs: model(**fields, rngs=rngs))
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**config)
    assert models.count(shapes) == sum(w.numel() for w in theirs.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_make_a_config_that_makes_them_again(name):
    config = dict(diffusers.UNet2DConditionModel(**(COMMON | CONFIGS[name])).config)
    model, fields = cond_unet.FAMILY.build(config)
    assert model is models.CondUNet
    assert cond_unet.FAMILY.build(cond_unet.FAMILY.config(fields)) == (model, fields)
