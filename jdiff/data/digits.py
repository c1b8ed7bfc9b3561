"""Scikit-learn's bundled digits: 1,797 scans of 8 x 8, with a fixed, stratified split."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from jdiff.errors import UserError, choose

TEST_PER_CLASS = 36


def load() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images uint8 [N, 8, 8, 1] and labels int32 [N] of `train` (1,437) and `test` (360).

    A pixel v in 0..16 becomes round(255 v / 16), where 127.5 becomes 128. In the order of the
    SHA-256 of the decimal row number, the first 36 rows of each class are `test`, the others
    `train`: balanced, mixed, and independent of any random generator.

    The data are the test part of "Optical Recognition of Handwritten Digits", Alpaydin and Kaynak,
    UCI Machine Learning Repository, 1998.
    """
    rows = _table()
    images = np.rint(rows[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = rows[:, -1].astype(np.int32)
    order = np.asarray(sorted(range(len(labels)), key=lambda i: hashlib.sha256(b"%d" % i).digest()))
    in_order = labels[order]
    rank = np.zeros(len(order), int)  # of a row among those of its class
    for c in range(10):
        rank[in_order == c] = np.arange(np.sum(in_order == c))
    rows = {"train": order[rank >= TEST_PER_CLASS], "test": order[rank < TEST_PER_CLASS]}
    return {split: (images[i], labels[i]) for split, i in rows.items()}


def _table() -> np.ndarray:
    """64 pixels and the label of each scan, [1797, 65]: what sklearn.datasets.load_digits reads.

    Read from the package's file, as importing scikit-learn takes longer than all else at a start.
    """
    package = importlib.util.find_spec("sklearn")
    if package is not None:
        file = pathlib.Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if file.exists():
            with gzip.open(file, "rt") as text:
                return np.loadtxt(text, delimiter=",")
    from sklearn.datasets import load_digits  # a version that keeps it elsewhere

    pixels, labels = load_digits(return_X_y=True)
    return np.column_stack([pixels, labels])


def positions(name: str, split: str, sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    """(split, position) of each example that a TFDS split string means.

    `name` is only for messages; `sizes` maps each split to its number of examples. Understood are
    names, `all`, sums, and slices by position or percent, which round as in TFDS.

    Raises:
      UserError: the string is malformed, or names a split that does not exist.
    """
    chosen = []
    for part in split.split("+"):
        match = re.fullmatch(r"\s*(\w+)\s*(?:\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\])?\s*", part)
        if match is None:
            raise UserError(f"split {split!r} is not like train, test[:10%] or train[100:200]")
        base, low, high = match.groups()
        for s in sizes if base == "all" else [choose(f"split of {name}", base, sizes)]:
            rows = range(sizes[s])[_bound(low, sizes[s]) : _bound(high, sizes[s])]
            chosen += [(s, i) for i in rows]
    return chosen


def _bound(text: str | None, size: int) -> int | None:
    if text is None:
        return None
    return round(int(text[:-1]) * size / 100) if text.endswith("%") else int(text)
