"""T5's encoder against transformers, on one set of weights."""

import functools

import jax
import numpy as np
import pytest
from checkpoints import assert_round_trip, assert_same_files, distance, randomise
from peers import peer

from jdiff import models
from jdiff.errors import UserError
from jdiff.interop import files, loading
from jdiff.interop.families import t5
from jdiff.texts.t5 import T5Encoder, relative_buckets, xl, xxl

torch = peer("torch")
transformers = peer("transformers")
safetensors = peer("safetensors.torch")
published = peer("transformers.models.t5.modeling_t5")
torch.set_num_threads(1)

CONFIG = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 6,  # 2 heads of it are not the width
    "d_ff": 20,
    "num_layers": 3,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,  # nearer than the text is long
    "feed_forward_proj": "gated-gelu",
}
IDS = np.random.default_rng(0).integers(2, 40, (3, 9))
MASK = np.arange(9) < np.asarray([[9], [4], [1]])
LAYERS = (0, 1, -2)


def network(folder, cls="T5EncoderModel", **changes):
    theirs = randomise(
        getattr(transformers, cls)(transformers.T5Config(**(CONFIG | changes))), std=0.3
    )
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("projection", ["gated-gelu", "relu"])
def test_states_of_layers_and_the_last(tmp_path, projection):
    theirs = network(tmp_path / "theirs", feed_forward_proj=projection)
    fields = {"scan": projection == "gated-gelu"}
    ours = loading.load_component(tmp_path / "theirs", **fields)
    read = jax.jit(functools.partial(ours.apply.method("read"), layers=LAYERS))
    for mask in (np.ones_like(MASK), MASK):
        with torch.no_grad():
            given = {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(mask)}
            out = theirs(**given, output_hidden_states=True)
        got = read(ours.params, IDS, mask)
        assert got.pooled is None
        assert distance(got.last, out.last_hidden_state) < 1e-4
        for layer, state in zip(LAYERS, got.hidden, strict=True):
            assert distance(state, out.hidden_states[layer]) < 1e-4, layer
    finished = ours.apply.method("finish")(ours.params, got.hidden[2])
    with torch.no_grad():
        assert distance(finished, theirs.encoder.final_layer_norm(out.hidden_states[-2])) < 1e-4
    assert_round_trip(ours, theirs, tmp_path / "theirs", tmp_path, **fields)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 6), (12, 100), (64, 1000)])
def test_the_buckets_of_distances_are_the_published_ones(buckets, distance):
    """Every edge between two buckets, also those where the logarithm is a whole number."""
    bucket = published.T5Attention._relative_position_bucket
    ahead = torch.arange(1200)[None] - torch.arange(1200)[:, None]
    theirs = bucket(ahead, num_buckets=buckets, max_distance=distance)
    np.testing.assert_array_equal(relative_buckets(1200, buckets, distance), theirs.numpy())


def test_the_encoder_of_a_whole_t5_is_read(tmp_path):
    """Its decoder is passed over; what is written again is the encoder alone."""
    theirs = network(tmp_path / "whole", "T5ForConditionalGeneration", tie_word_embeddings=False)
    ours = loading.load_component(tmp_path / "whole")
    loading.save_component(ours, tmp_path / "encoder")
    alone = transformers.T5EncoderModel.from_pretrained(tmp_path / "encoder").state_dict()
    whole = theirs.state_dict()
    assert alone and all(torch.equal(weight, whole[key]) for key, weight in alone.items())
    assert ours.family is t5.FAMILY and "decoder" not in str(
        files.component(tmp_path / "encoder").keys()
    )


@pytest.mark.parametrize("both", [True, False])
def test_the_table_of_tokens_is_known_by_both_its_names(tmp_path, both):
    theirs = network(tmp_path / "one")
    tensors = {k: torch.tensor(v) for k, v in files.component(tmp_path / "one").items()}
    table = tensors["shared.weight"]
    tensors["encoder.embed_tokens.weight"] = table.clone()
    if not both:
        del tensors["shared.weight"]
    safetensors.save_file(tensors, tmp_path / "one" / "model.safetensors")
    ours = loading.load_component(tmp_path / "one")
    np.testing.assert_array_equal(ours.params["tokens"], table.numpy())
    loading.save_component(ours, tmp_path / "two")
    if not both:
        assert_same_files(tmp_path / "two", tmp_path / "one")
    again = transformers.T5EncoderModel.from_pretrained(tmp_path / "two").state_dict()
    assert all(torch.equal(again[key], weight) for key, weight in theirs.state_dict().items())


@pytest.mark.parametrize(("fields", "count"), [(xxl, 4_762_310_656), (xl, 1_223_527_424)])
def test_the_published_encoders_have_transformers_count(fields, count):
    _, shapes = models.abstract(lambda rngs: T5Encoder(**fields(), rngs=rngs))
    with torch.device("meta"):
        theirs = transformers.T5EncoderModel(
            transformers.T5Config(**t5.config_from_fields(fields()))
        )
    assert models.count(shapes) == sum(p.numel() for p in theirs.parameters()) == count


def test_a_perceptrons_name_is_read_as_there():
    names = {
        "gated-gelu": ("gelu_new", True),
        "gated-silu": ("silu", True),
        "relu": ("relu", False),
    }
    for name, (activation, gated) in names.items():
        fields = t5.fields_from_config({"feed_forward_proj": name})[1]
        assert (fields["activation"], fields["gated"]) == (activation, gated)
        assert t5.config_from_fields(fields)["feed_forward_proj"] == name
    with pytest.raises(UserError, match="feed_forward_proj='glu-gelu' is not served"):
        t5.fields_from_config({"feed_forward_proj": "glu-gelu"})
    with pytest.raises(UserError, match="a gated 'gelu' cannot be written"):
        t5.config_from_fields({"activation": "gelu"})
