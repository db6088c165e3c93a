"""Numbers with their uncertainty: paired bootstrap intervals and derangements for the wrong-image control.

Shape suffixes: B sample (the unit that is resampled), K masked word, R resample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eve.errors import UserError


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % percentile interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """A number of several seeds. `compared`: of paired differences, seed by seed."""

    by_seed: Mapping[int, float]
    compared: bool = False

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.by_seed.values())))

    @property
    def deviation(self) -> float | None:
        """Standard deviation with n - 1; None of one seed."""
        return float(np.std(list(self.by_seed.values()), ddof=1)) if len(self.by_seed) > 1 else None

    @property
    def agrees(self) -> bool:
        """All seeds, two at least, have one sign."""
        values = self.by_seed.values()
        return len(values) > 1 and (min(values) > 0 or max(values) < 0)


def bootstrap_ratio(
    numerator_B: np.ndarray, denominator_B: np.ndarray, *, seed: int, resamples: int = 2000
) -> Interval:
    """sum(numerator) / sum(denominator) with its percentile bootstrap interval over the samples.

    With numerator = hits with the right image minus hits with a wrong one, and denominator = masked
    words, this is a gain per word, resampled by whole samples: the words of one caption are not
    independent, and both predictions of a word stay together (paired).

    A resample is drawn as multinomial counts of the samples, so that all of them are two matrix
    products (R, B) @ (B,), in slices of bounded memory. A resample without any word is left out.
    """
    size = len(numerator_B)
    random = np.random.default_rng(seed)
    ratios: list[np.ndarray] = []
    for start in range(0, resamples, 200):
        rows = min(200, resamples - start)
        counts_RB = random.multinomial(size, np.full(size, 1.0 / size), size=rows).astype(np.float64)
        total_R = counts_RB @ denominator_B
        ratios.append((counts_RB @ numerator_B)[total_R > 0] / total_R[total_R > 0])
    low, high = np.quantile(np.concatenate(ratios), (0.025, 0.975))
    return Interval(float(numerator_B.sum() / denominator_B.sum()), float(low), float(high))


def sum_by_sample(value_K: np.ndarray, sample_K: np.ndarray, num_samples: int) -> np.ndarray:
    """Sums of the values of the masked words of each sample: (K,), (K,) -> float64 (num_samples,)."""
    return np.bincount(sample_K, weights=value_K, minlength=num_samples)


def derangement(groups: Sequence[object], seed: int) -> np.ndarray:
    """A permutation p with groups[p[i]] != groups[i] for all i: int64 (B,). None is a group of its own.

    Used to give every text a wrong image that does not show the same concept. Samples are sorted by group
    (groups and members in random order) and shifted by the size of the largest group, which
    lands in another group as long as none holds more than half of the samples.

    Raises UserError where one group holds more than half of the samples: then no such permutation exists.
    """
    size = len(groups)
    codes: dict[object, int] = {}
    code_B = np.array(
        [
            codes.setdefault(("alone", i) if g is None else ("group", g), len(codes))
            for i, g in enumerate(groups)
        ]
    )
    largest = int(np.bincount(code_B).max())
    if 2 * largest > size:
        raise UserError(
            f"{largest} of {size} held-out samples share one label, so not every text can get an image of "
            f"another label; expected at most half of them"
        )
    random = np.random.default_rng(seed)
    rank_of_code = random.permutation(len(codes))
    order = np.lexsort((random.random(size), rank_of_code[code_B]))
    shifted = np.roll(order, -largest)
    permutation = np.empty(size, dtype=np.int64)
    permutation[order] = shifted
    return permutation
