"""Prompt weights: the syntax as it is documented, and the two ways to act on states."""

import jax.numpy as jnp
import made_tokenizers as made
import numpy as np
import pytest

from jdiff import texts
from jdiff.texts import weights

#: The first eight are the examples of the web interface's own documentation.
PROMPTS = {
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", 1.1), (" word", 1)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1), ("house", 1.3 * 1.1**2), (" ", 1.1), ("on", 1), (" a ", 1.1),
        ("hill", 0.5 * 1.1), (", sun, ", 1.1), ("sky", 1.1**4), (".", 1.1),
    ],
    "a [quiet] sea": [("a ", 1), ("quiet", 1 / 1.1), (" sea", 1)],
    "": [],
    "((a:.5)b: +2)": [("a", 1), ("b", 2)],
    "x: 1.3) y]": [("x: 1.3) y]", 1)],
    r"\\(a)": [("\\", 1), ("a", 1.1)],
    "a: b, 1:2 (c:d)": [("a: b, 1:2 ", 1), ("c:d", 1.1)],
    "café (☕:1.5)🤖": [("café ", 1), ("☕", 1.5), ("🤖", 1)],
}  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_syntax(prompt):
    read = weights.parse(prompt)
    assert read.text == "".join(text for text, _ in PROMPTS[prompt])
    want = [weight for text, weight in PROMPTS[prompt] for _ in text]
    np.testing.assert_allclose(read.weights, want, rtol=1e-12)


def test_breaks_part_words():
    read = weights.parse("a cat BREAK dog (BREAK sea:1.2) BREAKFAST")
    assert read.text == "a cat dog  sea BREAKFAST"
    assert [read.text[at:].split()[0] for at in read.breaks] == ["dog", "sea"]


def test_only_written_weights_are_explicit():
    assert weights.explicit("a (red:1.3) hat") == "(red:1.3)"
    for prompt in ("a (red) hat", "at 12:30 (noon)", r"\(red:1.3\)", "[red:1.3]"):
        assert weights.explicit(prompt) is None


@pytest.mark.parametrize("make", [made.clip, made.qwen, made.t5])
def test_weights_do_not_change_the_tokens(make, tmp_path):
    """Each token has the weight of its word, and there are as many as without weights."""
    tokenizer = texts.tokenizer(make(tmp_path))
    read = weights.parse("a photo of (two dogs:1.5), and [the] (sea:0.5)!")
    plain, found = tokenizer.pieces(["a photo of two dogs, and the sea!", read.text])
    assert plain.ids == found.ids
    own = weights.of_tokens(read, found.spans)
    wanted = {"two": 1.5, "dogs": 1.5, "the": 1 / 1.1, "sea": 0.5, "photo": 1, "and": 1}
    for word, weight in wanted.items():
        at = read.text.index(f" {word}") + 1
        inside = [w for w, (i, j) in zip(own, found.spans) if at < j <= at + len(word)]
        assert inside and set(inside) == {weight}, word


STATES = np.random.default_rng(0).normal(0.3, 1.0, (2, 4, 3)).astype(np.float32)
EMPTY = np.random.default_rng(1).normal(0.0, 1.0, (4, 3)).astype(np.float32)
FACTORS = np.array([[1, 1.5, 0, 1], [1, 1, 1, 1]], np.float32)


def test_interpolation_goes_from_the_empty_prompt():
    out = np.asarray(weights.interpolate(jnp.asarray(STATES), FACTORS, EMPTY))
    np.testing.assert_allclose(out[0, 1], 1.5 * STATES[0, 1] - 0.5 * EMPTY[1], rtol=1e-5)
    np.testing.assert_allclose(out[0, 2], EMPTY[2], rtol=1e-6)
    np.testing.assert_array_equal(out[0, [0, 3]], STATES[0, [0, 3]])
    np.testing.assert_array_equal(out[1], STATES[1])


def test_scaling_keeps_the_mean_of_a_text():
    out = np.asarray(weights.scale(jnp.asarray(STATES), FACTORS))
    np.testing.assert_allclose(out.mean((1, 2)), STATES.mean((1, 2)), rtol=1e-5)
    ratio = out[0] / STATES[0]  # of one token to another as their weights
    np.testing.assert_allclose(ratio / ratio[0, 0], FACTORS[0][:, None] * np.ones(3), rtol=1e-5)
    np.testing.assert_array_equal(out[1], STATES[1])
    assert np.isfinite(weights.scale(jnp.zeros((1, 2, 3)), FACTORS[:1, :2])).all()
