"""What is known of a figure from several seeds: mean, deviation, and Student's interval."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """A figure over n seeds.

    Attributes:
      n: values.
      mean: of them.
      deviation: their sample standard deviation (n - 1); None for one value.
      low, high: the interval that holds the true mean with the given confidence if the values are
        normal: mean -+ t_{n-1} deviation / sqrt(n); None for one value.
    """

    n: int
    mean: float
    deviation: float | None
    low: float | None
    high: float | None

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.high is None else self.high - self.mean


def spread(values: Sequence[float], confidence: float = 0.95) -> Spread | None:
    """The spread of independent values; None for none.

    >>> spread([1.0, 2.0, 3.0])    # 2 -+ 4.303 / sqrt(3)
    Spread(n=3, mean=2.0, deviation=1.0, low=-0.484..., high=4.484...)
    """
    n = len(values)
    if not n:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Spread(1, mean, None, None, None)
    from scipy import stats

    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * deviation / math.sqrt(n)
    return Spread(n, mean, deviation, mean - half, mean + half)
