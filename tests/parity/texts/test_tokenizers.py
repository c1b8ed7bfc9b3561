"""Ids and masks are those of transformers, in the files that its versions 4 and 5 write."""

import json
import warnings

import made_tokenizers as made
import numpy as np
import pytest
from peers import peer

from jdiff import texts

transformers = peer("transformers")

TEXTS = [
    "a photo of a cat",
    "",
    "Two  DOGS!\n\tand a café ☕ 🤖 12 stars'll",
    "cat! dog<|endoftext|>x !!",
    "A cat, " * 40,
    "<|im_start|>user\nhi<|im_end|>\n",
    "日本語 ﬁne ½ naïve",
    "   ",
    "e\u0301 it's DON'T we'Re 1234",
    "</s> <extra_id_1>a <pad>",
]
FOLDERS = {
    "clip": (made.clip, {}, "CLIPTokenizer"),
    "clip padded with !": (made.clip, {"pad": "!"}, "CLIPTokenizer"),
    "qwen": (made.qwen, {}, "Qwen2Tokenizer"),
    "qwen padded left": (made.qwen, {"side": "left"}, "Qwen2Tokenizer"),
    "t5": (made.t5, {}, "T5Tokenizer"),
}


def same(folder, theirs, length=20):
    want = theirs(
        TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="np"
    )
    tokenizer = texts.tokenizer(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", texts.Truncated)
        ids, mask = tokenizer(TEXTS, length=length)
    np.testing.assert_array_equal(ids, want.input_ids)
    np.testing.assert_array_equal(mask, want.attention_mask.astype(bool))
    assert tokenizer.vocab == len(theirs) and tokenizer.side == theirs.padding_side
    return tokenizer


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_masks(name, tmp_path):
    make, options, cls = FOLDERS[name]
    old, new = make(tmp_path / "old", **options), tmp_path / "new"
    theirs = getattr(transformers, cls).from_pretrained(old)
    theirs.save_pretrained(new)
    assert (new / "tokenizer.json").is_file() and not (new / "vocab.json").exists()
    for folder in (old, new):
        same(folder, getattr(transformers, cls).from_pretrained(folder))


def test_a_tokenizer_json_is_taken_as_it_is(tmp_path):
    """Its own normalizer, truncation and padding, where no further file says otherwise."""
    made.t5(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    path = tmp_path / "tokenizer.json"
    whole = json.loads(path.read_text()) | {
        "normalizer": {"type": "NFKC"},
        "truncation": {
            "max_length": 20, "strategy": "LongestFirst", "stride": 0, "direction": "Left",
        },
        "padding": {
            "strategy": {"Fixed": 20}, "direction": "Left", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
        },
    }  # fmt: skip
    path.write_text(json.dumps(whole))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    for given in (tmp_path, path):
        tokenizer = same(given, theirs)
        assert (tokenizer.length, tokenizer.cut) == (20, "left")


def test_words_added_in_a_file_of_their_own(tmp_path):
    """Textual inversion's, in added_tokens.json, where tokenizer_config.json does not list them."""
    folder = made.clip(tmp_path)
    count = len(json.loads((folder / "vocab.json").read_text()))
    (folder / "added_tokens.json").write_text(json.dumps({"<gem>": count, "cat": count + 1}))
    tokenizer = same(folder, transformers.CLIPTokenizer.from_pretrained(folder))
    assert tokenizer(["a <gem>"]).ids[0, 2] == count
