"""CLIP's text tower against transformers, on one set of weights."""

import functools

import jax
import numpy as np
import pytest
from checkpoints import assert_round_trip, assert_same_files, distance, randomise
from peers import peer

from jdiff import models
from jdiff.errors import UserError
from jdiff.interop import files, loading
from jdiff.interop.families import clip
from jdiff.texts.clip import ClipText, big_g, vit_h, vit_l

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
    "projection_dim": 6,
}
# The end, 37, is not the largest id; it comes early, twice, as the first, and not at all.
IDS = np.asarray(
    [
        [5, 39, 7, 37, 3, 3, 3],
        [38, 37, 37, 37, 37, 37, 37],
        [37, 12, 39, 39, 2, 9, 11],
        [4, 8, 15, 16, 23, 38, 36],
    ]
)
MASK = np.arange(7) < np.asarray([[4], [2], [7], [5]])
LAYERS = (0, 1, -2, 3)
CASES = {
    "CLIPTextModel": ({"eos_token_id": 37}, {}),
    "CLIPTextModelWithProjection": ({"eos_token_id": 2, "hidden_act": "gelu"}, {"scan": True}),
}


def network(folder, cls="CLIPTextModel", **changes):
    config = transformers.CLIPTextConfig(**(CONFIG | changes))
    theirs = randomise(getattr(transformers, cls)(config), std=0.3)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("cls", CASES)
def test_states_of_layers_and_the_pooled_one(tmp_path, cls):
    changes, fields = CASES[cls]
    theirs = network(tmp_path / "theirs", cls, **changes)
    ours = loading.load_component(tmp_path / "theirs", **fields)
    read = jax.jit(functools.partial(ours.apply.method("read"), layers=LAYERS))
    for mask in (np.ones_like(MASK), MASK):
        with torch.no_grad():
            given = {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(mask)}
            out = theirs(**given, output_hidden_states=True)
        got = read(ours.params, IDS, mask)
        assert distance(got.last, out.last_hidden_state) < 1e-4
        pooled = out.text_embeds if fields else out.pooler_output
        assert distance(got.pooled, pooled) < 1e-4
        for layer, state in zip(LAYERS, got.hidden, strict=True):
            assert distance(state, out.hidden_states[layer]) < 1e-4, layer
    # clip_skip: the last norm on the states of an earlier layer.
    skipped = ours.apply.method("finish")(ours.params, got.hidden[2])
    tower = theirs.text_model if fields else theirs
    with torch.no_grad():
        assert distance(skipped, tower.final_layer_norm(out.hidden_states[-2])) < 1e-4
    assert_round_trip(ours, theirs, tmp_path / "theirs", tmp_path, **fields)


def test_both_layouts_that_transformers_has_written_are_read_and_written_again(tmp_path):
    """Version 4 has "text_model." before the names, and wrote the positions at first."""
    theirs = network(tmp_path / "new")
    new = files.component(tmp_path / "new")
    assert not any(name.startswith("text_model.") for name in new)
    old = {f"text_model.{name}": torch.tensor(tensor) for name, tensor in new.items()}
    (tmp_path / "old").mkdir()
    config = (tmp_path / "new" / "config.json").read_text()
    (tmp_path / "old" / "config.json").write_text(config)
    unread = {"text_model.embeddings.position_ids": torch.arange(9)[None]}
    safetensors.save_file(old | unread, tmp_path / "old" / "model.safetensors")
    found = {name: loading.load_component(tmp_path / name) for name in ("new", "old")}
    assert jax.tree.all(jax.tree.map(np.array_equal, found["new"].params, found["old"].params))
    for name, component in found.items():
        again = tmp_path / f"{name} again"
        loading.save_component(component, again)
        assert (again / "config.json").read_text() == config
        back = transformers.CLIPTextModel.from_pretrained(again).state_dict()
        assert all(torch.equal(back[key], weight) for key, weight in theirs.state_dict().items())
    assert_same_files(tmp_path / "new again", tmp_path / "new")
    written = files.component(tmp_path / "old again")
    assert written.keys() == old.keys()
    assert all(np.array_equal(written[name], tensor) for name, tensor in old.items())


@pytest.mark.parametrize(
    ("fields", "cls"),
    [(vit_l, "CLIPTextModel"), (vit_h, "CLIPTextModel"), (big_g, "CLIPTextModelWithProjection")],
)
def test_the_published_towers_have_transformers_count(fields, cls):
    _, shapes = models.abstract(lambda rngs: ClipText(**fields(), rngs=rngs))
    config = transformers.CLIPTextConfig(**clip.config_from_fields(fields()))
    with torch.device("meta"):
        theirs = getattr(transformers, cls)(config)
    assert models.count(shapes) == sum(p.numel() for p in theirs.parameters())
    published = {vit_l: 123_060_480, vit_h: 340_387_840, big_g: 694_659_840}
    assert models.count(shapes) == published[fields]


def test_what_cannot_be_served_or_written_is_refused():
    with pytest.raises(UserError, match=r"eos_token_id=\[1, 2\] is not served"):
        clip.fields_from_config({"eos_token_id": [1, 2]})
    with pytest.raises(UserError, match="CLIPTextModel has no projection; CLIPTextModelWithProj"):
        clip.plain_config({"projection": 6})
