"""Retrieval: how often the right caption is among the first k, and what chance makes of it."""

import re
from collections.abc import Sequence
from math import comb

import numpy as np


def recall(scores: np.ndarray, right: np.ndarray, k: int = 1) -> float:
    """Share of the queries that have a right candidate among their k best ones.

    A query counts as found as soon as one of its right candidates is. Candidates of equal score
    stand in random order, and what counts is the probability: a scorer that says the same of all
    candidates is as good as chance, not better or worse by the order in which they are listed.

    Args:
      scores: `[queries, candidates]`, larger is better.
      right: bool, likewise; a query without a right candidate is never found.

    Raises:
      ValueError: other shapes, or k outside 1..candidates.
    """
    scores, right = np.asarray(scores), np.asarray(right, bool)
    if scores.shape != right.shape or scores.ndim != 2 or not len(scores):
        raise ValueError(f"scores {scores.shape} and right {right.shape}: [queries, candidates]")
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k={k} must lie in 1..{scores.shape[1]}, the number of candidates")
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    ahead = (scores > best).sum(axis=1)
    level = scores == best
    good, wrong = (level & right).sum(axis=1), (level & ~right).sum(axis=1)
    found = [_among(k - a, g, w) for a, g, w in zip(ahead, good, wrong)]
    return float(np.mean(found))


def chance(right: np.ndarray, k: int = 1) -> float:
    """`recall` of candidates in random order."""
    return recall(np.zeros(np.shape(right)), right, k)


def same(captions: Sequence[str], pattern: str | None = None) -> np.ndarray:
    """A number for each caption, int `[N]`, equal for equal captions.

    Args:
      pattern: a regular expression; what it matches in a caption is no difference, a drawing style
        or a tone of skin for example. None: every difference counts.

    Raises:
      re.error: a pattern that is none.
    """
    known: dict[str, int] = {}
    rule = re.compile(pattern) if pattern else None
    plain = [rule.sub("", text) if rule else text for text in captions]
    return np.asarray([known.setdefault(text, len(known)) for text in plain], np.int64)


def _among(places: int, good: int, wrong: int) -> float:
    """Probability that, of good + wrong things in random order, a good one is among the first."""
    if places <= 0 or good == 0:
        return 0.0
    if places > wrong:
        return 1.0
    return 1.0 - comb(int(wrong), int(places)) / comb(int(good + wrong), int(places))
