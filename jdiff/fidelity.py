"""How much of the truth a super-resolution stage keeps, over the held-out images."""

from typing import Any

import numpy as np

from jdiff.evaluation import pairs
from jdiff.experiment import to_float
from jdiff.generate import Enlarged
from jdiff.yardstick import finite

#: For each figure its name, which way is better, and what it is.
FIGURES = {
    "psnr": ("PSNR", "higher", "decibels, of the sample against the truth"),
    "ssim": ("SSIM", "higher", "structural similarity of the sample to the truth"),
    "consistency": ("Input kept", "higher", "PSNR of the sample, made smaller, against its input"),
}


class Fidelity:
    """Collects the figures of pairs, of the samples and of the enlarged inputs beside them."""

    def __init__(self, low_res: Any):
        self._low_res = low_res
        self._sample: dict[str, list[np.ndarray]] = {name: [] for name in FIGURES}
        self._large: dict[str, list[np.ndarray]] = {name: [] for name in FIGURES}
        self._shape = None

    def add(self, some: Enlarged) -> None:
        """Takes a batch in."""
        self._shape = some.truth.shape[1:]
        for images, found in ((some.sample, self._sample), (some.large, self._large)):
            found["psnr"].append(np.asarray(pairs.psnr(images, some.truth)))
            found["ssim"].append(np.asarray(pairs.ssim(images, some.truth)))
            small = self._low_res.shrink(to_float(images))
            found["consistency"].append(
                np.asarray(pairs.psnr(small, to_float(some.small), data_range=2.0))
            )

    def result(self) -> dict[str, Any]:
        """{"num", "window", "rows": [{"key", "name", "better", "about", "value", "enlarged"}]}.

        A value is the mean over images; "enlarged" that of the enlarged input itself. `window` is
        the side of that of SSIM.
        """
        mean = lambda parts: finite(np.concatenate(parts).astype(np.float64).mean())
        rows = [
            {"key": key, "name": name, "better": better, "about": about,
             "value": mean(self._sample[key]), "enlarged": mean(self._large[key])}
            for key, (name, better, about) in FIGURES.items()
        ]  # fmt: skip
        num = sum(map(len, self._sample["psnr"]))
        return {"num": num, "window": pairs.window_of(self._shape), "rows": rows}
