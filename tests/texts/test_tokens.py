"""Tokenizers: what they cut they say, what a folder lacks is one line."""

import json
import warnings

import made_tokenizers as made
import numpy as np
import pytest

from jdiff import UserError, texts


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return texts.tokenizer(made.clip(tmp_path_factory.mktemp("clip")))


def test_a_text_is_begun_ended_and_filled(clip):
    (begin,), (end,) = clip.ends
    ids, mask = clip(["a cat", ""], length=6)
    assert ids.dtype == np.int32 and mask.dtype == bool
    assert ids[1].tolist() == [begin, end, end, end, end, end]  # padded with its end
    assert mask.tolist() == [[True] * 4 + [False] * 2, [True] * 2 + [False] * 4]
    assert clip(["a cat"]).ids.shape == (1, 77)
    np.testing.assert_array_equal(clip(["a cat"], length=6, side="left").mask[0, :2], False)


def test_what_was_cut_is_quoted_as_it_was_written(clip):
    long = "a photo of a Cat, THE sea"
    whole = clip.pieces([long])[0]
    for room in (1, 3, 5):
        with pytest.warns(texts.Truncated) as caught:
            ids, mask = clip([long, "a cat"], length=room + 2)
        message = str(caught[0].message)
        rest = long[whole.spans[room][0] :]
        assert len(caught) == 1 and f"cut: {rest!r}" in message and str(len(whole.ids)) in message
        assert ids[0, 1:-1].tolist() == whole.ids[:room] and mask[0].all()
    with pytest.warns(texts.Truncated, match="; and 4 more texts"):
        clip([f"{i} {long}" for i in range(7)], length=5)


def test_a_text_that_just_fits_is_not_cut(clip):
    count = len(clip.pieces(["a photo of a cat"])[0].ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clip(["a photo of a cat"], length=count + 2).mask.all()


def test_many_texts_are_cut_as_a_few(clip):
    many = [f"a cat and {i} dogs" for i in range(700)]
    ids, _ = clip(many, length=20)
    np.testing.assert_array_equal(ids[::100], clip(many[::100], length=20).ids)


@pytest.mark.parametrize(
    "given, told",
    [
        ("a cat", "one text given"),
        (b"a cat", "bytes given"),
        ([], "empty list"),
        ([b"a cat"], r"texts\[0\] is bytes"),
        (["a", None], r"texts\[1\] is of type NoneType"),
        (3, "int given"),
        (["a\ud800"], "surrogate"),
    ],
)
def test_what_is_no_list_of_texts(clip, given, told):
    with pytest.raises(UserError, match=told):
        clip(given)


def test_arrays_of_texts_are_texts(clip):
    np.testing.assert_array_equal(clip(np.array(["a", "cat"])).ids, clip(["a", "cat"]).ids)


def test_folders_that_hold_no_tokenizer(tmp_path, clip):
    with pytest.raises(UserError, match="neither tokenizer.json, nor vocab.json"):
        texts.tokenizer(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        texts.tokenizer(tmp_path / "none")
    (tmp_path / "spiece.model").write_bytes(b"\n\x0e")
    with pytest.raises(UserError, match="spiece.model and no tokenizer.json.*save_pretrained"):
        texts.tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        texts.tokenizer(tmp_path)
    with pytest.raises(UserError, match="takes 2 tokens a text: give 3 or more"):
        clip(["a"], length=2)


def test_files_that_do_not_fit_together(tmp_path):
    folder = made.clip(tmp_path / "clip")
    (folder / "merges.txt").write_text("#version: 0.2\nno where\n")
    with pytest.raises(UserError, match="do not fit together"):
        texts.tokenizer(folder)
    made.qwen(tmp_path / "qwen")
    path = tmp_path / "qwen" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    with pytest.raises(UserError, match="CLIPTokenizer and Qwen2Tokenizer"):
        texts.tokenizer(tmp_path / "qwen")
    first, *_ = config["added_tokens_decoder"]
    config["added_tokens_decoder"] = {"7000": config["added_tokens_decoder"][first]}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="should be 7000.*mixed"):
        texts.tokenizer(tmp_path / "qwen")


def test_without_a_length_or_a_padding_token(tmp_path):
    folder = made.t5(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    tokenizer = texts.tokenizer(folder)
    with pytest.raises(UserError, match="give length="):
        tokenizer(["a cat"])
    with pytest.raises(UserError, match="no pad_token"):
        tokenizer(["a cat"], length=60)
