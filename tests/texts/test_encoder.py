"""Texts to states, on a network whose states are known: what is read, cut, weighted and joined."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import made_tokenizers as made
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdiff import UserError, models, texts
from jdiff.texts import encoder as encoder_module
from jdiff.texts.base import Read, TextNetwork

LENGTH, WIDTH = 12, 4


class Table(TextNetwork):
    """Each token's row, and its place, and the mean of the rows that are seen; two layers of it."""

    def __init__(self, vocab, rngs, length=None):
        self.vocab, self.length, self.width, self.depth = vocab, length, WIDTH, 2
        self.rows = nnx.Param(jax.random.normal(rngs.params(), (vocab, WIDTH)))

    def read(self, ids, mask=None, *, layers=()):
        own = self.rows[...][ids]
        seen = jnp.ones(ids.shape) if mask is None else mask.astype(float)
        mean = jnp.einsum("bsd,bs->bd", own, seen) / seen.sum(1, keepdims=True)
        h = [own + 0.1 * jnp.arange(ids.shape[1])[:, None] + mean[:, None] * n for n in range(3)]
        return Read(self.finish(h[2]), own[:, 0] + mean, tuple(h[n] for n in layers))

    def finish(self, hidden):
        return jnp.tanh(hidden)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return texts.tokenizer(made.clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def encoder(tokenizer):
    apply, params = models.init(lambda rngs: Table(tokenizer.vocab, rngs), jax.random.key(0))
    return texts.TextEncoder(tokenizer, apply, params, LENGTH, layer=1, weights="interpolate")


def states(encoder, words, layer=1, length=LENGTH, masked=True):
    """The same network once more, in numpy: (states [B, S, D], mask, pooled)."""
    ids, mask = encoder.tokenizer(words, length=length)
    own = np.asarray(encoder.params["rows"])[ids]
    seen = mask if masked else np.ones_like(mask)
    mean = np.stack([rows[these].mean(0) for rows, these in zip(own, seen)])
    places = 0.1 * np.arange(length)[:, None]
    return own + places + mean[:, None] * layer, mask, own[:, 0] + mean


def test_any_number_of_texts_is_one_program(encoder):
    words = ["a cat", "", "two dogs", "a hat", "the sea", "a bird", "night"]
    first = encoder.encode(words[:1])
    before = encoder_module._read._cache_size()
    told = encoder.encode(words)
    encoder.encode(["a (red:1.3) sofa"])
    assert encoder_module._read._cache_size() == before
    want, mask, pooled = states(encoder, words)
    assert told["text"].dtype == jnp.float32 and told["mask"].dtype == bool
    np.testing.assert_allclose(told["text"], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(told["mask"], mask)
    np.testing.assert_allclose(told["pooled"], pooled, rtol=1e-5, atol=1e-6)
    for name in told:
        np.testing.assert_array_equal(first[name][0], told[name][0])


def test_over_devices(encoder):
    sharding = NamedSharding(Mesh(jax.devices(), "d"), PartitionSpec("d"))
    words = ["a cat", "two dogs", "the sea", "a hat", "night"]
    here, there = encoder.encode(words), encoder.encode(words, sharding=sharding)
    for name in here:
        np.testing.assert_allclose(here[name], there[name], rtol=1e-6)


def test_which_states(encoder):
    words = ["a photo of a cat"]
    for layer in (0, 2):
        told = encoder.replace(layer=layer, weights=None).encode(words)["text"]
        np.testing.assert_allclose(told, states(encoder, words, layer)[0], rtol=1e-5, atol=1e-6)
    last = encoder.replace(layer="last", weights=None, pool="none").encode(words)
    np.testing.assert_allclose(last["text"], np.tanh(told), rtol=1e-5)
    assert set(last) == {"text", "mask"}
    normed = encoder.replace(layer=2, norm=True, weights=None, pool="mean").encode(words)
    np.testing.assert_allclose(normed["text"], last["text"], rtol=1e-6)
    mean = np.asarray(last["text"])[0][np.asarray(last["mask"])[0]].mean(0)
    np.testing.assert_allclose(normed["pooled"][0], mean / np.linalg.norm(mean), rtol=1e-5)


def test_padding_is_seen_or_not(encoder):
    """Where it is not, more of it changes nothing; where it is, it does."""
    told = encoder.encode(["a cat"])["text"][0, :4]
    longer = states(encoder, ["a cat"], length=20)[0][0, :4]
    np.testing.assert_allclose(told, longer, rtol=1e-5, atol=1e-6)
    seen = encoder.replace(masked=False).encode(["a cat"])
    np.testing.assert_allclose(
        seen["text"], states(encoder, ["a cat"], masked=False)[0], rtol=1e-5, atol=1e-6
    )
    assert np.abs(np.asarray(seen["text"])[0, :4] - longer).max() > 0.1
    assert not seen["mask"][0, 4:].any()


def test_weights_act_on_their_tokens_alone(encoder):
    prompt, plain = "a (cat:1.5), (sea:0)", "a cat, sea"
    told = np.asarray(encoder.encode([prompt, plain])["text"])
    want, empty = states(encoder, [plain])[0][0], states(encoder, [""])[0][0]
    spans = encoder.tokenizer.pieces([plain])[0].spans
    at = {word: [1 + n for n, (i, _) in enumerate(spans) if plain[i:].startswith(word)][0]
          for word in ("cat", "sea")}  # fmt: skip
    own = set(range(LENGTH))
    for n, (i, _) in enumerate(spans, 1):
        weight = 1.5 if 2 <= i < 5 else 0.0 if i >= 7 else 1.0
        np.testing.assert_allclose(
            told[0, n], empty[n] + weight * (want[n] - empty[n]), rtol=1e-4, atol=1e-5
        )
        own -= {n} if weight != 1 else set()
    assert len(own) < LENGTH and at["cat"] != at["sea"]
    np.testing.assert_array_equal(told[0, sorted(own)], told[1, sorted(own)])
    np.testing.assert_allclose(told[1], want, rtol=1e-5, atol=1e-6)
    scaled = np.asarray(encoder.replace(weights="scale").encode([prompt])["text"])[0]
    np.testing.assert_allclose(scaled.mean(), want.mean(), rtol=1e-4)
    cat, sea = at["cat"], at["sea"]
    np.testing.assert_allclose(scaled[cat] / want[cat], 1.5 * scaled[0] / want[0], rtol=1e-4)
    np.testing.assert_array_equal(scaled[sea], 0)


def test_without_weights_brackets_are_text(encoder):
    plain = encoder.replace(weights=None)
    prompt = "a (red) [hat]"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = plain.encode([prompt])["text"]
    np.testing.assert_allclose(told, states(encoder, [prompt])[0], rtol=1e-5, atol=1e-6)
    with pytest.warns(texts.Unweighted, match=r"'\(red:1.3\)'.*weights='interpolate'"):
        plain.encode(["a (red:1.3) hat"])


LONG = "a cat, a dog, the sea at night, the sun at day, two dogs and a bird"


def test_a_long_text_in_chunks(encoder):
    """Each is what the network makes of its words alone, between a begin and an end of its own."""
    room = LENGTH - 2
    ids, spans = encoder.tokenizer.pieces([LONG])[0]
    parts = [LONG[spans[i][0] : spans[min(i + room, len(ids)) - 1][1]]
             for i in range(0, len(ids), room)]  # fmt: skip
    assert len(parts) == 3
    own = encoder.replace(chunks=4)
    told = own.encode([LONG, "a cat"])
    want, mask, pooled = states(encoder, parts)
    assert told["text"].shape == (2, 3 * LENGTH, WIDTH)
    np.testing.assert_allclose(told["text"][0], np.concatenate(want), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(told["mask"][0], np.concatenate(mask))
    np.testing.assert_allclose(told["pooled"][0], pooled[0], rtol=1e-5, atol=1e-6)
    short = np.concatenate(states(encoder, ["a cat", "", ""])[0])
    np.testing.assert_allclose(told["text"][1], short, rtol=1e-5, atol=1e-6)
    assert own.encode(["a cat"])["text"].shape == (1, LENGTH, WIDTH)


def test_a_break_begins_a_chunk(encoder):
    told = encoder.replace(chunks=3).encode(["BREAK a cat BREAK (two:2) dogs BREAK BREAK"])["text"]
    first, second = states(encoder, ["a cat", "two dogs"])[0]
    np.testing.assert_allclose(told[0, :LENGTH], first, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(told[0, LENGTH + 5 :], second[5:], rtol=1e-5, atol=1e-6)
    assert told.shape[1] == 2 * LENGTH and np.abs(told[0, LENGTH + 1] - second[1]).max() > 0.1


def test_what_does_not_fit_is_told(encoder):
    spans = encoder.tokenizer.pieces([LONG])[0].spans
    for chunks, kept in ((1, LENGTH - 2), (2, 2 * LENGTH - 4)):
        with pytest.warns(texts.Truncated) as caught:
            told = encoder.replace(chunks=chunks).encode([LONG, "a cat"])
        assert told["text"].shape[1] == chunks * LENGTH
        message = str(caught[0].message)
        assert repr(LONG[spans[kept][0] :]) in message and "chunks= reads more" in message


def test_a_tokenizer_that_cuts_on_the_left(encoder):
    cutting = dataclasses.replace(encoder.tokenizer, cut="left")
    spans = cutting.pieces([LONG])[0].spans
    with pytest.warns(texts.Truncated, match=f"cut: '{LONG[: spans[-LENGTH + 1][1]]}'"):
        told = encoder.replace(tokenizer=cutting).encode([LONG])["text"]
    want = states(encoder, [LONG[spans[-LENGTH + 2][0] :]])[0]
    np.testing.assert_allclose(told, want, rtol=1e-5, atol=1e-6)


def test_a_template_is_read_and_dropped(encoder):
    before, after = "an old man", ", painting"
    drop = 1 + len(encoder.tokenizer.pieces([before])[0].ids)
    own = encoder.replace(template=before + " {}" + after, drop=drop, length=LENGTH)
    told = own.encode(["a cat", "a (cat:1.5)"])
    want, mask, _ = states(encoder, [f"{before} a cat{after}"], length=LENGTH + drop)
    assert told["text"].shape == (2, LENGTH, WIDTH)
    np.testing.assert_allclose(told["text"][0], want[0, drop:], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(told["mask"][0], mask[0, drop:])
    changed = np.abs(np.asarray(told["text"][0] - told["text"][1])).max(1) > 1e-3
    assert changed.tolist() == [False, True] + [False] * (LENGTH - 2)  # " cat" alone


def test_a_network_that_the_tokenizer_does_not_fit(encoder, tokenizer, tmp_path):
    make = lambda vocab, length=None: models.init(
        lambda rngs: Table(vocab, rngs, length), jax.random.key(0)
    )
    with pytest.raises(UserError, match=rf"ids go up to {tokenizer.vocab - 1}, and Table knows 9"):
        texts.TextEncoder(tokenizer, *make(9), LENGTH)
    with pytest.raises(UserError, match="positions for 10 tokens"):
        texts.TextEncoder(tokenizer, *make(tokenizer.vocab, 10), LENGTH)


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"weights": "interpolated"}, "Did you mean 'interpolate'"),
        ({"pool": "max"}, "Allowed: mean, network, none"),
        ({"layer": "lats"}, "Did you mean 'last'"),
        ({"template": "a cat"}, "must hold {} once"),
        ({"template": "a {}", "chunks": 2}, "not cut into chunks"),
        ({"length": 2}, "give 3 or more"),
        ({"batch": 0}, "must be positive"),
        ({"lenght": 12}, "Did you mean 'length'"),
    ],
)
def test_fields_that_cannot_be(encoder, fields, told):
    with pytest.raises(UserError, match=told):
        encoder.replace(**fields)


@pytest.mark.parametrize("given", ["a cat", b"a cat", [], [b"a"], [1]])
def test_what_is_no_list_of_texts(encoder, given):
    with pytest.raises(UserError, match="^encode: "):
        encoder.encode(given)


def told(texts_, tokens, width, pooled=None, fill=1.0):
    text = fill + np.arange(texts_ * tokens * width, dtype=np.float32)
    given = {
        "text": text.reshape(texts_, tokens, width), "mask": np.ones((texts_, tokens), bool)
    }  # fmt: skip
    return given if pooled is None else given | {"pooled": np.full((texts_, pooled), fill)}


def test_two_encoders_as_sdxl():
    first, second = told(2, 5, 3, pooled=3), told(2, 5, 4, pooled=6, fill=9.0)
    out = texts.sdxl(first, second)
    np.testing.assert_array_equal(out["text"][..., :3], first["text"])
    np.testing.assert_array_equal(out["text"][..., 3:], second["text"])
    np.testing.assert_array_equal(out["pooled"], second["pooled"])


def test_three_encoders_as_sd3():
    first, second = told(2, 5, 3, pooled=3), told(2, 5, 4, pooled=6, fill=9.0)
    third = told(2, 8, 10, fill=50.0)
    out = texts.sd3(first, second, third)
    assert out["text"].shape == (2, 13, 10) and out["mask"].shape == (2, 13)
    np.testing.assert_array_equal(out["text"][:, :5, :3], first["text"])
    np.testing.assert_array_equal(out["text"][:, :5, 3:7], second["text"])
    np.testing.assert_array_equal(out["text"][:, :5, 7:], 0)
    np.testing.assert_array_equal(out["text"][:, 5:], third["text"])
    np.testing.assert_array_equal(out["pooled"], np.r_["1", first["pooled"], second["pooled"]])
    without = texts.sd3(first, second, width=10, tokens=8)
    np.testing.assert_array_equal(without["text"][:, :5], out["text"][:, :5])
    np.testing.assert_array_equal(without["text"][:, 5:], np.zeros((2, 8, 10)))


def test_what_does_not_join():
    first = told(2, 5, 3, pooled=3)
    with pytest.raises(UserError, match="as many texts and tokens"):
        texts.sdxl(first, told(2, 6, 4, pooled=6))
    with pytest.raises(UserError, match="the second encoder gives no pooled"):
        texts.sdxl(first, told(2, 5, 4))
    with pytest.raises(UserError, match="no narrower"):
        texts.sd3(first, first, told(2, 8, 5))


def test_several_behind_one_call(encoder):
    both = texts.Combined((encoder, encoder.replace(layer=2)), texts.sdxl)
    words, others = ["a cat", "night"], ["the sea", "a hat"]
    out = both.encode(words, others)
    np.testing.assert_allclose(
        out["text"],
        np.r_["2", states(encoder, words)[0], states(encoder, others, 2)[0]],
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    np.testing.assert_array_equal(both.encode(words)["text"], both.encode(words, None)["text"])
    with pytest.raises(UserError, match="2, 1 texts given"):
        both.encode(words, ["a cat"])
    with pytest.raises(UserError, match="there are 2"):
        both.encode(words, words, words)
