import math

import numpy as np
import pytest
from scipy import stats

from evaluation.statistics import estimate, paired_difference
from trainers.errors import DataError


def test_mean_weighs_prompts_equally_however_many_samples_each_has():
    result = estimate({("a", 0): 1.0, ("a", 1): 1.0, ("a", 2): 1.0, ("b", 0): 3.0})
    assert result.mean == 2.0
    assert result.num_samples == 4


def test_standard_error_is_scipys_over_prompt_means():
    rng = np.random.default_rng(0)
    values = {(f"prompt {p}", s): float(rng.normal()) for p in range(6) for s in range(3)}
    means = [np.mean([values[f"prompt {p}", s] for s in range(3)]) for p in range(6)]
    assert estimate(values).standard_error == pytest.approx(stats.sem(means), rel=1e-12)


def test_undefined_values_are_counted_and_left_out():
    result = estimate({("a", 0): 1.0, ("a", 1): math.nan, ("b", 0): 3.0, ("c", 0): math.nan})
    assert (result.mean, result.num_samples, result.num_undefined) == (2.0, 2, 2)
    assert result.standard_error == pytest.approx(stats.sem([1.0, 3.0]))


def test_one_prompt_has_a_mean_but_no_standard_error():
    result = estimate({("a", 0): 1.0, ("a", 1): 2.0})
    assert result.mean == 1.5
    assert math.isnan(result.standard_error)


def test_nothing_defined_is_nan_and_counted():
    result = estimate({("a", 0): math.nan})
    assert math.isnan(result.mean)
    assert (result.num_samples, result.num_undefined) == (0, 1)


def test_difference_ignores_what_both_panels_share():
    shared = {(f"prompt {p}", s): 10.0 * p + s for p in range(8) for s in range(2)}
    result = paired_difference({key: value + 0.25 for key, value in shared.items()}, shared)
    assert (result.mean, result.low, result.high) == (0.25, 0.25, 0.25)
    assert (result.num_prompts, result.num_pairs) == (8, 16)


def test_difference_uses_only_common_pairs_and_counts_undefined_ones():
    ours = {("a", 0): 2.0, ("a", 1): 5.0, ("b", 0): math.nan, ("c", 0): 7.0}
    theirs = {("a", 0): 1.0, ("b", 0): 0.0, ("c", 0): 4.0, ("d", 0): 0.0}
    result = paired_difference(ours, theirs)
    assert (result.mean, result.num_pairs, result.num_prompts, result.num_undefined) == (2.0, 2, 2, 1)


def test_difference_of_one_prompt_has_no_interval():
    result = paired_difference({("a", 0): 1.0, ("a", 1): 2.0}, {("a", 0): 0.0, ("a", 1): 0.0})
    assert result.mean == 1.5
    assert math.isnan(result.low)
    assert math.isnan(result.high)


def test_difference_without_common_samples_is_refused():
    with pytest.raises(DataError, match="no \\(prompt, seed\\) in common"):
        paired_difference({("a", 0): 1.0}, {("a", 1): 1.0})


def test_interval_is_repeated_for_a_seed_and_moves_with_another():
    rng = np.random.default_rng(1)
    ours = {(f"prompt {p}", 0): float(rng.normal()) for p in range(8)}
    theirs = dict.fromkeys(ours, 0.0)
    first = paired_difference(ours, theirs, seed=3)
    assert paired_difference(ours, theirs, seed=3) == first
    assert paired_difference(ours, theirs, seed=4).low != first.low


@pytest.mark.parametrize("num_prompts", [6, 12])
def test_interval_covers_the_truth_about_as_often_as_it_claims(num_prompts):
    rng = np.random.default_rng(7)
    truth, trials, covered = 0.3, 400, 0
    for _ in range(trials):
        prompt = truth + 0.02 * rng.normal(size=num_prompts)
        ours = {(f"{p}", s): float(prompt[p] + 0.02 * rng.normal()) for p in range(num_prompts) for s in range(2)}
        result = paired_difference(ours, dict.fromkeys(ours, 0.0), num_resamples=1000)
        covered += result.low <= truth <= result.high
    # Binomial(400, 0.95) leaves [0.92, 0.98] once in 200; the rest of the slack is the bootstrap's own error.
    assert 0.91 <= covered / trials <= 0.985
