"""Retrieval: counted by hand, ties by probability, and what chance is."""

import itertools

import numpy as np
import pytest

from jdiff.contrastive.retrieval import chance, recall, same

EMOJI = r"^.*? emoji of an? |, (medium )?(light |dark |medium )?skin tone"


def test_recall_counted_by_hand():
    scores = np.array([[3, 2, 1, 0], [3, 2, 1, 0], [3, 2, 1, 0], [0, 1, 2, 3]])
    right = np.eye(4, dtype=bool)  # the ranks of the right ones are 1, 2, 3 and 1
    assert [recall(scores, right, k) for k in (1, 2, 3, 4)] == [0.5, 0.75, 1.0, 1.0]


def test_any_right_candidate_is_enough():
    right = np.array([[True, False, True, False]])
    assert recall([[1.0, 3.0, 2.0, 0.0]], right, 1) == 0.0
    assert recall([[1.0, 3.0, 2.0, 0.0]], right, 2) == 1.0
    assert recall([[1.0, 3.0, 2.0, 0.0]], np.zeros((1, 4)), 4) == 0.0


@pytest.mark.parametrize("scores", [[5, 5, 5, 5, 1], [7, 5, 5, 5, 1], [0, 0, 0, 0, 0]])
@pytest.mark.parametrize("right", [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_ties_count_as_the_mean_over_all_orders(scores, right, k):
    found = []
    for order in itertools.permutations(range(5)):
        ranked = sorted(order, key=lambda i: -scores[i])  # stable: ties in the order of `order`
        found.append(any(right[i] for i in ranked[:k]))
    assert recall([scores], [right], k) == pytest.approx(np.mean(found), abs=1e-12)


def test_chance():
    assert chance(np.eye(20), 1) == pytest.approx(1 / 20)
    assert chance(np.eye(20), 5) == pytest.approx(5 / 20)
    two = np.kron(np.eye(3), np.ones((2, 2)))  # two right ones of six: 1 - C(4, 2) / C(6, 2)
    assert chance(two, 2) == pytest.approx(1 - 6 / 15)


def test_what_is_no_difference_between_captions():
    texts = [
        "noto emoji of a man biking, dark skin tone", "fluent 3d emoji of a man biking",
        "twemoji emoji of an apple", "twemoji emoji of a man biking, medium light skin tone",
        "noto emoji of a man biking, dark skin tone",
    ]  # fmt: skip
    assert same(texts).tolist() == [0, 1, 2, 3, 0]
    assert same(texts, EMOJI).tolist() == [0, 0, 1, 0, 0]


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="k=3 must lie in 1..2"):
        recall([[0.0, 1.0]], [[True, False]], 3)
    with pytest.raises(ValueError, match="queries"):
        recall(np.zeros((2, 3)), np.zeros((3, 2)))
