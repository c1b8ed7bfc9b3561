"""Qwen2.5-VL's text tower and Qwen3 against transformers, on one set of weights."""

import functools
import json
import re

import jax
import numpy as np
import pytest
from checkpoints import distance, randomise
from peers import peer

from jdiff import models
from jdiff.errors import UserError
from jdiff.interop import files, loading
from jdiff.interop.families import qwen_text
from jdiff.models import rope
from jdiff.texts.qwen import QwenText, qwen3_4b, qwen25_vl_7b

torch = peer("torch")
transformers = peer("transformers")
safetensors = peer("safetensors.torch")
torch.set_num_threads(1)

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}
#: A head's two planes are turned by a place in time and one in height; theta is small, so that
#: these few places turn both.
TURNS = {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [1, 1, 0]}
VISION = {
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_heads": 2,
    "out_hidden_size": 16,
    "patch_size": 2,
    "fullatt_block_indexes": [0],
}
IDS = np.random.default_rng(0).integers(2, 40, (3, 7))
MASK = np.arange(7) < np.asarray([[7], [4], [1]])
LAYERS = (0, 1, -2)


def vl(**changes):
    """The whole model, with its visual tower and its map to tokens."""
    text = TEXT | {"rope_parameters": TURNS} | changes
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=VISION)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3(**changes):
    """The whole model; four heads of 6 channels are not the width."""
    turns = {"rope_type": "default", "rope_theta": 30.0}
    config = TEXT | {"head_dim": 6, "rope_parameters": turns} | changes
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config))


def tower(theirs):
    """The part of a whole model that reads text."""
    return getattr(theirs.model, "language_model", theirs.model)


@pytest.fixture(scope="module", params=[vl, qwen3], ids=["vl", "qwen3"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    theirs = randomise(request.param(), std=0.3)
    theirs.save_pretrained(folder)
    return loading.load_component(folder, scan=request.param is qwen3), theirs, folder


@functools.cache
def reader(ours):
    return jax.jit(functools.partial(ours.apply.method("read"), layers=LAYERS))


@pytest.mark.parametrize("mask", [np.ones_like(MASK), MASK], ids=["all seen", "padded"])
def test_states_of_layers_and_the_last(pair, mask):
    ours, theirs, _ = pair
    assert ours.model is QwenText
    with torch.no_grad():
        given = {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(mask)}
        out = theirs.model(**given, output_hidden_states=True)
    got = reader(ours)(ours.params, IDS, mask)
    assert got.pooled is None
    assert distance(got.last, out.hidden_states[-1]) < 1e-4
    for layer, state in zip(LAYERS, got.hidden, strict=True):
        assert distance(state, out.hidden_states[layer]) < 1e-4, layer
    finished = ours.apply.method("finish")(ours.params, got.hidden[2])
    with torch.no_grad():
        assert distance(finished, tower(theirs).norm(out.hidden_states[-2])) < 1e-4


def test_padding_in_front_does_not_matter(pair):
    """Only differences of places do."""
    ours, _, _ = pair
    text = IDS[:, :4]
    behind = np.pad(text, ((0, 0), (0, 3))), np.pad(np.ones_like(text, bool), ((0, 0), (0, 3)))
    ahead = np.pad(text, ((0, 0), (3, 0))), np.pad(np.ones_like(text, bool), ((0, 0), (3, 0)))
    states = [reader(ours)(ours.params, *given).last for given in (behind, ahead)]
    assert distance(states[1][:, 3:], states[0][:, :4]) < 1e-5


def test_words_are_turned_by_one_position():
    """Places that agree in time, height and width make the angles of plain rotary positions."""
    network = vl(rope_parameters=TURNS | {"mrope_section": [1, 0, 1]}).model.language_model
    places = np.arange(7)
    alike = torch.tensor(places).expand(3, 1, -1)
    cos, sin = network.rotary_emb(torch.zeros(1), alike)
    turns = rope.angles(places[:, None], (4,), 30.0)
    np.testing.assert_allclose(cos[0], np.cos(np.tile(turns, 2)), atol=1e-5)
    np.testing.assert_allclose(sin[0], np.sin(np.tile(turns, 2)), atol=1e-5)
    # A picture's places do not agree: there it is another map.
    other = alike.clone()
    other[2] += 1
    assert (network.rotary_emb(torch.zeros(1), other)[0] - cos).abs().max() > 0.1


def test_what_is_written_is_the_tower_bit_for_bit_and_opens_there(pair, tmp_path):
    ours, theirs, folder = pair
    loading.save_component(ours, tmp_path / "ours")
    given, saved = files.component(folder), files.component(tmp_path / "ours")
    rest = re.compile(r"visual\..*|lm_head\.weight")
    assert saved.keys() == {name for name in given if not rest.fullmatch(name)}
    for name, tensor in saved.items():
        np.testing.assert_array_equal(tensor, given[name], err_msg=name)
    # A network of our own is written with the config that its fields make.
    written = loading.component(ours.family.cls, ours.params, **ours.fields)
    loading.save_component(written, tmp_path / "own")
    weights = tower(theirs).state_dict()
    for path in ("ours", "own"):
        back = type(tower(theirs)).from_pretrained(tmp_path / path)
        assert back.state_dict().keys() == weights.keys()
        assert all(torch.equal(back.state_dict()[name], weights[name]) for name in weights)
    with torch.no_grad():
        states = [one(torch.tensor(IDS)).last_hidden_state for one in (back, tower(theirs))]
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [
        ("model.", "visual.merger"),
        ("model.language_model.", "model.visual.merger"),
        ("language_model.model.", "visual.merger"),
        ("language_model.", "visual.merger"),
        ("", "lm_head"),
    ],
)
def test_names_of_every_age_are_read_and_kept(pair, tmp_path, prefix, beside):
    ours, theirs, folder = pair
    weights = {prefix + name: w.clone() for name, w in tower(theirs).state_dict().items()}
    also = {f"{beside}.weight": torch.zeros(2)}
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    safetensors.save_file(weights | also, tmp_path / "model.safetensors")
    again = loading.load_component(tmp_path, scan=ours.fields.get("scan", False))
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, ours.params))
    loading.save_component(again, tmp_path / "saved")
    assert files.component(tmp_path / "saved").keys() == weights.keys()


def test_a_tensor_that_is_neither_the_towers_nor_known_is_refused(pair, tmp_path):
    _, _, folder = pair
    tensors = safetensors.load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    extra = {"model.layers.3.norm.weight": torch.zeros(2)}
    safetensors.save_file(tensors | extra, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"not part of it: layers\.3\.norm\.weight"):
        loading.load_component(tmp_path)


def test_configs_of_earlier_versions_mean_the_same(pair):
    ours, _, folder = pair
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config", config)
    turns = text.pop("rope_parameters")
    text["rope_theta"] = turns["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 0]}
    fields = {name: value for name, value in ours.fields.items() if name != "scan"}
    assert ours.family.build(config | text) == (QwenText, fields)
    assert ours.family.build(ours.family.config(fields)) == (QwenText, fields)


@pytest.mark.parametrize(
    ("preset", "family", "cls", "count"),
    [
        (qwen3_4b, qwen_text.FAMILIES[1], "Qwen3", 4_022_468_096),
        (qwen25_vl_7b, qwen_text.FAMILIES[0], "Qwen2_5_VLText", 7_070_619_136),
    ],
)
def test_presets_have_as_many_parameters_as_theirs(preset, family, cls, count):
    _, shapes = models.abstract(lambda rngs: QwenText(**preset(), rngs=rngs))
    config = getattr(transformers, f"{cls}Config")(**family.config(preset()))
    with torch.device("meta"):
        theirs = getattr(transformers, f"{cls}Model")(config)
    assert sum(w.numel() for w in theirs.parameters()) == models.count(shapes) == count


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not served"),
        ({"use_sliding_window": True}, "windows of attention are not served"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "windows of attention are not"),
        ({"attention_bias": True}, "attention_bias=True is not served"),
        ({"hidden_act": "gelu_fast"}, "hidden_act 'gelu_fast' is not known"),
    ],
    ids=str,
)
def test_configs_that_are_not_served(config, message):
    with pytest.raises(UserError, match=message):
        qwen_text.FAMILIES[1].build(config)


def test_fields_that_cannot_be_written():
    with pytest.raises(UserError, match=r"Qwen3Model has no qk_norm=False: only True"):
        qwen_text.FAMILIES[1].config({"qk_norm": False})
    with pytest.raises(UserError, match=r"Qwen2_5_VLTextModel has no head_width=64"):
        qwen_text.FAMILIES[0].config(qwen25_vl_7b(head_width=64))


def test_keys_that_do_not_share_queries_evenly_are_refused():
    with pytest.raises(ValueError, match="heads=3 does not divide heads=4"):
        models.abstract(lambda rngs: QwenText(heads=4, kv_heads=3, rngs=rngs))
