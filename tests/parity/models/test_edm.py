"""EDM's and EDM2's original layout: names, shapes and outputs of networks said again in torch."""

import json

import jax
import numpy as np
import pytest
from checkpoints import assert_same_files, channels_first, channels_last, distance, images
from peers import peer

from jdiff import models
from jdiff.errors import UserError
from jdiff.interop import loading, tables
from jdiff.interop.families import BY_CLASS

torch = peer("torch")
safetensors = peer("safetensors.torch")
networks = peer("edm_networks")
torch.set_num_threads(1)

QUICK = {"xla_backend_optimization_level": 0}  # compiles faster
X = images(2, 8, 8, 3)
T = np.asarray([-0.7, 0.4], np.float32)
LABEL = np.asarray([1, 3])
AUGMENT = images(2, 9, seed=1)
FREQUENCIES = images(32, seed=2)
SMALL = {"img_resolution": 8, "img_channels": 3, "label_dim": 5, "num_blocks": 1}
SMALL |= {"channel_mult": [1, 2], "attn_resolutions": [4], "model_channels": 16}
SONG = SMALL | {"model_type": "SongUNet", "augment_dim": 9}
NCSNPP = SONG | {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2}
NCSNPP |= {"resample_filter": [1, 3, 3, 1], "freqs": FREQUENCIES[:16].tolist()}
NCSNPP |= {"channel_mult": [1, 2, 2]}
ADM = SMALL | {"augment_dim": 9, "channel_mult": [4, 8]}  # heads have 64 channels
EDM2 = SMALL | {"channels_per_head": 8, "model_channels": 32}
EDM2 |= {"freqs": FREQUENCIES.tolist(), "phases": images(32, seed=3).tolist()}


def save(folder, cls, config, weights):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": cls, **config}))
    tensors = {name: w.contiguous() for name, w in weights.items()}
    safetensors.save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


def reference(cls, config):
    """`(weights, output)` of the network in torch."""
    hot = torch.eye(5)[torch.tensor(LABEL)]
    with torch.no_grad():
        if cls == "EDM2":
            weights = networks.Weights(1.0)
            return weights, networks.edm2(weights, config, channels_first(X), torch.tensor(T), hot)
        weights = networks.Weights()
        config = config | {"adm": "model_type" not in config}
        args = (channels_first(X), torch.tensor(T), hot, torch.tensor(AUGMENT))
        return weights, networks.edm(weights, config, *args)


@pytest.mark.parametrize(
    ("cls", "config"),
    [("VPPrecond", SONG), ("VEPrecond", NCSNPP), ("EDMPrecond", ADM), ("EDM2", EDM2)],
)
def test_outputs_and_round_trip(cls, config, tmp_path):
    weights, expected = reference(cls, config)
    folder = save(tmp_path / "theirs", cls, config, weights)
    found = loading.load_component(folder)
    cond = {"label": LABEL} | ({"augment": AUGMENT} if cls != "EDM2" else {})
    y = jax.jit(found.apply, compiler_options=QUICK)(found.params, X, T, cond)
    assert distance(y, channels_last(expected)) < 1e-5
    # What the file holds besides weights, buffers that the network computes, is no error.
    buffers = {"model.enc.4x4_down.conv0.resample_filter", "model.map_noise.freqs"}
    if cls == "EDM2":
        buffers = {"unet.emb_fourier.freqs", "logvar_linear.weight", "logvar_fourier.phases"}
    again = save(tmp_path / "whole", cls, config, weights | {n: torch.ones(2) for n in buffers})
    loading.save_component(loading.load_component(again), tmp_path / "ours")
    assert_same_files(tmp_path / "ours", folder)
    family = BY_CLASS[cls]
    _, fields = family.build(json.loads(json.dumps(family.config(found.fields))))
    assert fields == found.fields


#: The published networks by the arguments in their files, and their parameters.
PUBLISHED = {
    "edm-cifar10-32x32-cond-vp": (
        "EDMPrecond",
        {"img_resolution": 32, "label_dim": 10, "model_type": "SongUNet", "augment_dim": 9}
        | {"channel_mult": [2, 2, 2]},
        55_735_299,
    ),
    "edm-cifar10-32x32-cond-ve": (
        "EDMPrecond",
        {"img_resolution": 32, "label_dim": 10, "model_type": "SongUNet", "augment_dim": 9}
        | {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2}
        | {"resample_filter": [1, 3, 3, 1], "freqs": [1.0] * 128}
        | {"channel_mult": [2, 2, 2]},
        56_400_643,
    ),
    "edm-imagenet-64x64-cond-adm": (
        "EDMPrecond",
        {"img_resolution": 64, "label_dim": 1000},
        295_899_267,
    ),
    "edm2-img512-xxl": (
        "EDM2",
        {"img_resolution": 64, "img_channels": 4, "label_dim": 1000, "model_channels": 448}
        | {"freqs": [1.0] * 448, "phases": [0.0] * 448},
        1_523_164_773 - 128,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_a_tensor_for_every_weight(name):
    cls, config, count = PUBLISHED[name]
    family = BY_CLASS[cls]
    model, fields = family.build({"img_channels": 3} | config)
    _, shapes = models.abstract(lambda rngs: model(**fields, rngs=rngs))
    assert models.count(shapes) == count
    entries = tables.plan(shapes, family, fields)
    keys = [key for entry in entries for layer in entry.keys for key in layer]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("cls", "config", "message"),
    [
        ("EDMPrecond", SONG | {"encoder_type": "skip"}, "encoder_type 'skip' is not known"),
        ("EDMPrecond", SONG | {"decoder_type": "skip"}, "decoder_type='skip' is not served"),
        ("EDMPrecond", SONG | {"embedding_type": "fourier"}, 'needs them as "freqs"'),
        ("EDMPrecond", {"img_channels": 3}, "the config has no img_resolution"),
        ("EDM2", SMALL, "the config has no freqs, phases"),
        ("EDM2", EDM2 | {"channel_mult_emb": 8}, "channel_mult_emb=8 is not served, only 2"),
    ],
)
def test_what_cannot_be_served_is_named(cls, config, message):
    with pytest.raises(UserError, match=message):
        BY_CLASS[cls].build(config)


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        ("EDMPrecond", models.ddpm_cifar10(), "holds the styles ddpmpp, ncsnpp and adm"),
        ("EDMPrecond", models.ddpmpp_cifar10(out_channels=6), "has no out_channels=6"),
        ("EDMPrecond", models.ncsnpp_cifar10(), "name the frequencies"),
        ("EDM2", models.edm2_imagenet("img64-S"), "give frequencies and phases"),
    ],
)
def test_what_cannot_be_written_is_named(cls, fields, message):
    with pytest.raises(UserError, match=message):
        BY_CLASS[cls].config(fields)
