"""How sure a panel's numbers are. The unit that varies is the prompt: seeds of one prompt are not independent."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import special

from trainers.errors import DataError

Panel = Mapping[tuple[str, int], float]
"""One value for each (prompt, seed); NaN is undefined."""


@dataclass(frozen=True)
class Estimate:
    """A panel's mean and how far another draw of prompts and seeds would move it."""

    mean: float
    standard_error: float
    num_samples: int
    """Samples with a value."""
    num_undefined: int


def estimate(values: Panel) -> Estimate:
    """Mean over prompts of per-prompt means, with the standard error clustered by prompt.

    With `m_p` the mean over the defined samples of prompt `p`, and `P` prompts that have any:
    `mean = sum(m_p) / P` and `standard_error = sqrt(sum((m_p - mean)²) / (P - 1) / P)`. The spread of seeds within a
    prompt is inside the spread of the `m_p`. With `P < 2` the standard error is NaN: how much prompts differ cannot
    be seen from one, and a spread between seeds would answer another question under the same name.
    """
    means = _prompt_means(values)
    num_undefined = sum(math.isnan(value) for value in values.values())
    return Estimate(
        mean=float(means.mean()) if len(means) else math.nan,
        standard_error=float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan,
        num_samples=len(values) - num_undefined,
        num_undefined=num_undefined,
    )


@dataclass(frozen=True)
class Difference:
    """How much higher one panel scores than another on the same prompts and seeds."""

    mean: float
    low: float
    """Lower end of the 95 % interval; NaN for fewer than two prompts."""
    high: float
    num_prompts: int
    num_pairs: int
    """(prompt, seed) pairs that both panels hold with a value."""
    num_undefined: int
    """Common pairs where either value is undefined; they are left out."""
    confidence: float
    """That the mean is above zero, from 0 to 1: one-sided, by Student's t over prompts; NaN for fewer than two."""

    def verdict(self, ours: str, theirs: str, *, higher_is_better: bool = True) -> str:
        """One sentence on whether ours is better than theirs, and how sure that is."""
        sure = self.confidence if higher_is_better else 1 - self.confidence
        if math.isnan(self.low):
            return f"nothing can be said of {ours} and {theirs}: {self.num_prompts} prompts, expected two or more"
        numbers = (
            f"{self.mean:+.4f} ({self.low:+.4f} to {self.high:+.4f} with 95 %; {self.num_pairs} pictures of "
            f"{self.num_prompts} prompts)"
        )
        if self.low <= 0 <= self.high:
            return f"{ours} is not clearly different from {theirs}: {numbers}; better with {sure:.0%} confidence"
        is_better = (self.mean > 0) is higher_is_better
        word, sure = ("better", sure) if is_better else ("worse", 1 - sure)
        return f"{ours} is {word} than {theirs}: {numbers}; {sure:.1%} sure"


def paired_difference(ours: Panel, theirs: Panel, *, seed: int = 0, num_resamples: int = 10_000) -> Difference:
    """Mean of `ours - theirs` over common (prompt, seed), with a 95 % bootstrap interval over prompts.

    Differences are averaged within each prompt, then prompts are resampled with replacement. The percentiles are
    widened for few prompts (Hesterberg, 2015, arXiv:1411.5279, "expanded percentile interval"): a plain percentile
    interval over eight prompts covers the truth less than 90 % of the time.

    Args:
        ours: Values of the trial in question.
        theirs: Values of what it is compared with.
        seed: Seed of the resampling.
        num_resamples: Bootstrap replicates.

    Raises:
        DataError: The panels have no (prompt, seed) in common.
    """
    common = [key for key in ours if key in theirs]
    if not common:
        raise DataError(
            f"cannot pair {len(ours)} samples with {len(theirs)}: no (prompt, seed) in common; "
            "score both with the same prompts and seeds"
        )
    deltas = {key: ours[key] - theirs[key] for key in common}
    num_undefined = sum(math.isnan(delta) for delta in deltas.values())
    means = _prompt_means(deltas)
    low, high = _interval(means, np.random.default_rng(seed), num_resamples)
    return Difference(
        mean=float(means.mean()) if len(means) else math.nan,
        low=low,
        high=high,
        num_prompts=len(means),
        num_pairs=len(deltas) - num_undefined,
        num_undefined=num_undefined,
        confidence=_confidence(means),
    )


def rank_panels(panels: Mapping[str, Panel]) -> dict[str, Difference]:
    """Candidates from the best to the worst on the same fresh (prompt, seed), each with how far it is below the best.

    The largest of many noisy values is partly luck: give the few best of a search values on seeds that the search has
    not seen, and the luckiest falls back among them. Candidates are compared on what all of them have a value for.

    Args:
        panels: Higher is better.

    Raises:
        DataError: There is nothing that all candidates have in common.
    """
    first = next(iter(panels.values())) if panels else dict[tuple[str, int], float]()
    common = [key for key in first if all(key in panel and not math.isnan(panel[key]) for panel in panels.values())]
    shared = {name: {key: panel[key] for key in common} for name, panel in panels.items()}
    if not common:
        raise DataError(f"cannot rank {', '.join(panels) or 'nothing'}: no (prompt, seed) with a value in common")
    order = sorted(shared, key=lambda name: -estimate(shared[name]).mean)
    return {name: paired_difference(shared[name], shared[order[0]]) for name in order}


def _confidence(means: np.ndarray) -> float:
    """One minus the p-value of scipy's one-sided, one-sample t-test."""
    if len(means) < 2:
        return math.nan
    if np.ptp(means) == 0:  # no spread to divide by
        return (float(np.sign(means[0])) + 1) / 2
    t = float(means.mean()) / (float(means.std(ddof=1)) / math.sqrt(len(means)))
    return float(special.stdtr(len(means) - 1, t))


def _prompt_means(values: Panel) -> np.ndarray:
    by_prompt: defaultdict[str, list[float]] = defaultdict(list)
    for (prompt, _), value in values.items():
        if not math.isnan(value):
            by_prompt[prompt].append(value)
    return np.array([np.mean(group) for group in by_prompt.values()])


def _interval(means: np.ndarray, rng: np.random.Generator, num_resamples: int) -> tuple[float, float]:
    count = len(means)
    if count < 2:
        return math.nan, math.nan
    # Replaces the normal quantile by Student's, and undoes the bootstrap's division by n instead of n - 1.
    tail = special.ndtr(math.sqrt(count / (count - 1)) * special.stdtrit(count - 1, 0.025))
    replicates = means[rng.integers(count, size=(num_resamples, count))].mean(axis=1)
    low, high = np.quantile(replicates, (tail, 1 - tail))
    return float(low), float(high)
