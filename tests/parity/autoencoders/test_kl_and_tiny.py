"""AutoencoderKL and AutoencoderTiny against diffusers, on one set of weights."""

import jax
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

from jdiff import interop, models
from jdiff.autoencoders import kl_sd, kl_sd3, taesd
from jdiff.interop import loading
from jdiff.interop.families import BY_CLASS

torch = peer("torch")
diffusers = peer("diffusers")
torch.set_num_threads(1)

TYPES = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 2,
    "sample_size": 8,
}
CONFIGS = {
    "sd": ("AutoencoderKL", TYPES | {"block_out_channels": (4, 8), "scaling_factor": 0.31}),
    "flux": (
        "AutoencoderKL",
        TYPES
        | {
            "block_out_channels": (4, 4),
            "layers_per_block": 2,
            "latent_channels": 16,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
        },
    ),
    "tiny": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (8,) * 3,
            "decoder_block_out_channels": (8,) * 3,
            "num_encoder_blocks": (1, 2, 1),
            "num_decoder_blocks": (2, 0, 1),
            "scaling_factor": 1.7,
        },
    ),
}
X = 0.5 * images(2, 12, 20, 3)


@pytest.fixture(params=CONFIGS)
def pair(request, tmp_path):
    """`(name, their network, the folder that it wrote)`."""
    cls, config = CONFIGS[request.param]
    theirs = randomise(getattr(diffusers, cls)(**config), std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    return request.param, theirs, tmp_path


def scaled(theirs, z):
    """Their latents as their pipelines hand them to the denoising network."""
    return (z - (theirs.config.shift_factor or 0.0)) * theirs.config.scaling_factor


def test_encoding_and_decoding_are_theirs(pair):
    name, theirs, folder = pair
    coder = interop.autoencoder(folder / "theirs")
    mean, std = coder.moments(X)
    given = theirs.encode(channels_first(X))
    if name == "tiny":
        z, deviation = given.latents, torch.zeros_like(given.latents)
        assert not std.any()
    else:
        z, deviation = given.latent_dist.mean, given.latent_dist.std
        deviation = deviation * theirs.config.scaling_factor
        assert distance(std, channels_last(deviation)) < 1e-4
    assert distance(mean, channels_last(scaled(theirs, z))) < 1e-4
    assert distance(coder.decode(mean), channels_last(theirs.decode(z).sample)) < 1e-4


def test_what_is_saved_is_what_was_read_and_opens_there(pair):
    _, theirs, folder = pair
    ours = loading.load_component(folder / "theirs")
    assert_round_trip(ours, theirs, folder / "theirs", folder)


def test_tiles_are_cut_and_blended_as_theirs(tmp_path):
    plain = {"block_out_channels": (2, 4), "mid_block_add_attention": False}
    theirs = randomise(diffusers.AutoencoderKL(**(TYPES | plain)), std=0.3)
    theirs.save_pretrained(tmp_path)
    theirs.enable_tiling()
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = 8, 4
    coder = interop.autoencoder(tmp_path).tiled(8)
    # Down: whole tiles and one that is shorter than the overlap; across: one that is cut.
    z = images(2, 10, 8, 4)
    given = theirs.decode(channels_first(z / theirs.config.scaling_factor)).sample
    assert distance(coder.decode(z), channels_last(given)) < 1e-4
    x = 0.5 * images(2, 20, 6, 3)
    given = theirs.encode(channels_first(x)).latent_dist
    mean, std = (a / theirs.config.scaling_factor for a in coder.moments(x))
    assert distance(mean, channels_last(given.mean)) < 1e-4
    assert distance(std, channels_last(given.std)) < 1e-4


def test_tiles_of_tiny_cover_each_other_as_theirs(tmp_path):
    blocks = {"num_encoder_blocks": (0, 0, 0, 1), "num_decoder_blocks": (1, 0, 0, 0)}
    widths = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (4,) * 4)
    theirs = randomise(diffusers.AutoencoderTiny(**blocks, **widths), std=0.3)
    theirs.save_pretrained(tmp_path)
    theirs.enable_tiling()
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = 48, 6
    theirs.tile_overlap_factor = 0.5
    coder = interop.autoencoder(tmp_path).tiled(48, 24)
    # Down: whole tiles and one that is cut; across: one that is shorter than the overlap.
    x = 0.5 * images(1, 96, 40, 3)
    z = theirs.encode(channels_first(x)).latents
    assert distance(coder.encode(x), channels_last(z)) < 1e-4
    pictures = theirs.decode(z).sample
    assert distance(coder.decode(channels_last(z)), channels_last(pictures)) < 1e-4


def test_names_of_the_first_files_open_too(tmp_path):
    theirs = randomise(diffusers.AutoencoderKL(**CONFIGS["sd"][1]))
    theirs.save_pretrained(tmp_path)
    ours = loading.load_component(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    from safetensors.torch import load_file, save_file

    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = {}
    for name, weight in load_file(path).items():
        for new, former in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")  # noqa: PLW2901
        weights[name] = weight
    assert sum("proj_attn" in name for name in weights) == 4
    save_file(weights, path)
    again = loading.load_component(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, ours.params))


@pytest.mark.parametrize(
    ("cls", "preset", "count"),
    [
        # As diffusers counts those of the published folders.
        ("AutoencoderKL", kl_sd(), 83_653_863),
        ("AutoencoderKL", kl_sd3(), 83_819_683),
        ("AutoencoderTiny", taesd(), None),
    ],
)
def test_presets_have_as_many_parameters_as_theirs_of_their_config(cls, preset, count):
    family = BY_CLASS[cls]
    config = family.config(preset)
    model, fields = family.build(config)
    assert family.build(family.config(fields)) == (model, fields)
    _, shapes = models.abstract(lambda rngs: model(**fields, rngs=rngs))
    with torch.device("meta"):
        theirs = getattr(diffusers, cls)(**config)
    assert models.count(shapes) == sum(w.numel() for w in theirs.parameters())
    assert count in (None, models.count(shapes))
