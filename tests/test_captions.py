"""Prompts for a run on encoded texts: read as its captions were."""

import dataclasses
import types

import encoded_sets
import ml_collections
import numpy as np
import pytest

from jdiff import captions, encoding
from jdiff.commands import conditions
from jdiff.data.encoded import Encoded
from jdiff.data.sources import Field, Info
from jdiff.errors import UserError

LENGTH, WIDTH = encoded_sets.LENGTH, encoded_sets.WIDTH
FIELDS = (
    Field("text", (LENGTH, WIDTH), "float16"),
    Field("text_mask", (LENGTH,), "bool"),
    Field("pooled", (WIDTH,), "float16"),
)
ENCODED = Encoded("pics", (8, 8, 3), None, None, "bicubic", text="words", caption="caption")
INFO = Info("pics_words", "train", (8, 8, 3), 0, (), 9, FIELDS, encoded=ENCODED)
PROMPTS = ["a red fox", "a door"]


@pytest.fixture(autouse=True)
def words(monkeypatch):
    """Stands for the encoder that the set names."""
    asked = []
    open_reader = lambda name, tokenizer=None: asked.append(name) or encoded_sets.Reader()
    monkeypatch.setattr(encoding, "open_reader", open_reader)
    return asked


def run(names, info=INFO):
    config = ml_collections.ConfigDict({"data": {"conditions": names}})
    return types.SimpleNamespace(config=config, info=info)


def test_prompts_become_what_the_sets_captions_became(words):
    told = captions.conditions(INFO, ("text", "text_mask"), PROMPTS)
    kept = encoding.read(encoded_sets.Reader(), PROMPTS)  # float16, as in the set
    assert words == ["words"] and set(told) == {"text", "text_mask"}
    np.testing.assert_array_equal(told["text"], np.asarray(kept["text"], np.float32))
    np.testing.assert_array_equal(told["text_mask"].sum(axis=1), [3, 2])
    assert told["text"].dtype == np.float32 and told["text_mask"].dtype == bool


def test_image_i_gets_prompt_i_in_turn():
    names = ("text", "pooled")
    given = conditions.given(None, [run(names)], 5, PROMPTS)
    told = captions.conditions(INFO, names, PROMPTS)
    for name in names:
        np.testing.assert_array_equal(given[name], told[name][[0, 1, 0, 1, 0]])


def test_what_does_not_go_together_is_said(tmp_path):
    given = conditions.given
    with pytest.raises(UserError, match=r"--prompt='a red fox': the network is told nothing"):
        given(None, [run(())], 4, PROMPTS)
    with pytest.raises(UserError, match="--prompt and --cond both"):
        given(tmp_path / "a.npz", [run(("text",))], 4, PROMPTS)
    with pytest.raises(UserError, match=r"text \[N, 4, 5\]; give --prompt=TEXT, or such arrays"):
        given(None, [run(("text",))], 4)
    plain = dataclasses.replace(INFO, encoded=None)
    with pytest.raises(UserError, match="pics_words do not say what their texts were encoded by"):
        given(None, [run(("text",), plain)], 4, PROMPTS)
    with pytest.raises(UserError, match="give such arrays: --cond"):
        given(None, [run(("text",), plain)], 4)
    weight = dataclasses.replace(INFO, fields=(*FIELDS, Field("weight", (2,), "float32")))
    with pytest.raises(UserError, match="told weight too, which no prompt says"):
        given(None, [run(("text", "weight"), weight)], 4, PROMPTS)
