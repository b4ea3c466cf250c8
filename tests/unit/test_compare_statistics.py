"""Intervals of paired differences have 95 % coverage, detect known differences and equal closed forms."""

import numpy as np
import pytest
from scipy import stats

from commonit_trl.compare.statistics import paired_difference

REPEATS = 100
# Standard deviations per token: of the seed, of the row, and of the row with that seed.
NOISE = {"seeds": (1, 0, 0), "rows": (0.1, 3, 1), "both": (1, 10, 5), "some": (0.3, 3, 5)}


def repeats(noise, seeds, rows=200, shift=0.0):
    """Yield intervals of two strategies whose true difference per token is `shift`."""
    of_seed, of_row, of_both = NOISE[noise]
    rng = np.random.default_rng(seeds)
    for _ in range(REPEATS):
        tokens = rng.integers(5, 100, rows).astype(float)
        baseline = rng.gamma(2, 1, (seeds, rows)) * tokens
        difference = (
            of_seed * rng.standard_normal((seeds, 1))
            + of_row * rng.standard_normal(rows)
            + of_both * rng.standard_normal((seeds, rows))
        )
        yield paired_difference(baseline + (difference + shift) * tokens, baseline, tokens)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("noise", NOISE)
def test_intervals_of_equal_strategies_contain_zero_in_95_of_100_repeats(noise, seeds):
    containing = sum(not interval.visible for interval in repeats(noise, seeds))
    # The count is binomial with p = 0.95; it exceeds these bounds once in 2,000.
    low, high = stats.binom.ppf((0.00025, 0.99975), REPEATS, 0.95)
    assert low <= containing <= high


def test_bootstrap_percentiles_are_too_narrow():
    """Resampling three seeds underestimates their spread, hence Student's t."""
    rng, containing = np.random.default_rng(0), 0
    for _ in range(REPEATS):
        sample = rng.standard_normal(3)
        interval = stats.bootstrap((sample,), np.mean, n_resamples=500, method="percentile", rng=rng)
        containing += interval.confidence_interval.low <= 0 <= interval.confidence_interval.high
    assert containing < 0.85 * REPEATS


@pytest.mark.parametrize("shift", [-2.0, 2.0])
@pytest.mark.parametrize("noise", ["rows", "some"])
def test_known_differences_are_detected(noise, shift):
    found = list(repeats(noise, 5, shift=shift))
    assert sum(each.visible and np.sign(each.value) == np.sign(shift) for each in found) >= 0.95 * REPEATS
    assert np.mean([each.value for each in found]) == pytest.approx(shift, abs=0.1)


def test_noise_of_one_kind_gives_its_t_test():
    shifts, tokens = np.array([0.1, 0.4, 0.2, 0.9]), np.full(400, 7.0)
    rows = np.random.default_rng(0).standard_normal(400) + 0.3
    for noise, sample in ((shifts[:, None], shifts), (np.tile(rows, (4, 1)), rows)):
        found = paired_difference(noise * tokens, np.zeros((4, 400)), tokens)
        known = stats.ttest_1samp(sample, 0).confidence_interval(0.95)
        assert found.value == pytest.approx(sample.mean())
        assert (found.low, found.high) == pytest.approx((known.low, known.high), rel=0.1)  # noise of the resampling


def test_rows_are_weighted_by_their_tokens():
    ours, tokens = np.array([[10.0, 300.0, 5.0]]), np.array([10.0, 100.0, 0.0])
    found = paired_difference(ours, np.zeros_like(ours), tokens)
    assert found.value == pytest.approx(310 / 110)  # the row without tokens has no weight


def test_equal_values_give_a_difference_of_zero():
    values = np.random.default_rng(0).random((3, 20))
    found = paired_difference(values, values.copy(), np.ones(20))
    assert (found.value, found.low, found.high, found.visible) == (0, 0, 0, False)


@pytest.mark.parametrize(("seeds", "tokens"), [(1, [1.0] * 9), (2, [1.0] * 9), (3, [3.0]), (3, [3.0, 0.0])])
def test_too_few_seeds_or_rows_give_no_interval(seeds, tokens):
    found = paired_difference(np.ones((seeds, len(tokens))), np.zeros((seeds, len(tokens))), np.array(tokens))
    assert found.value > 0 and found.low is found.high is None and not found.visible
    assert paired_difference(np.ones((seeds, 1)), np.zeros((seeds, 1)), np.zeros(1)) is None
