"""Encoders out of folders: whose tokenizer it is, what does not fit; MiniLM as published."""

import shutil

import jax
import made_tokenizers as made
import numpy as np
import pytest

from jdiff import UserError, interop, models, texts
from jdiff.data import prepare
from jdiff.texts.clip import ClipText

SMALL = {"vocab": 600, "length": 16, "width": 8, "depth": 2, "heads": 2, "hidden": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline's: text_encoder and, beside it, tokenizer."""
    place = tmp_path_factory.mktemp("pipeline")
    _, params = models.init(lambda rngs: ClipText(**SMALL, rngs=rngs), jax.random.key(0))
    made.clip(place / "tokenizer_2", pad="!")
    component = interop.component("CLIPTextModel", params, **SMALL)
    interop.save_component(component, place / "text_encoder_2")
    return place


def test_the_tokenizer_beside_it_is_taken(folder, tmp_path):
    opened = interop.text_encoder(folder / "text_encoder_2", layer=-2, batch=3)
    assert opened.tokenizer.name == str(folder / "tokenizer_2") and opened.tokenizer.pad == 0
    assert (opened.length, opened.layer, opened.batch, opened.masked) == (16, -2, 3, False)
    both = shutil.copytree(folder / "text_encoder_2", tmp_path / "both")
    made.clip(both)
    opened = interop.text_encoder(both, masked=True, compute="bfloat16")
    assert opened.tokenizer.name == str(both) and opened.masked
    assert opened.apply.skeleton().dtype == "bfloat16"


def test_a_component_that_is_loaded_already(folder):
    network = interop.load_component(folder / "text_encoder_2")
    tokenizer = texts.tokenizer(folder / "tokenizer_2")
    opened = interop.text_encoder(network, tokenizer, length=9)
    assert opened.params is network.params and (opened.length, opened.width) == (9, 8)
    with pytest.raises(UserError, match="variant given, for a network that is loaded"):
        interop.text_encoder(network, tokenizer, variant="fp16")
    with pytest.raises(UserError, match="give tokenizer="):
        interop.text_encoder(network)


def test_what_does_not_fit(folder, tmp_path):
    network = folder / "text_encoder_2"
    with pytest.raises(UserError, match="made for T5, and the network is ClipText"):
        interop.text_encoder(network, made.t5(tmp_path / "t5"))
    with pytest.raises(UserError, match="positions for 16 tokens"):
        interop.text_encoder(network, length=17)
    alone = shutil.copytree(network, tmp_path / "text_encoder")
    with pytest.raises(UserError, match="holds no tokenizer, nor does a folder beside it"):
        interop.text_encoder(alone)
    with pytest.raises(UserError, match="has no config.json"):
        interop.text_encoder(tmp_path, folder / "tokenizer_2")


def test_minilm_finds_what_sentence_transformers_publishes():
    """The three sentences of its documentation's first page, and their similarities there."""
    path = prepare.location("minilm")
    if not path.is_file():
        pytest.skip(f"NOT TESTED: no weights at {path}; run `jdiff prepare minilm`")
    encoder = texts.minilm(length=16, batch=3)
    sentences = [
        "The weather is lovely today.",
        "It's so sunny outside!",
        "He drove to the stadium.",
    ]
    told = encoder.encode(sentences)
    assert told["text"].shape == (3, 16, 384) and told["pooled"].shape == (3, 384)
    pooled = np.asarray(told["pooled"])
    published = [[1, 0.6660, 0.1046], [0.6660, 1, 0.1411], [0.1046, 0.1411, 1]]
    np.testing.assert_allclose(pooled @ pooled.T, published, atol=1e-4)


def test_minilm_that_is_not_prepared(tmp_path):
    with pytest.raises(UserError, match="run `jdiff prepare minilm`"):
        texts.minilm(tmp_path / "minilm.safetensors")
