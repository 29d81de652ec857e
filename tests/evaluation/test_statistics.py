import math

import numpy as np
import pytest
from scipy import stats

from evaluation.statistics import estimate, paired_difference, rank_panels
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


def test_confidence_is_scipys_one_sided_t_test_over_prompts():
    rng = np.random.default_rng(1)
    deltas = rng.normal(0.1, 0.3, size=(9, 2))
    ours = {(str(p), s): float(deltas[p, s]) for p in range(9) for s in range(2)}
    test = stats.ttest_1samp(deltas.mean(axis=1), 0.0, alternative="greater")
    assert paired_difference(ours, dict.fromkeys(ours, 0.0)).confidence == pytest.approx(1 - test.pvalue)


@pytest.mark.parametrize(("shift", "confidence"), [(0.25, 1.0), (0.0, 0.5), (-0.25, 0.0)])
def test_equal_differences_leave_no_doubt_of_their_sign(shift: float, confidence: float):
    theirs = {(str(p), 0): float(p) for p in range(4)}
    assert paired_difference({key: value + shift for key, value in theirs.items()}, theirs).confidence == confidence


@pytest.mark.parametrize(
    ("shift", "higher_is_better", "words"),
    [(0.5, True, "B is better than A"), (-0.5, True, "B is worse than A"), (-0.5, False, "B is better than A")],
)
def test_a_verdict_says_which_is_better(shift: float, higher_is_better: bool, words: str):
    theirs = {(str(p), 0): float(p % 3) for p in range(8)}
    ours = {key: value + shift + 0.01 * float(key[0]) for key, value in theirs.items()}
    verdict = paired_difference(ours, theirs).verdict("B", "A", higher_is_better=higher_is_better)
    assert verdict.startswith(words)
    assert "100.0% sure" in verdict


def test_a_verdict_does_not_decide_what_it_cannot():
    theirs = {(str(p), 0): 0.0 for p in range(6)}
    ours = {(str(p), 0): (-1.0) ** p for p in range(6)}
    assert "not clearly different" in paired_difference(ours, theirs).verdict("B", "A")
    one = paired_difference({("a", 0): 1.0}, {("a", 0): 0.0})
    assert "expected two or more" in one.verdict("B", "A")


def test_fresh_values_rank_candidates_on_what_all_of_them_have():
    worse = {(str(p), 0): float(p) for p in range(5)}
    better = {key: value + 1 for key, value in worse.items()} | {("only here", 0): -1e6}
    ranking = rank_panels({"worse": worse, "better": better})
    assert list(ranking) == ["better", "worse"]
    assert (ranking["better"].mean, ranking["worse"].mean, ranking["worse"].num_pairs) == (0.0, -1.0, 5)


def test_candidates_with_nothing_in_common_are_not_ranked():
    with pytest.raises(DataError, match="in common"):
        rank_panels({"a": {("p", 0): 1.0}, "b": {("p", 1): 1.0}})
