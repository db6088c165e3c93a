"""Intervals against closed forms; derangements against their definition."""

import math
from collections import Counter

import numpy as np
import pytest

from eve.errors import UserError
from eve.tasks.statistics import bootstrap_ratio, derangement, sum_by_sample


def test_interval_of_a_mean_agrees_with_the_normal_one():
    """The bootstrap distribution of a mean of n values has the standard deviation std / sqrt(n) exactly."""
    values = np.random.default_rng(0).normal(0.3, 2.0, size=1000)
    interval = bootstrap_ratio(values, np.ones(1000), seed=1, resamples=4000)
    half = 1.96 * values.std() / math.sqrt(1000)
    assert interval.value == pytest.approx(values.mean(), abs=1e-12)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.06 * half)


def test_interval_of_a_ratio_agrees_with_the_delta_method():
    """Var(sum a / sum b) = sum (a - r b)^2 / (sum b)^2 to first order: samples weigh by their words."""
    random = np.random.default_rng(0)
    words = random.integers(1, 12, size=2000).astype(float)
    gain = random.normal(0.2, 0.5, size=2000) * words
    interval = bootstrap_ratio(gain, words, seed=1, resamples=4000)
    ratio = gain.sum() / words.sum()
    half = 1.96 * math.sqrt(((gain - ratio * words) ** 2).sum()) / words.sum()
    assert interval.value == pytest.approx(ratio, abs=1e-12)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.06)


def test_whole_samples_are_resampled_not_words():
    """Words of a sample that always agree are one sample's worth of evidence: no smaller interval."""
    gain = np.random.default_rng(0).choice([-1.0, 1.0], size=200)
    one = bootstrap_ratio(gain, np.ones(200), seed=1)
    ten = bootstrap_ratio(10 * gain, np.full(200, 10.0), seed=1)
    assert one == ten


def test_constant_and_single_samples_have_an_interval_of_no_width():
    assert bootstrap_ratio(np.full(50, 0.5), np.ones(50), seed=0).low == 0.5
    single = bootstrap_ratio(np.array([3.0]), np.array([4.0]), seed=0)
    assert (single.value, single.low, single.high) == (0.75, 0.75, 0.75)


def test_samples_without_a_masked_word_do_not_divide_by_zero():
    interval = bootstrap_ratio(np.array([1.0, 0.0, 0.0]), np.array([1.0, 0.0, 0.0]), seed=0)
    assert (interval.value, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_same_seed_same_interval():
    values = np.arange(30.0)
    assert bootstrap_ratio(values, np.ones(30), seed=3) == bootstrap_ratio(values, np.ones(30), seed=3)
    assert bootstrap_ratio(values, np.ones(30), seed=3) != bootstrap_ratio(values, np.ones(30), seed=4)


def test_sum_by_sample_keeps_samples_without_words():
    sums = sum_by_sample(np.array([1.0, 2.0, 4.0]), np.array([0, 2, 2]), 4)
    assert sums.tolist() == [1.0, 0.0, 6.0, 0.0]


@pytest.mark.parametrize(
    "groups",
    [
        [None, None],
        ["a", "b"],
        ["a", "a", "b", "b"],
        ["a", "a", "a", "b", "c", "d"],
        [0, 0, 1, 1, 2],
        [None] * 101,
        list(np.random.default_rng(0).integers(0, 5, size=300)),
        ["a", None, "a", None, "b"],
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_derangement_is_a_permutation_that_never_stays_in_a_group(groups, seed):
    permutation = derangement(groups, seed)
    assert sorted(permutation) == list(range(len(groups)))
    for index, other in enumerate(permutation):
        assert index != other
        assert groups[index] is None or groups[index] != groups[other]


def test_derangement_depends_on_the_seed_and_pairs_up_all_groups():
    groups = list(range(40))
    assert derangement(groups, 1).tolist() == derangement(groups, 1).tolist()
    assert derangement(groups, 1).tolist() != derangement(groups, 2).tolist()
    halves = ["a"] * 10 + ["b"] * 10
    assert Counter(halves[i] for i in derangement(halves, 0)[:10]) == {"b": 10}


@pytest.mark.parametrize("groups", [["a"], [None], ["a", "a", "b"], ["a", "a", "a", None, None]])
def test_a_majority_label_is_refused(groups):
    with pytest.raises(UserError, match="share one label"):
        derangement(groups, 0)
