"""CLIP with both towers, and what it does to pictures, against transformers."""

import json

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

from jdiff.errors import UserError
from jdiff.interop import loading
from jdiff.interop.families import clip_images
from jdiff.texts.clip_images import STD, prepare

torch = peer("torch")
transformers = peer("transformers")
processing = peer("transformers.models.clip.image_processing_pil_clip")
torch.set_num_threads(1)

TOWER = {"intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = TOWER | {"vocab_size": 40, "hidden_size": 16, "max_position_embeddings": 7}
VISION = TOWER | {"hidden_size": 12, "image_size": 10, "patch_size": 4}  # two pixels are not seen
IDS = np.asarray([[5, 9, 39, 1, 1], [4, 8, 15, 16, 39], [38, 39, 39, 39, 39]])


def network(folder):
    config = transformers.CLIPConfig(
        text_config=TEXT | {"eos_token_id": 39}, vision_config=VISION, projection_dim=6
    )
    theirs = randomise(transformers.CLIPModel(config), std=0.3)
    theirs.save_pretrained(folder)
    return theirs


def test_texts_and_images_are_compared_as_there(tmp_path):
    theirs = network(tmp_path / "theirs")
    ours = loading.load_component(tmp_path / "theirs")
    pixels = images(2, 10, 10, 3)

    @jax.jit
    def run(params):
        texts = ours.apply.method("embed_text")(params, IDS)
        pictures = ours.apply.method("embed_pixels")(params, pixels)
        return texts, pictures, ours.apply.method("compare")(params, texts, pictures)

    with torch.no_grad():
        out = theirs(input_ids=torch.tensor(IDS), pixel_values=channels_first(pixels))
    wanted = (out.text_embeds, out.image_embeds, out.logits_per_text)
    for found, expected in zip(run(ours.params), wanted, strict=True):
        assert distance(found, expected) < 1e-4
    assert_round_trip(ours, theirs, tmp_path / "theirs", tmp_path)


def test_a_scanned_network_in_the_first_files_config_is_the_same(tmp_path):
    """OpenAI's have the towers' configs twice; what the newer one says is not meant."""
    theirs = network(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in ("text", "vision"):
        config[f"{name}_config_dict"] = config[f"{name}_config"]
        config[f"{name}_config"] = {"hidden_size": 999}
    path.write_text(json.dumps(config))
    ours = loading.load_component(tmp_path, scan=True)
    pictures = np.tanh(images(2, 13, 17, 3))
    found = jax.jit(ours.apply.method("embed_images"))(ours.params, pictures)
    with torch.no_grad():
        pixels = channels_first(np.asarray(prepare(pictures, 10)))
        expected = theirs.get_image_features(pixels).pooler_output.numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert distance(found, expected) < 1e-4


@pytest.mark.parametrize("shape", [(61, 40), (40, 77), (9, 14), (24, 24)])
def test_pictures_are_prepared_as_there_up_to_its_rounding(shape):
    """Shrunk, enlarged, already of that size; there to 8 bits twice, after rows and columns."""
    pictures = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    pictures[1, :4] = 255  # an edge that bicubic overshoots at
    pictures[1, 4:] = 0
    size = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    theirs = processing.CLIPImageProcessorPil(**size)(list(pictures), return_tensors="pt")
    found = prepare(pictures / np.float32(127.5) - 1, 24)
    expected = channels_last(theirs["pixel_values"])
    assert found.shape == expected.shape
    levels = np.abs(found - expected) * 255 * STD
    assert levels.max() < 1.25 and levels.mean() < 0.4


def test_what_cannot_be_served_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"patch_size=\[4, 4\] is not served"):
        clip_images.fields_from_config({"vision_config": VISION | {"patch_size": [4, 4]}})
    with pytest.raises(UserError, match="num_channels=1 is not served, only 3"):
        clip_images.fields_from_config({"vision_config": VISION | {"num_channels": 1}})
    network(tmp_path)
    ours = loading.load_component(tmp_path)
    with pytest.raises(UserError, match=r"CLIP sees \[B, 10, 10, 3\], not \[1, 8, 8, 3\]: prepare"):
        jax.eval_shape(ours.apply.method("embed_pixels"), ours.params, images(1, 8, 8, 3))
