"""FLUX.1's network against diffusers' FluxTransformer2DModel, on one set of weights."""

import functools

import jax
import numpy as np
import pytest
from checkpoints import assert_round_trip, channels_last, distance, images, randomise
from peers import peer

from jdiff import models
from jdiff.errors import UserError
from jdiff.interop import loading
from jdiff.interop.families import flux

torch = peer("torch")
diffusers = peer("diffusers")
torch.set_num_threads(1)

COMMON = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": (2, 4, 6),
}
CONFIGS = {
    "dev": {"in_channels": 16, "guidance_embeds": True},
    "fill": {"in_channels": 24, "out_channels": 16},  # more channels in than out
}
FIELDS = {"dev": {"scan": True}, "fill": {}}  # what we choose beside the config
CHANNELS = {"dev": 4, "fill": 6}
T = np.asarray([0.2, 0.9], np.float32)
COND = {
    "text": images(2, 5, 12, seed=1),
    "pooled": images(2, 10, seed=2),
    "guidance": np.asarray([3.5, 1.0], np.float32),
}


def latents(name):
    return images(2, 8, 4, CHANNELS[name])


def call(name, theirs):
    """Their output as an image: their pipeline cuts patches of (C, 2, 2) and numbers them."""
    x = torch.tensor(latents(name)).permute(0, 3, 1, 2)
    batch, channels, height, width = x.shape
    rows, columns = height // 2, width // 2
    x = x.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    ids = torch.cartesian_prod(*(torch.arange(float(n)) for n in (1, rows, columns)))
    y = theirs(
        x.reshape(batch, rows * columns, -1),
        encoder_hidden_states=torch.tensor(COND["text"]),
        pooled_projections=torch.tensor(COND["pooled"]),
        timestep=torch.tensor(T),
        img_ids=ids,
        txt_ids=torch.zeros(COND["text"].shape[1], 3),
        guidance=torch.tensor(COND["guidance"]) if name == "dev" else None,
    ).sample
    y = y.reshape(batch, rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return channels_last(y.reshape(batch, -1, height, width))


@functools.cache
def saved(name, folder):
    theirs = randomise(diffusers.FluxTransformer2DModel(**COMMON, **CONFIGS[name]))
    theirs.save_pretrained(folder / name)
    return theirs, folder / name


@pytest.fixture(params=CONFIGS)
def pair(request, tmp_path_factory):
    """`(name, their network, our component read from its folder, the folder)`."""
    theirs, folder = saved(request.param, tmp_path_factory.getbasetemp() / "flux")
    ours = loading.load_component(folder, **FIELDS[request.param])
    return request.param, theirs, ours, folder


def test_outputs_are_theirs(pair):
    name, theirs, ours, _ = pair
    y = jax.jit(ours.apply)(ours.params, latents(name), T, COND)
    assert distance(y, call(name, theirs)) < 1e-4


def test_what_is_saved_is_what_was_read_and_opens_there(pair, tmp_path):
    name, theirs, ours, folder = pair
    assert_round_trip(ours, theirs, folder, tmp_path, **FIELDS[name])


def test_scanned_blocks_are_read_as_the_others(pair):
    name, _, ours, folder = pair
    if name == "dev":
        looped = loading.load_component(folder)
        stacked = models.stack_blocks(looped.params, ("blocks", "singles"))
        assert jax.tree.all(jax.tree.map(np.array_equal, stacked, ours.params))


@pytest.mark.parametrize(
    ("preset", "config"),
    [(models.flux_dev, {"guidance_embeds": True}), (models.flux_schnell, {})],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_presets_are_the_published_configs(preset, config):
    assert flux.FAMILY.build(config) == flux.FAMILY.build(flux.FAMILY.config(preset()))
    _, shapes = models.abstract(lambda rngs: models.Flux(**preset(), rngs=rngs))
    with torch.device("meta"):
        theirs = diffusers.FluxTransformer2DModel(**config)
    assert models.count(shapes) == sum(w.numel() for w in theirs.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_make_a_config_that_makes_them_again(name):
    config = dict(diffusers.FluxTransformer2DModel(**(COMMON | CONFIGS[name])).config)
    model, fields = flux.FAMILY.build(config)
    assert model is models.Flux
    assert flux.FAMILY.build(flux.FAMILY.config(fields)) == (model, fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"patch_size": 2}, "patch_size=2 .*not served, only patch_size=1"),
        ({"in_channels": 6}, "in_channels=6 are not served"),
        ({"guidance_embed": True}, "'guidance_embed'.*guidance_embeds"),
    ],
)
def test_configs_that_are_not_served_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        flux.FAMILY.build(COMMON | CONFIGS["dev"] | config)


@pytest.mark.parametrize(
    ("field", "message"),
    [({"theta": 256.0}, "no theta=256"), ({"scalars": ("s",)}, r"no scalars=\('s',\)")],
)
def test_fields_that_cannot_be_written_are_refused(field, message):
    with pytest.raises(UserError, match=message):
        flux.FAMILY.config(models.flux_dev() | field)
