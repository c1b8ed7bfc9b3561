"""BERT against transformers, on random weights, and MiniLM on its own."""

import functools

import jax
import numpy as np
import pytest
from checkpoints import assert_round_trip, distance, randomise
from peers import peer

from jdiff import models
from jdiff.data import prepare
from jdiff.errors import UserError
from jdiff.interop import files, loading
from jdiff.interop.families import bert
from jdiff.texts.bert import Bert, minilm_l6
from jdiff.texts.prepared import MINILM

torch = peer("torch")
transformers = peer("transformers")
safetensors = peer("safetensors.torch")
torch.set_num_threads(1)

CONFIG = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 9,
}
IDS = np.random.default_rng(0).integers(2, 40, (3, 7))
MASK = np.arange(7) < np.asarray([[7], [4], [1]])
TYPES = np.arange(7) >= np.asarray([[3], [7], [1]])
LAYERS = (0, 1, -2, -1)


def network(folder, cls="BertModel"):
    theirs = randomise(getattr(transformers, cls)(transformers.BertConfig(**CONFIG)), std=0.3)
    theirs.save_pretrained(folder)
    return theirs


def assert_reads_as(ours, theirs, ids, masks, types=None):
    types = np.zeros_like(ids) if types is None else types.astype(ids.dtype)
    read = jax.jit(functools.partial(ours.apply.method("read"), layers=LAYERS))
    for mask in masks:
        with torch.no_grad():
            given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
            given = {name: torch.tensor(value) for name, value in given.items()}
            out = theirs(**given, output_hidden_states=True)
        got = read(ours.params, ids, mask, types=types)
        assert distance(got.last, out.last_hidden_state) < 1e-4
        assert distance(got.pooled, out.pooler_output) < 1e-4
        for layer, state in zip(LAYERS, got.hidden, strict=True):
            assert distance(state, out.hidden_states[layer]) < 1e-4, layer


def test_states_of_layers_and_the_pooled_one(tmp_path):
    theirs = network(tmp_path / "theirs")
    ours = loading.load_component(tmp_path / "theirs", scan=True)
    assert_reads_as(ours, theirs, IDS, (np.ones_like(MASK), MASK), TYPES)
    # Untold, tokens are of type 0 and all seen.
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).last_hidden_state
    assert distance(jax.jit(ours.apply.method("read"))(ours.params, IDS).last, expected) < 1e-4
    assert_round_trip(ours, theirs, tmp_path / "theirs", tmp_path, scan=True)


def test_files_with_a_head_and_the_first_files_are_read_and_written_again(tmp_path):
    """There "bert." comes first, a norm has gamma and beta, and nothing is pooled."""
    theirs = network(tmp_path / "head", "BertForMaskedLM")
    tensors = {}
    for key, value in files.component(tmp_path / "head").items():
        name = key.replace("LayerNorm.weight", "LayerNorm.gamma")
        tensors[name.replace("LayerNorm.bias", "LayerNorm.beta")] = torch.tensor(value)
    safetensors.save_file(tensors, tmp_path / "head" / "model.safetensors")
    with pytest.raises(UserError, match=r"missing: pooler\.dense\.bias, pooler\.dense\.weight"):
        loading.load_component(tmp_path / "head")
    ours = loading.load_component(tmp_path / "head", pooling=False)
    norm = theirs.bert.embeddings.LayerNorm.weight.detach().numpy()
    np.testing.assert_array_equal(ours.params["norm"]["scale"], norm)
    assert jax.eval_shape(ours.apply.method("read"), ours.params, IDS).pooled is None
    loading.save_component(ours, tmp_path / "again")
    written = files.component(tmp_path / "again")
    assert written.keys() == {key for key in tensors if key.startswith("bert.")}
    for name, value in written.items():
        np.testing.assert_array_equal(value, tensors[name].numpy(), err_msg=name)


def test_minilm_has_transformers_count():
    _, shapes = models.abstract(lambda rngs: Bert(**minilm_l6(), rngs=rngs))
    with torch.device("meta"):
        theirs = transformers.BertModel(transformers.BertConfig(**MINILM))
    assert models.count(shapes) == sum(p.numel() for p in theirs.parameters()) == 22_713_216


def test_minilm_on_its_real_weights():
    path = prepare.location("minilm")
    if not path.is_file():
        pytest.skip("MiniLM is not there: jdiff prepare minilm")
    ours = loading.load_file(path, "BertModel", MINILM, scan=True)
    assert loading.parameters(ours) == 22_713_216
    theirs = transformers.BertModel(transformers.BertConfig(**MINILM)).eval()
    weights = safetensors.load_file(path)
    weights.pop("embeddings.position_ids")
    theirs.load_state_dict(weights)
    ids = np.random.default_rng(0).integers(999, 30522, (3, 7))
    assert_reads_as(ours, theirs, ids, (MASK,))


def test_options_that_we_have_not_are_refused():
    with pytest.raises(UserError, match="is_decoder=True is not served, only False"):
        bert.fields_from_config({"is_decoder": True})
