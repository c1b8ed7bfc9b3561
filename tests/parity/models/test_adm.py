"""ADM's original layout: the names of its files, on the network said again in torch."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from checkpoints import assert_same_files, channels_first, channels_last, distance, images
from peers import peer

from jdiff import interop, models
from jdiff.errors import UserError
from jdiff.interop import tables
from jdiff.interop.families import BY_CLASS
from jdiff.models.unet_blocks import STYLES

torch = peer("torch")
safetensors = peer("safetensors.torch")
networks = peer("edm_networks")
torch.set_num_threads(1)

QUICK = {"xla_backend_optimization_level": 0}  # compiles faster
FAMILY = BY_CLASS["ADM"]
X = images(2, 8, 8, 3)
T = np.asarray([7.0, 400.0], np.float32)
LABEL = np.asarray([1, 3])
FIELDS = {"image_size": 8, "channels": 128, "multipliers": (1, 2), "blocks": 1, "style": "adm"}
FIELDS |= {"attention_sizes": (4,), "num_classes": 5}
CONFIG = {"adm": True, "img_resolution": 8, "model_channels": 128, "channel_mult": [1, 2]}
CONFIG |= {"num_blocks": 1, "attn_resolutions": [4]}

#: Blocks by their names in EDM's files, and where they stand in ADM's.
BLOCKS = {
    "enc.8x8_block0": "input_blocks.1.0",
    "enc.4x4_down": "input_blocks.2.0",
    "enc.4x4_block0": "input_blocks.3.0",
    "dec.4x4_in0": "middle_block.0",
    "dec.4x4_in1": "middle_block.2",
    "dec.4x4_block0": "output_blocks.0.0",
    "dec.4x4_block1": "output_blocks.1.0",
    "dec.8x8_up": "output_blocks.1.2",
    "dec.8x8_block0": "output_blocks.2.0",
    "dec.8x8_block1": "output_blocks.3.0",
}
ATTENTIONS = {
    "enc.4x4_block0": "input_blocks.3.1",
    "dec.4x4_in0": "middle_block.1",
    "dec.4x4_block0": "output_blocks.0.1",
    "dec.4x4_block1": "output_blocks.1.1",
}
LAYERS = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}
REST = {
    "map_layer0": "time_embed.0",
    "map_layer1": "time_embed.2",
    "map_label": "label_emb",
    "enc.8x8_conv": "input_blocks.0.0",
    "out_norm": "out.0",
    "out_conv": "out.2",
}


def renamed(weights, heads):
    """EDM's tensors under ADM's names, a head's q, k and v behind each other."""
    found = {}
    for name, w in weights.items():
        module, leaf = name.removeprefix("model.").rsplit(".", 1)
        block, _, layer = module.rpartition(".")
        if module in REST:
            found[f"{REST[module]}.{leaf}"] = w.T if module == "map_label" else w
        elif layer in LAYERS:
            found[f"{BLOCKS[block]}.{LAYERS[layer]}.{leaf}"] = w
        elif layer in ("qkv", "proj"):
            if layer == "qkv":
                w = w.reshape(heads, -1, 3, *w.shape[1:]).transpose(1, 2).reshape(w.shape)
            row = w[..., 0] if leaf == "weight" else w
            found[f"{ATTENTIONS[block]}.{'proj_out' if layer == 'proj' else 'qkv'}.{leaf}"] = row
        elif layer == "norm2":
            found[f"{ATTENTIONS[block]}.norm.{leaf}"] = w
    return {name: w.contiguous() for name, w in found.items()}


@pytest.mark.parametrize("style", ["adm", dataclasses.replace(STYLES["adm"], heads=4)])
def test_outputs_and_round_trip(style, tmp_path):
    hot, nothing = torch.eye(5)[torch.tensor(LABEL)], torch.zeros(2, 9)
    weights = networks.Weights()
    with torch.no_grad():
        y = networks.edm(weights, CONFIG, channels_first(X), torch.tensor(T), hot, nothing)
    (tmp_path / "theirs").mkdir()
    file = tmp_path / "theirs" / "diffusion_pytorch_model.safetensors"
    # The heads that are 64 channels wide are 4 at 256 channels, where the network attends.
    safetensors.save_file(renamed(weights, 4), file)
    found = interop.load_file(file, "ADM", FIELDS | {"style": style})
    ours = jax.jit(found.apply, compiler_options=QUICK)(found.params, X, T, {"label": LABEL})
    assert distance(ours, channels_last(y)) < 1e-5
    interop.save_component(interop.component("ADM", found.params, **found.fields), tmp_path / "a")
    assert_same_files(tmp_path / "a", tmp_path / "theirs")
    assert interop.load_component(tmp_path / "a").apply == found.apply


@pytest.mark.parametrize(
    ("config", "last"),
    [
        ({"name": "adm_imagenet", "image_size": 64}, 15),
        ({"name": "adm_imagenet", "image_size": 512}, 20),
        ({"name": "adm_upsampler"}, 17),
        ({"name": "iddpm_cifar10"}, 15),
    ],
)
def test_published_networks_have_a_tensor_for_every_weight(config, last):
    model, fields = FAMILY.build(config)
    _, shapes = models.abstract(lambda rngs: model(**fields, rngs=rngs))
    keys = [k for e in tables.plan(shapes, FAMILY, fields) for layer in e.keys for k in layer]
    assert len(set(keys)) == len(keys)
    numbers = lambda part: {int(key.split(".")[1]) for key in keys if key.startswith(part)}
    assert numbers("input_blocks") == numbers("output_blocks") == set(range(last + 1))
    assert ("label_emb.weight" in keys) == (config["name"] != "iddpm_cifar10")
    again = FAMILY.build(json.loads(json.dumps(FAMILY.config(fields))))[1]
    assert again["style"] == fields["style"]


def test_only_the_network_for_64_pixels_has_queries_before_heads():
    """Its code splits into q, k and v, then heads; the others' into heads, then q, k and v."""
    for size, expected in (
        (64, np.arange(384)),
        (256, np.arange(384).reshape(2, 3, 64).swapaxes(0, 1).ravel()),  # heads of 64
        (128, np.arange(384).reshape(4, 3, 32).swapaxes(0, 1).ravel()),  # four heads
    ):
        rules = FAMILY.table(models.adm_imagenet(size))
        kind = next(rule.kind for rule in rules if rule.ours == "middle/0/qkv")
        np.testing.assert_array_equal(kind.leaves["bias"][1].ours(np.arange(384)), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "adm_imagenets"}, "Did you mean 'adm_imagenet'"),
        ({}, "the file has no config"),
        ({"image_sizes": 64}, "Did you mean 'image_size'"),
        (models.ddpmpp_cifar10(), "holds the styles adm and iddpm, not 'ddpmpp'"),
    ],
)
def test_what_cannot_be_served_is_named(config, message):
    with pytest.raises(UserError, match=message):
        FAMILY.build(config)
