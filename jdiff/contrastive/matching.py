"""How well a model's pictures match the captions that they were drawn for, by a scorer.

Each figure stands between that of the real pictures of these captions (what the scorer finds where
all is right) and that of shuffled captions (what it finds by chance).
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from jdiff.contrastive.retrieval import recall, same
from jdiff.contrastive.scorer import WEIGHT, Scorer
from jdiff.errors import UserError

# Shuffles of which the mean is taken.
_SHUFFLES = 10


class Matching:
    """Takes pictures in a batch at a time, in the order of their captions."""

    def __init__(
        self, scorer: Scorer, captions: Sequence[str], *, pattern: str | None = None,
        top: Sequence[int] = (1,),
    ):  # fmt: skip
        """Reads the captions.

        Args:
          scorer: from `scorer.load`.
          captions: one for each picture that will come, of samples as of real ones.
          pattern: what is no difference between captions, see `retrieval.same`.
          top: recall at these.
        """
        self._scorer, self._pattern, self._top = scorer, pattern, tuple(top)
        self._captions = list(captions)
        distinct, self._own = np.unique(self._captions, return_inverse=True)
        self._texts = scorer.texts(list(distinct))
        self._thing = same(list(distinct), pattern)
        self._samples: list[np.ndarray] = []
        self._real: list[np.ndarray] = []

    def anew(self) -> "Matching":
        """The same captions and real pictures, for other samples."""
        other = copy.copy(self)
        other._samples = []
        return other

    def add(self, images: np.ndarray) -> None:
        """Takes uint8 samples `[B, H, W, C]` in."""
        self._samples.append(self._scorer.images(images))

    def add_real(self, images: np.ndarray) -> None:
        """Takes the real pictures of the captions in."""
        self._real.append(self._scorer.images(images))

    def rows(self, seed: int = 0) -> list[dict[str, Any]]:
        """Rows as evaluation.json has them: of the score, and of recall among the captions.

        "value" is that of the samples, "floor" of the real pictures, "ceiling" of the samples with
        shuffled captions, each picture scored with another one's: the mean of ten shuffles.

        Raises:
          UserError: as many samples as captions have not come.
        """
        samples = np.concatenate(self._samples) if self._samples else np.zeros((0, 1))
        if len(samples) != len(self._captions):
            raise UserError(f"{len(samples)} samples for {len(self._captions)} captions.")
        real = np.concatenate(self._real) if self._real else None
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(len(samples)) for _ in range(_SHUFFLES)]
        value = self._figures(samples, self._own)
        shuffled = [self._figures(samples, self._own[order]) for order in orders]
        floor = {} if real is None else self._figures(real, self._own[: len(real)])
        return [
            {"key": key, "name": name, "better": "higher", "about": about, "value": value[key],
             "floor": floor.get(key), "ceiling": float(np.mean([s[key] for s in shuffled]))}
            for key, (name, about) in self._named().items()
        ]  # fmt: skip

    def _figures(self, images: np.ndarray, own: np.ndarray) -> dict[str, float]:
        """Of pictures whose captions are the `own`-th of the distinct ones."""
        cosines = images @ self._texts.T
        mine = cosines[np.arange(len(own)), own]
        found = {"clip_score": WEIGHT * float(np.maximum(mine, 0.0).mean())}
        exact = own[:, None] == np.arange(len(self._texts))
        for k in self._top:
            found[f"caption_recall_{k}"] = recall(cosines, exact, min(k, cosines.shape[1]))
            if self._pattern:
                right = self._thing[own][:, None] == self._thing
                found[f"caption_recall_{k}_same"] = recall(cosines, right, min(k, right.shape[1]))
        return found

    def _named(self) -> dict[str, tuple[str, str]]:
        """Name and meaning of each figure by its key."""
        by = f"by {self._scorer.name}; between shuffled captions and real pictures"
        found = {"clip_score": ("CLIP score", f"100 max(cos, 0) of picture and caption, {by}")}
        for k in self._top:
            name = "Caption found" + (f", first {k}" if k > 1 else "")
            about = f"share of pictures whose caption is among the first {k}"
            found[f"caption_recall_{k}"] = (name, f"{about} of {len(self._texts)}, {by}")
            if self._pattern:
                also = "but for what config.evaluation.same says is no difference"
                found[f"caption_recall_{k}_same"] = (f"{name}: the same thing", f"{about}, {also}")
        return found
